/* Fails or ends a process at one chosen file operation; loaded before libc (LD_PRELOAD).

   Only operations on paths below a folder count. fault_arm() says which one is hit and how;
   before it is called nothing happens. fault_journal() writes down every change instead, with its
   data, in the order in which the changes were made. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL = 1, SHORT = 2, KILL_BEFORE = 3, KILL_AFTER = 4 };

static char folder[4096];
static size_t folder_length;
static long target = -1;
static int action, number, stays, record = -1;
static atomic_long count;
static int armed, journal = -1;

/* Below PATH the operations are counted from 0. The one of this index is hit, with STAY all later
   ones of the same kind too (a disk that is full stays full). Names go to the descriptor RECORD. */
void fault_arm(const char *path, long index, int what, int error, int stay, int descriptor) {
    snprintf(folder, sizeof folder, "%s/", path);
    folder_length = strlen(folder);
    target = index, action = what, number = error, stays = stay, record = descriptor;
    atomic_store(&count, 0);
    armed = 1;
}

void fault_disarm(void) { armed = 0; }

/* Write every change below PATH to DESCRIPTOR, a line each: its name and its arguments. */
void fault_journal(const char *path, int descriptor) {
    fault_arm(path, -1, 0, 0, 0, -1);
    journal = descriptor;
}

static int is_inside(const char *path) {
    return !strncmp(path, folder, folder_length) || !strncmp(path, folder, folder_length - 1)
        && !path[folder_length - 1];
}

static int path_inside(int at, const char *path) {
    char link[64], base[4096];
    if (!armed || !path) return 0;
    if (path[0] == '/') return is_inside(path);
    if (at == AT_FDCWD) return 0; /* the campaign uses absolute paths */
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, base, sizeof base - 1);
    if (length < 0) return 0;
    base[length] = 0;
    return is_inside(base);
}

static int file_inside(int descriptor) {
    return path_inside(descriptor, "");
}

/* Put the whole path of a name, or of an open file where the name is "", into TEXT. */
static const char *whole(int at, const char *name, char text[8192]) {
    char link[64];
    if (name[0] == '/') return strcpy(text, name);
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, text, 4095);
    text[length < 0 ? 0 : length] = 0;
    if (name[0]) strcat(strcat(text, "/"), name);
    return text;
}

static void note(const char *name, int at, const char *path) {
    char text[8192];
    if (journal >= 0) dprintf(journal, "%s %s\n", name, whole(at, path, text));
}

static void note_rename(int from, const char *a, int to, const char *b) {
    char one[8192], other[8192];
    if (journal >= 0)
        dprintf(journal, "rename %s %s\n", whole(from, a, one), whole(to, b, other));
}

static void note_size(int descriptor, long size) {
    char text[8192];
    if (journal >= 0) dprintf(journal, "truncate %s %ld\n", whole(descriptor, "", text), size);
}

/* Note a write of SIZE bytes that has just been made at the end of the file's position. */
static void note_write(int descriptor, const unsigned char *data, long size) {
    char text[8192];
    if (journal < 0 || size <= 0) return;
    long offset = lseek(descriptor, 0, SEEK_CUR) - size;
    char *line = malloc(2 * size + 9000), *end = line;
    end += sprintf(line, "write %s %ld ", whole(descriptor, "", text), offset);
    for (long place = 0; place < size; place++) end += sprintf(end, "%02x", data[place]);
    *end++ = '\n';
    for (const char *start = line; start < end;) { /* it is no file below the folder */
        ssize_t done = write(journal, start, end - start);
        if (done <= 0) break;
        start += done;
    }
    free(line);
}

static char hit_name[32];

/* Count an operation; return what is to happen to it. A kill before it happens here. */
static int hit(const char *name) {
    long index = atomic_fetch_add(&count, 1);
    if (record >= 0) dprintf(record, "%s\n", name);
    if (index == target) snprintf(hit_name, sizeof hit_name, "%s", name);
    if (index != target && !(stays && target >= 0 && index > target && !strcmp(hit_name, name)))
        return 0;
    if (action == KILL_BEFORE) kill(getpid(), SIGKILL);
    return action;
}

static void after(int what) {
    if (what == KILL_AFTER) kill(getpid(), SIGKILL);
}

#define NEXT(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAILED(what) ((what) == FAIL || (what) == SHORT)

#define WRAP(type, failure, name, parameters, arguments, inside, noted)                            \
    type name parameters {                                                                         \
        NEXT(name);                                                                                \
        if (!(inside)) return real arguments;                                                      \
        int what = hit(#name);                                                                     \
        if (FAILED(what)) { errno = number; return failure; }                                      \
        type result = real arguments;                                                              \
        int error = errno;                                                                         \
        if (result != failure) { noted; }                                                          \
        after(what);                                                                               \
        errno = error;                                                                             \
        return result;                                                                             \
    }

#define WRAP_OPEN(name, parameters, arguments, at)                                                 \
    int name parameters {                                                                          \
        mode_t mode = 0;                                                                           \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                       \
            va_list list;                                                                          \
            va_start(list, flags);                                                                 \
            mode = va_arg(list, mode_t);                                                           \
            va_end(list);                                                                          \
        }                                                                                          \
        NEXT(name);                                                                                \
        if (!path_inside(at, path)) return real arguments;                                         \
        int what = hit(flags & O_CREAT ? "create" : "open");                                       \
        if (FAILED(what)) { errno = number; return -1; }                                           \
        int is_new = journal >= 0 && flags & O_CREAT && faccessat(at, path, F_OK, 0);              \
        int result = real arguments;                                                               \
        int error = errno;                                                                         \
        if (result >= 0 && is_new) note("create", at, path);                                       \
        if (result >= 0 && flags & O_TRUNC) note_size(result, 0);                                  \
        after(what);                                                                               \
        errno = error;                                                                             \
        return result;                                                                             \
    }

