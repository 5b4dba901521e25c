/* The dense distillation loss and its gradient on the CPU, row by row, each row once through the cache.

   Loaded by native.py, which also says what the arguments are. Plain C without Python: the compiler makes
   vector code of the loops. The numbers are those of chunks.py, whose passes remain the reference.

   Exponentials are taken to base 2, because then the scaling is exact; sums are in float over a part of a row,
   in lanes, and beyond that in double. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* One build for every CPU of the kind: the loader picks the widest vectors that it has. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && !defined(LSKD_ONE_TARGET)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

#define LOG2_E 1.44269504088896341f
#define LANES 16   /* floats in the widest vector; a shorter rest of a row is filled up */
#define BLOCK 512  /* how far to look back for where the largest value was */
#define PART 2048  /* of a row whose sums are in float; a multiple of LANES */

enum { KL, TEACHER_ENTROPY, HARD, NLL, AGREEMENT, TERMS };

/* 2^y for y <= 0, to two units in the last place; 0 where a float has no normal number left.
   Of NaN it may be any number: rows are looked through for NaN apart. */
INLINE float power_of_2(float y)
{
    float shifted = y + 12582912.0f;  /* 1.5 * 2^23: the sum's last bits are y, rounded */
    float rest = y - (shifted - 12582912.0f);
    /* minimax polynomial of 2^rest on -1/2 to 1/2 by Remez' exchange, relative error 2e-9 */
    float value = 1.5345811e-4f;
    value = value * rest + 1.33999309e-3f;
    value = value * rest + 9.61848907e-3f;
    value = value * rest + 5.55032864e-2f;
    value = value * rest + 2.40226462e-1f;
    value = value * rest + 6.93147182e-1f;
    value = value * rest + 1.0f;
    uint32_t exponent, bits;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&bits, &value, sizeof bits);
    bits += exponent << 23;
    memcpy(&value, &bits, sizeof value);
    return y < -126.0f ? 0.0f : value;
}

/* The largest value of a row of each network, and the first place where it stands; NaN is passed over. */
struct largest {
    float top[2];
    int place[2];
};

INLINE int first_place(const float *x, int start, int length, float top)
{
    int first = length;
    #pragma omp simd reduction(min : first)
    for (int i = 0; i < length; i++) {
        int here = x[start + i] == top ? i : length;
        first = here < first ? here : first;
    }
    return start + first;
}

INLINE struct largest largest_of(const float *restrict x, const float *restrict z, int classes)
{
    struct largest found = {{-INFINITY, -INFINITY}, {0, 0}};
    for (int start = 0; start < classes; start += BLOCK) {
        int length = classes - start < BLOCK ? classes - start : BLOCK;
        float student = -INFINITY, teacher = -INFINITY;
        #pragma omp simd reduction(max : student, teacher)
        for (int i = start; i < start + length; i++) {
            student = x[i] > student ? x[i] : student;
            teacher = z[i] > teacher ? z[i] : teacher;
        }
        if (student > found.top[0]) {
            found.top[0] = student;
            found.place[0] = start;
        }
        if (teacher > found.top[1]) {
            found.top[1] = teacher;
            found.place[1] = start;
        }
    }
    for (int n = 0; n < 2; n++) {
        int start = found.place[n], length = classes - start < BLOCK ? classes - start : BLOCK;
        found.place[n] = first_place(n ? z : x, start, length, found.top[n]);
    }
    return found;
}

struct sums {
    double student, teacher;  /* of the exponentials */
    double difference;        /* of the teacher's exponential times (its logit - the student's), both less top */
    double logit;             /* of the teacher's exponential times its logit less top */
};

INLINE void exponentials(const float *restrict x, const float *restrict z, float *restrict q, float *restrict p,
                         int classes, float top, float teacher_top, float scale, struct sums *sums)
{
    float student = 0, teacher = 0, difference = 0, logit = 0;
    #pragma omp simd reduction(+ : student, teacher, difference, logit)
    for (int i = 0; i < classes; i++) {
        float u = x[i] - top, v = z[i] - teacher_top;
        float power = power_of_2(u * scale), teacher_power = power_of_2(v * scale);
        q[i] = power;
        p[i] = teacher_power;
        student += power;
        teacher += teacher_power;
        /* The difference of two large sums would not be 0 for equal rows: the difference comes first. */
        difference += teacher_power * (v - u);
        logit += teacher_power * v;
    }
    sums->student += student;
    sums->teacher += teacher;
    sums->difference += difference;
    sums->logit += logit;
}

/* The same for the last classes of a row, fewer than LANES. */
INLINE void last_exponentials(const float *x, const float *z, float *q, float *p, int classes, float top,
                              float teacher_top, float scale, struct sums *sums)
{
    float power[LANES], teacher_power[LANES];
    #pragma omp simd
    for (int i = 0; i < LANES; i++) {
        power[i] = power_of_2(i < classes ? (x[i] - top) * scale : -INFINITY);
        teacher_power[i] = power_of_2(i < classes ? (z[i] - teacher_top) * scale : -INFINITY);
    }
    for (int i = 0; i < classes; i++) {
        float u = x[i] - top, v = z[i] - teacher_top;
        q[i] = power[i];
        p[i] = teacher_power[i];
        sums->student += power[i];
        sums->teacher += teacher_power[i];
        sums->difference += teacher_power[i] * (v - u);
        sums->logit += teacher_power[i] * v;
    }
}

