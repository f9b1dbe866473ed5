/* Stands between a process and its disk: counts every call that changes a file below one directory,
 * and at a certain one of them kills the process or fails the call. Preloaded (LD_PRELOAD) by
 * tests/support/disk_faults.py. Linux only. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL_BEFORE = 1, KILL_AFTER = 2, KILL_TORN = 3, FAIL = 4, FAIL_SHORT = 5 };

static char directory[PATH_MAX];
static size_t directory_length;
static long first_call, last_call;
static int what, error_number, log_descriptor = -1;
static atomic_long calls;

void fault_arm(const char *path, long first, long last, int kind, int error, int log) {
  snprintf(directory, sizeof directory, "%s", path);
  directory_length = strlen(directory);
  first_call = first;
  last_call = last;
  error_number = error;
  log_descriptor = log;
  atomic_store(&calls, 0);
  what = kind;
}

void fault_disarm(void) {
  directory_length = 0;
}

long fault_calls(void) {
  return atomic_load(&calls);
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static int is_below(const char *path) {
  return directory_length > 0 && strncmp(path, directory, directory_length) == 0;
}

static const char *path_of(int descriptor, char *buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, buffer, PATH_MAX - 1);
  if (length < 0) return NULL;
  buffer[length] = 0;
  return buffer;
}

/* Counts a call. Returns what is to be done with it; does not return from a kill before it. */
static int next(const char *name, const char *path) {
  long number = atomic_fetch_add(&calls, 1) + 1;
  if (log_descriptor >= 0) {
    char line[PATH_MAX + 64];
    const char *base = strrchr(path, '/');
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, name, base ? base + 1 : path);
    syscall(SYS_write, log_descriptor, line, (size_t)length);
  }
  if (number < first_call || number > last_call) return COUNT;
  if (what == KILL_BEFORE) die();
  return what;
}

#define REAL(type, name, ...)                                  \
  static type (*real)(__VA_ARGS__);                            \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* What is done by name: no half of it exists. */
#define BY_NAME(label, path, call)                                            \
  do {                                                                        \
    int todo = is_below(path) ? next(label, path) : COUNT;                    \
    if (todo == FAIL || todo == FAIL_SHORT) return errno = error_number, -1;  \
    int result = (call);                                                      \
    if (todo == KILL_AFTER || todo == KILL_TORN) die();                       \
    return result;                                                            \
  } while (0)

#define BY_DESCRIPTOR(label, descriptor, call)                                \
  do {                                                                        \
    char buffer[PATH_MAX];                                                    \
    const char *path = directory_length ? path_of(descriptor, buffer) : NULL; \
    int todo = path && is_below(path) ? next(label, path) : COUNT;            \
    if (todo == FAIL || todo == FAIL_SHORT) return errno = error_number, -1;  \
    int result = (call);                                                      \
    if (todo == KILL_AFTER || todo == KILL_TORN) die();                       \
    return result;                                                            \
  } while (0)

/* What writes bytes: half of them may be there when it ends. */
#define WRITES(label, descriptor, size, whole, half)                          \
  do {                                                                        \
    char buffer[PATH_MAX];                                                    \
    const char *path = directory_length ? path_of(descriptor, buffer) : NULL; \
    int todo = path && is_below(path) ? next(label, path) : COUNT;            \
    if (todo == FAIL_SHORT && (size) > 1) return (half);                      \
    if (todo == FAIL || todo == FAIL_SHORT) return errno = error_number, -1;  \
    ssize_t result = todo == KILL_TORN && (size) > 1 ? (half) : (whole);      \
    if (todo == KILL_AFTER || todo == KILL_TORN) die();                       \
    return result;                                                            \
  } while (0)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  WRITES("write", fd, size, real(fd, data, size), real(fd, data, size / 2));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
  WRITES("pwrite", fd, size, real(fd, data, size, at), real(fd, data, size / 2, at));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
  WRITES("pwrite", fd, size, real(fd, data, size, at), real(fd, data, size / 2, at));
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  WRITES("writev", fd, (size_t)count, real(fd, parts, count), real(fd, parts, count / 2));
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  REAL(ssize_t, sendfile, int, int, off_t *, size_t);
  WRITES("sendfile", out, size, real(out, in, offset, size), real(out, in, offset, size / 2));
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
  REAL(ssize_t, sendfile64, int, int, off64_t *, size_t);
  WRITES("sendfile", out, size, real(out, in, offset, size), real(out, in, offset, size / 2));
}

int ftruncate(int fd, off_t size) {
  REAL(int, ftruncate, int, off_t);
  BY_DESCRIPTOR("ftruncate", fd, real(fd, size));
}

int ftruncate64(int fd, off64_t size) {
  REAL(int, ftruncate64, int, off64_t);
  BY_DESCRIPTOR("ftruncate", fd, real(fd, size));
}

int fsync(int fd) {
  REAL(int, fsync, int);
  BY_DESCRIPTOR("fsync", fd, real(fd));
}

int fdatasync(int fd) {
  REAL(int, fdatasync, int);
  BY_DESCRIPTOR("fdatasync", fd, real(fd));
}

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  BY_NAME("rename", to, real(from, to));
}

int link(const char *from, const char *to) {
  REAL(int, link, const char *, const char *);
  BY_NAME("link", to, real(from, to));
}

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
  REAL(int, linkat, int, const char *, int, const char *, int);
  BY_NAME("link", to, real(from_fd, from, to_fd, to, flags));
}

int unlink(const char *path) {
  REAL(int, unlink, const char *);
  BY_NAME("unlink", path, real(path));
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  BY_NAME("mkdir", path, real(path, mode));
}

/* Opening changes something only where it may create or empty a file. */
#define OPENS(flags) (((flags) & O_CREAT) || ((flags) & O_TRUNC))

#define MODE_OF(flags)                                \
  mode_t mode = 0;                                    \
  if (((flags) & O_CREAT) || ((flags) & O_TMPFILE)) { \
    va_list more;                                     \
    va_start(more, flags);                            \
    mode = va_arg(more, mode_t);                      \
    va_end(more);                                     \
  }

int open(const char *path, int flags, ...) {
  REAL(int, open, const char *, int, ...);
  MODE_OF(flags)
  if (!OPENS(flags)) return real(path, flags, mode);
  BY_NAME("open", path, real(path, flags, mode));
}

int open64(const char *path, int flags, ...) {
  REAL(int, open64, const char *, int, ...);
  MODE_OF(flags)
  if (!OPENS(flags)) return real(path, flags, mode);
  BY_NAME("open", path, real(path, flags, mode));
}