#define WRAP_WRITE(name, parameters, arguments, noted)                                             \
    ssize_t name parameters {                                                                      \
        NEXT(name);                                                                                \
        if (!file_inside(descriptor)) return real arguments;                                       \
        int what = hit("write");                                                                   \
        if (what == FAIL) { errno = number; return -1; }                                           \
        if (what == SHORT && size > 1) size /= 2;                                                  \
        ssize_t result = real arguments;                                                           \
        int error = errno;                                                                         \
        noted;                                                                                     \
        after(what);                                                                               \
        errno = error;                                                                             \
        return result;                                                                             \
    }

WRAP_OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
WRAP_OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
WRAP_OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
WRAP_OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)

WRAP_WRITE(write, (int descriptor, const void *data, size_t size), (descriptor, data, size),
           note_write(descriptor, data, result))
WRAP_WRITE(pwrite64, (int descriptor, const void *data, size_t size, off64_t offset),
           (descriptor, data, size, offset), (void)offset)

WRAP(ssize_t, -1, read, (int d, void *data, size_t size), (d, data, size), file_inside(d),
     (void)0)
WRAP(ssize_t, -1, pread64, (int d, void *data, size_t size, off64_t at), (d, data, size, at),
     file_inside(d),
     (void)0)
WRAP(ssize_t, -1, preadv, (int d, const struct iovec *v, int n, off_t at), (d, v, n, at),
     file_inside(d),
     (void)0)
WRAP(ssize_t, -1, preadv64, (int d, const struct iovec *v, int n, off64_t at), (d, v, n, at),
     file_inside(d),
     (void)0)
WRAP(ssize_t, -1, preadv64v2, (int d, const struct iovec *v, int n, off64_t at, int flags),
     (d, v, n, at, flags), file_inside(d),
     (void)0)
WRAP(int, -1, fsync, (int d), (d), file_inside(d),
     note("fsync", d, ""))
WRAP(int, -1, fdatasync, (int d), (d), file_inside(d),
     note("fsync", d, ""))
WRAP(int, -1, ftruncate, (int d, off_t size), (d, size), file_inside(d),
     note_size(d, size))
WRAP(int, -1, ftruncate64, (int d, off64_t size), (d, size), file_inside(d),
     note_size(d, size))
WRAP(int, -1, flock, (int d, int how), (d, how), file_inside(d),
     (void)0)
WRAP(int, -1, rename, (const char *a, const char *b), (a, b), path_inside(AT_FDCWD, a),
     note_rename(AT_FDCWD, a, AT_FDCWD, b))
WRAP(int, -1, renameat, (int x, const char *a, int y, const char *b), (x, a, y, b),
     path_inside(x, a),
     note_rename(x, a, y, b))
WRAP(int, -1, unlink, (const char *path), (path), path_inside(AT_FDCWD, path),
     note("unlink", AT_FDCWD, path))
WRAP(int, -1, unlinkat, (int at, const char *path, int flags), (at, path, flags),
     path_inside(at, path),
     note("unlink", at, path))
WRAP(int, -1, rmdir, (const char *path), (path), path_inside(AT_FDCWD, path),
     note("unlink", AT_FDCWD, path))
WRAP(int, -1, mkdir, (const char *path, mode_t mode), (path, mode), path_inside(AT_FDCWD, path),
     note("mkdir", AT_FDCWD, path))
WRAP(DIR *, NULL, opendir, (const char *path), (path), path_inside(AT_FDCWD, path),
     (void)0)
WRAP(DIR *, NULL, fdopendir, (int d), (d), file_inside(d),
     (void)0)
WRAP(int, -1, stat, (const char *path, struct stat *s), (path, s), path_inside(AT_FDCWD, path),
     (void)0)
WRAP(int, -1, stat64, (const char *path, struct stat64 *s), (path, s), path_inside(AT_FDCWD, path),
     (void)0)
WRAP(int, -1, lstat, (const char *path, struct stat *s), (path, s), path_inside(AT_FDCWD, path),
     (void)0)
WRAP(int, -1, lstat64, (const char *path, struct stat64 *s), (path, s),
     path_inside(AT_FDCWD, path),
     (void)0)
WRAP(int, -1, fstatat, (int at, const char *path, struct stat *s, int flags),
     (at, path, s, flags), path_inside(at, path),
     (void)0)
WRAP(int, -1, fstatat64, (int at, const char *path, struct stat64 *s, int flags),
     (at, path, s, flags), path_inside(at, path),
     (void)0)
