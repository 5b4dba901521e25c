/* Binary convolution on the CPU: signs packed into words of 32 channels, products by xor and popcount.

   Loaded by bits.py, which also says what the arguments are. Plain C without Python. This file includes itself
   once for each kind of processor; the builds differ in how wide a vector is, in how bits are counted and
   packed, and in nothing else: all give the same numbers to the bit.

   Lanes of a vector are output channels, so no lane is wasted whatever the number of input channels: a word of
   a pixel is spread over all lanes, compared with the weights of so many output channels, and the differing
   bits are added up. */

#ifndef LANES

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, BUILD)

#define WORD 32   /* channels in a word */
#define BLOCK 32  /* output channels that are done together; a multiple of all LANES */

/* One layer. Images are float, (batch, height, width, channels). */
struct layer {
    const float *x;            /* (batch, height, width, channels) */
    const float *threshold;    /* (channels): the input's sign is that of x + threshold */
    const uint32_t *weights;   /* (blocks, size * size * words, BLOCK) */
    const int32_t *missing;    /* (size * size, blocks * BLOCK): what a tap outside the image was counted for */
    const float *scale;        /* (out_channels) */
    const float *shift;        /* (out_channels), or null: then the rest is null too, and nothing is added */
    const float *residual;     /* (batch, out_height, out_width, residual_channels), repeated over channels */
    const float *slope;        /* (out_channels), of negative sums */
    const float *after;        /* (out_channels), added last */
    float *out;                /* (batch, out_height, out_width, out_channels) */
    int64_t height, width, channels, out_height, out_width, out_channels, residual_channels;
    int64_t size, stride, padding;
};

/* A pixel of the output: where its first tap lies among the packed words, and which taps lie in the image. */
struct pixel {
    int32_t start;
    int16_t top, bottom, left, right;
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

#define LANES 4
#define PIXELS 1
#define BUILD plain
#define TARGET
#include "xnor.c"

#if defined(__x86_64__) && !defined(LSKD_ONE_TARGET)
#include <immintrin.h>

#define LANES 8
#define PIXELS 2
#define BUILD avx2
#define TARGET __attribute__((target("avx2")))
#define AVX2
#include "xnor.c"
#undef AVX2

#define LANES 16
#define PIXELS 7
#define BUILD avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq")))
#define AVX512
#include "xnor.c"
#undef AVX512
#endif

/* How many of the builds - plain, avx2, avx512 - this processor can run. */
int lskd_xnor_builds(void)
{
#if defined(__x86_64__) && !defined(LSKD_ONE_TARGET)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2"))
        return 1;
    return 2 + (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vpopcntdq"));
#else
    return 1;
#endif
}

#else /* one build */

#define VECTORS (BLOCK / LANES)
#define AT_ONCE 31  /* words whose differing bits, 8 a byte at most, fit in a byte */

typedef uint32_t NAME(vector) __attribute__((vector_size(4 * LANES)));
#define VECTOR NAME(vector)

/* Adds the set bits of x to `counts`: by byte, but for AVX-512, by lane. */
TARGET INLINE VECTOR NAME(count)(VECTOR counts, VECTOR x)
{
#if defined(AVX512)
    return counts + (VECTOR)_mm512_popcnt_epi32((__m512i)x);
#elif defined(AVX2)
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i half = _mm256_set1_epi8(15);
    __m256i low = _mm256_and_si256((__m256i)x, half);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16((__m256i)x, 4), half);
    __m256i bits = _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
    return (VECTOR)_mm256_add_epi8((__m256i)counts, bits);
#else
    x -= (x >> 1) & 0x55555555;
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333);
    return counts + ((x + (x >> 4)) & 0x0f0f0f0f);  /* no byte overflows within AT_ONCE */
#endif
}

/* Sums of lanes, of what `count` has counted. */
TARGET INLINE VECTOR NAME(sum)(VECTOR counts)
{
#if defined(AVX512)
    return counts;
#else
    counts = (counts & 0x00ff00ff) + ((counts >> 8) & 0x00ff00ff);
    return (counts & 0x0000ffff) + (counts >> 16);
#endif
}

/* The signs of so many channels, WORD at most, as the lowest bits of a word: set where x + threshold >= 0. */
TARGET INLINE uint32_t NAME(pack)(const float *x, const float *threshold, int64_t channels)
{
    uint32_t word = 0;
#if defined(AVX512)
    if (channels == WORD) {
        for (int i = 0; i < 2; i++) {
            __m512 sum = _mm512_add_ps(_mm512_loadu_ps(x + 16 * i), _mm512_loadu_ps(threshold + 16 * i));
            word |= (uint32_t)_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_GE_OQ) << 16 * i;
        }
        return word;
    }