INLINE double exponentials_at_1(const float *restrict x, float *restrict e, int classes, float top)
{
    double total = 0;
    for (int start = 0; start < classes; start += PART) {
        int end = classes - start < PART ? classes : start + PART;
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = start; i < end; i++) {
            e[i] = power_of_2((x[i] - top) * LOG2_E);
            sum += e[i];
        }
        total += sum;
    }
    return total;
}

INLINE double sum_of_differences(const float *x, int classes, float top)
{
    double total = 0;
    for (int start = 0; start < classes; start += PART) {
        int end = classes - start < PART ? classes : start + PART;
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = start; i < end; i++)
            sum += x[i] - top;
        total += sum;
    }
    return total;
}

/* student, teacher: rows of `classes` floats; gradient: the same shape, or null; labels: one for each row that
   counts, or null; rows: indices of the rows that count, or null for all; first to last of them are done.
   scratch: 3 * classes floats. soft, hard: factors of the gradient; on, off: smoothed labels' own mass and each
   other's. totals: sums of KL divergence, teacher's entropy, hard cross-entropy, nll and agreement. */
FOR_EACH_CPU
void lskd_rows(const float *students, const float *teachers, float *gradients, const int64_t *labels,
               const int64_t *rows, float *scratch, double *totals, int64_t first, int64_t last,
               int64_t class_count, double temperature, double soft, double hard, double on, double off)
{
    int classes = (int)class_count, whole = classes / LANES * LANES, rest = classes - whole;
    float scale = (float)(LOG2_E / temperature);
    float *p = scratch, *e = scratch + classes;
    memset(totals, 0, TERMS * sizeof *totals);
    for (int64_t j = first; j < last; j++) {
        int64_t row = rows ? rows[j] : j;
        const float *x = students + row * class_count, *z = teachers + row * class_count;
        float *q = gradients ? gradients + row * class_count : scratch + 2 * class_count;
        struct largest largest = largest_of(x, z, classes);
        float top = largest.top[0], teacher_top = largest.top[1];

        struct sums sums = {0, 0, 0, 0};
        for (int start = 0; start < whole; start += PART) {
            int length = whole - start < PART ? whole - start : PART;
            exponentials(x + start, z + start, q + start, p + start, length, top, teacher_top, scale, &sums);
        }
        last_exponentials(x + whole, z + whole, q + whole, p + whole, rest, top, teacher_top, scale, &sums);

        double difference = sums.difference, logit = sums.logit;
        if (!isfinite(difference) || !isfinite(logit)) {
            /* Masked classes (logits of -inf) made 0 * inf above, where 0 * log 0 is 0. NaN made NaN, whatever
               its power: from here on it is in the sums. */
            difference = logit = 0;
            for (int i = 0; i < classes; i++) {
                double u = x[i] - top, v = z[i] - teacher_top;
                if (isnan(u))
                    sums.student = u;
                if (isnan(v))
                    sums.teacher = v;
                if (p[i] != 0) {
                    difference += p[i] * (v - u);
                    logit += p[i] * v;
                }
            }
        }
        double per_mass = 1 / (temperature * sums.teacher);
        double log_sum = log(sums.student), teacher_log_sum = log(sums.teacher);
        totals[KL] += difference * per_mass + log_sum - teacher_log_sum;
        totals[TEACHER_ENTROPY] += teacher_log_sum - logit * per_mass;
        totals[AGREEMENT] += largest.place[0] == largest.place[1];

        double sum_at_1 = sums.student;
        const float *at_1 = q;
        if (labels) {
            if (temperature != 1) {
                sum_at_1 = exponentials_at_1(x, e, classes, top) + 0 * sums.student;  /* NaN for NaN */
                at_1 = e;
            }
            double log_sum_at_1 = log(sum_at_1);
            double nll = log_sum_at_1 - ((double)x[labels[j]] - top);
            double smoothed = nll;
            if (off != 0) {
                double everything = sum_of_differences(x, classes, top) - classes * log_sum_at_1;
                smoothed = (on - off) * nll - off * everything;
            }
            totals[NLL] += nll;
            totals[HARD] += smoothed;
        }
        if (!gradients)
            continue;
        float student_factor = (float)(soft / sums.student), teacher_factor = (float)(soft / sums.teacher);
        if (soft == 0) {  /* whatever the teacher says, NaN too */
            memset(p, 0, classes * sizeof *p);
            teacher_factor = 0;
        }
        if (!labels || hard == 0) {
            #pragma omp simd
            for (int i = 0; i < classes; i++)
                q[i] = q[i] * student_factor - p[i] * teacher_factor;
            continue;
        }
        float hard_factor = (float)(hard / sum_at_1), everywhere = (float)(hard * off);
        if (at_1 == q) {
            student_factor += hard_factor;
            #pragma omp simd
            for (int i = 0; i < classes; i++)
                q[i] = q[i] * student_factor - p[i] * teacher_factor - everywhere;
        } else {
            #pragma omp simd
            for (int i = 0; i < classes; i++)
                q[i] = q[i] * student_factor - p[i] * teacher_factor + e[i] * hard_factor - everywhere;
        }
        q[labels[j]] -= (float)(hard * (on - off));
    }
}
