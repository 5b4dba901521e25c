/* Loaded by LD_PRELOAD: counts what processes do to files below a folder, and ends with SIGKILL in the middle.

   LSKD_STEPS names a file that gets a letter for each step, of all processes of a command in their order: w for a
   write, s for a file brought to the disk, m for one that is renamed, l linked, c cut, d removed. At the step
   LSKD_KILL_AT half of what was to be written is, and then its process is killed, or with LSKD_KILL_GROUP all of its
   group. LSKD_STEPS_BELOW: the folder. All are read at each step, so that a forked process can have its own. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static void die(void) {
    kill(getenv("LSKD_KILL_GROUP") ? 0 : getpid(), SIGKILL);
    for (;;) pause();
}

static int below(const char *path) {
    const char *folder = getenv("LSKD_STEPS_BELOW");
    return folder && !strncmp(path, folder, strlen(folder));
}

/* Note a step; whether it is the one to die in. */
static int step(char kind) {
    const char *file = getenv("LSKD_STEPS"), *last = getenv("LSKD_KILL_AT");
    int notes = file ? open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (notes < 0) return 0;
    syscall(SYS_write, notes, &kind, 1);
    long count = lseek(notes, 0, SEEK_CUR); /* right after the letter, whoever appends at the same time */
    close(notes);
    return last && count == atol(last);
}

static int step_in(int file, char kind) {
    char link[64], path[PATH_MAX + 1];
    struct stat found;
    if (!getenv("LSKD_STEPS") || fstat(file, &found) || !S_ISREG(found.st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path) && step(kind);
}

static void step_at(const char *path, char kind) {
    char folder[PATH_MAX + 1], real[PATH_MAX + 1];
    if (!getenv("LSKD_STEPS") || strlen(path) > PATH_MAX) return;
    strcpy(folder, path);
    char *end = strrchr(folder, '/');
    if (end) *end = 0;
    if (realpath(end ? (end == folder ? "/" : folder) : ".", real) && below(real) && step(kind)) die();
}

ssize_t write(int file, const void *data, size_t size) {
    if (!step_in(file, 'w')) return syscall(SYS_write, file, data, size);
    syscall(SYS_write, file, data, size / 2);
    die();
    return -1;
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    if (!step_in(file, 'w')) return syscall(SYS_pwrite64, file, data, size, place);
    syscall(SYS_pwrite64, file, data, size / 2, place);
    die();
    return -1;
}

ssize_t pwrite(int file, const void *data, size_t size, off_t place) { return pwrite64(file, data, size, place); }

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (!step_in(file, 'w')) return syscall(SYS_writev, file, parts, count);
    syscall(SYS_write, file, parts[0].iov_base, parts[0].iov_len / 2);
    die();
    return -1;
}

ssize_t sendfile64(int to, int from, off64_t *place, size_t size) {
    if (!step_in(to, 'w')) return syscall(SYS_sendfile, to, from, place, size);
    syscall(SYS_sendfile, to, from, place, (size < 1000 ? size : 1000) / 2);
    die();
    return -1;
}

ssize_t sendfile(int to, int from, off_t *place, size_t size) { return sendfile64(to, from, place, size); }

int fsync(int file) {
    if (step_in(file, 's')) die();
    return syscall(SYS_fsync, file);
}

int ftruncate64(int file, off64_t size) {
    if (step_in(file, 'c')) die();
    return syscall(SYS_ftruncate, file, size);
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int rename(const char *from, const char *to) {
    step_at(to, 'm');
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int link(const char *from, const char *to) {
    step_at(to, 'l');
    return syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlink(const char *path) {
    step_at(path, 'd');
    return syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