#elif defined(AVX2)
    if (channels == WORD) {
        for (int i = 0; i < 4; i++) {
            __m256 sum = _mm256_add_ps(_mm256_loadu_ps(x + 8 * i), _mm256_loadu_ps(threshold + 8 * i));
            __m256 positive = _mm256_cmp_ps(sum, _mm256_setzero_ps(), _CMP_GE_OQ);
            word |= (uint32_t)_mm256_movemask_ps(positive) << 8 * i;
        }
        return word;
    }
#endif
    for (int64_t c = 0; c < channels; c++)
        word |= (uint32_t)(x[c] + threshold[c] >= 0) << c;
    return word;
}

/* Packs `rows` rows of the padded image from row `first` on (rows and columns outside are 0). */
TARGET INLINE void NAME(pack_rows)(const struct layer *layer, const float *image, int64_t first, int64_t rows,
                                   uint32_t *words)
{
    int64_t channels = layer->channels, count = (channels + WORD - 1) / WORD;
    int64_t pitch = (layer->width + 2 * layer->padding) * count;
    for (int64_t row = 0; row < rows; row++, words += pitch) {
        int64_t y = first + row - layer->padding;
        if (y < 0 || y >= layer->height) {
            memset(words, 0, pitch * sizeof *words);
            continue;
        }
        memset(words, 0, layer->padding * count * sizeof *words);
        memset(words + pitch - layer->padding * count, 0, layer->padding * count * sizeof *words);
        uint32_t *to = words + layer->padding * count;
        const float *from = image + y * layer->width * channels;
        for (int64_t x = 0; x < layer->width; x++, from += channels)
            for (int64_t c = 0; c < channels; c += WORD)
                *to++ = NAME(pack)(from + c, layer->threshold + c, least(WORD, channels - c));
    }
}

/* Counts the differing bits of PIXELS pixels and BLOCK output channels. */
TARGET INLINE void NAME(differences)(const uint32_t *const *pixels, const int32_t *places, int64_t count,
                                     const uint32_t *weights, VECTOR sums[PIXELS][VECTORS])
{
    memset(sums, 0, PIXELS * VECTORS * sizeof(VECTOR));
    for (int64_t start = 0; start < count; start += AT_ONCE) {
        int64_t end = sizeof(VECTOR) == 64 ? count : least(start + AT_ONCE, count);
        VECTOR counts[PIXELS][VECTORS];
        memset(counts, 0, sizeof counts);
        for (int64_t i = start; i < end; i++, weights += BLOCK) {
            for (int p = 0; p < PIXELS; p++) {
                VECTOR word = (VECTOR){0} + pixels[p][places[i]];
                for (int v = 0; v < VECTORS; v++) {
                    VECTOR weight;
                    memcpy(&weight, weights + v * LANES, sizeof weight);
                    counts[p][v] = NAME(count)(counts[p][v], word ^ weight);
                }
            }
        }
        for (int p = 0; p < PIXELS; p++)
            for (int v = 0; v < VECTORS; v++)
                sums[p][v] += NAME(sum)(counts[p][v]);
        if (sizeof(VECTOR) == 64)
            break;
    }
}

/* Takes out what the taps outside the image, whose words are 0, were counted for. */
TARGET INLINE void NAME(correct)(const struct layer *layer, const struct pixel *pixel, int64_t block, int64_t blocks,
                                 int32_t *restrict integers)
{
    int64_t size = layer->size;
    if (pixel->top == 0 && pixel->left == 0 && pixel->bottom == size && pixel->right == size)
        return;
    for (int64_t tap = 0; tap < size * size; tap++) {
        int64_t row = tap / size, column = tap % size;
        if (row >= pixel->top && row < pixel->bottom && column >= pixel->left && column < pixel->right)
            continue;
        const int32_t *restrict missing = layer->missing + (tap * blocks + block) * BLOCK;
        for (int c = 0; c < BLOCK; c++)
            integers[c] += missing[c];
    }
}

/* Makes numbers of the integers of a pixel: scaled, and, where the layer says so, with what follows. */
TARGET INLINE void NAME(finish)(const struct layer *layer, const int32_t *restrict integers, int64_t index,
                                int64_t first, int64_t channels)
{
    const float *restrict scale = layer->scale + first;
    float *restrict out = layer->out + index * layer->out_channels + first;
    if (!layer->shift) {
        for (int64_t c = 0; c < channels; c++)
            out[c] = (float)integers[c] * scale[c];
        return;
    }
    const float *restrict shift = layer->shift + first, *restrict slope = layer->slope + first;
    const float *restrict after = layer->after + first;
    const float *residual = layer->residual + index * layer->residual_channels;
    float repeated[BLOCK];
    int64_t from = first % layer->residual_channels;
    if (from + channels > layer->residual_channels) {
        for (int64_t c = 0; c < channels; c++)
            repeated[c] = residual[(first + c) % layer->residual_channels];
        residual = repeated;
    } else {
        residual += from;
    }
    for (int64_t c = 0; c < channels; c++) {
        float sum = (float)integers[c] * scale[c] + shift[c] + residual[c];
        out[c] = (sum > 0 ? sum : sum * slope[c]) + after[c];
    }
}

