/* Loaded by LD_PRELOAD: a clock that is wrong by LSKD_CLOCK seconds, also in the times of the files that are written.

   Several numbers are taken in turn, each for a fifth of a second: the clock jumps. What counts time that has
   passed (CLOCK_MONOTONIC) is right, as it is on a machine whose clock is set.

   LSKD_LATE: seconds after which a job.json is there for others, as on a network's file system. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long wrong_by(void) {
    const char *next = getenv("LSKD_CLOCK");
    long found[8], count = 0;
    for (char *end; next && *next && count < 8; next = *end == ',' ? end + 1 : end) {
        found[count++] = strtol(next, &end, 10);
        if (end == next) return 0;
    }
    if (!count) return 0;
    struct timespec passed;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &passed);
    return found[(passed.tv_sec * 5 + passed.tv_nsec / 200000000) % count];
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong_by();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

int rename(const char *from, const char *to) {
    const char *late = getenv("LSKD_LATE"), *end = "/job.json";
    size_t length = strlen(to);
    if (late && length > strlen(end) && !strcmp(to + length - strlen(end), end)) {
        static char kept[4096];
        snprintf(kept, sizeof kept, "%s.late", to);
        if (syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, kept)) return -1;
        if (fork()) return 0;
        sleep(atoi(late));
        syscall(SYS_renameat, AT_FDCWD, kept, AT_FDCWD, to);
        _exit(0);
    }
    return syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}

int close(int file) {
    struct stat about;
    int flags = getenv("LSKD_CLOCK") ? fcntl(file, F_GETFL) : -1;
    if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && !fstat(file, &about) && S_ISREG(about.st_mode)) {
        struct timespec times[2];
        clock_gettime(CLOCK_REALTIME, times);
        times[1] = times[0];
        futimens(file, times);
    }
    return syscall(SYS_close, file);
}