/* Does rows `first` to `last` of the batch's `batch * out_height` rows of the output, `band` at most at a time.
   words: for ((band - 1) * stride + size) rows of the padded image; places: size * size * words of a pixel;
   pixels: band * out_width. */
TARGET void NAME(lskd_xnor)(const struct layer *layer, int64_t first, int64_t last, int64_t band, uint32_t *words,
                            int32_t *places, struct pixel *pixels)
{
    int64_t size = layer->size, stride = layer->stride, padding = layer->padding;
    int64_t word_count = (layer->channels + WORD - 1) / WORD, per_row = size * word_count;
    int64_t pitch = (layer->width + 2 * padding) * word_count, count = size * per_row;
    int64_t blocks = (layer->out_channels + BLOCK - 1) / BLOCK;
    int32_t all = (int32_t)(size * size * layer->channels);
    for (int64_t i = 0; i < count; i++)
        places[i] = (int32_t)(i / per_row * pitch + i % per_row);
    while (first < last) {
        int64_t image = first / layer->out_height, y = first % layer->out_height;
        int64_t rows = least(least(band, last - first), layer->out_height - y);
        const float *x = layer->x + image * layer->height * layer->width * layer->channels;
        NAME(pack_rows)(layer, x, y * stride, (rows - 1) * stride + size, words);

        int64_t total = rows * layer->out_width;
        struct pixel *pixel = pixels;
        for (int64_t row = 0; row < rows; row++) {
            int64_t above = padding - (y + row) * stride;
            for (int64_t column = 0; column < layer->out_width; column++, pixel++) {
                int64_t before = padding - column * stride;
                pixel->start = (int32_t)(row * stride * pitch + column * stride * word_count);
                pixel->top = (int16_t)largest(above, 0);
                pixel->bottom = (int16_t)least(above + layer->height, size);
                pixel->left = (int16_t)largest(before, 0);
                pixel->right = (int16_t)least(before + layer->width, size);
            }
        }
        for (int64_t block = 0; block < blocks; block++) {
            const uint32_t *weights = layer->weights + block * count * BLOCK;
            int64_t channels = least(BLOCK, layer->out_channels - block * BLOCK);
            for (int64_t i = 0; i < total; i += PIXELS) {
                const uint32_t *starts[PIXELS];
                for (int p = 0; p < PIXELS; p++)
                    starts[p] = words + pixels[least(i + p, total - 1)].start;
                VECTOR sums[PIXELS][VECTORS];
                NAME(differences)(starts, places, count, weights, sums);
                for (int p = 0; p < PIXELS && i + p < total; p++) {
                    int32_t integers[BLOCK];
                    memcpy(integers, sums[p], sizeof integers);
                    for (int c = 0; c < BLOCK; c++)
                        integers[c] = all - 2 * integers[c];
                    NAME(correct)(layer, &pixels[i + p], block, blocks, integers);
                    int64_t index = first * layer->out_width + i + p;
                    if (channels == BLOCK)  /* a known number of rounds */
                        NAME(finish)(layer, integers, index, block * BLOCK, BLOCK);
                    else
                        NAME(finish)(layer, integers, index, block * BLOCK, channels);
                }
            }
        }
        first += rows;
    }
}

/* Counts the same bits `rounds` times, all of them in the first-level cache; returns how many it has compared. */
TARGET int64_t NAME(lskd_xnor_rate)(int64_t rounds, uint32_t *weights, const int32_t *places, int64_t count)
{
    const uint32_t *starts[PIXELS];
    for (int p = 0; p < PIXELS; p++)
        starts[p] = weights + p;
    for (int64_t i = 0; i < rounds; i++) {
        VECTOR sums[PIXELS][VECTORS];
        NAME(differences)(starts, places, count, weights, sums);
        for (int p = 0; p < PIXELS; p++)
            for (int v = 0; v < VECTORS; v++)  /* all of it is used, so none of it is left out */
                weights[p] += sums[p][v][0];
    }
    return rounds * count * WORD * BLOCK * PIXELS;
}

#undef VECTORS
#undef VECTOR
#undef AT_ONCE
#undef LANES
#undef PIXELS
#undef BUILD
#undef TARGET
#endif
