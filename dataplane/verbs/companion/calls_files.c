/* Calls that open files or look at them. Those of the device are none of the kernel's: see
 * virtual.h. For all others, and in programs that don't ask for devices, the C library's own
 * functions are called.
 */
#include "../../library/sys.h"
#include "../virtual.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define CALL __attribute__((visibility("default")))

CALL virtual_files freeflow_virtual_files_2;

/* The C library's functions; NULL: it has none of that name. */
#define FUNCTIONS(F)                                                                                         \
        F(int, open, (const char *, int, ...))                                                               \
        F(int, open64, (const char *, int, ...))                                                             \
        F(int, openat, (int, const char *, int, ...))                                                        \
        F(int, openat64, (int, const char *, int, ...))                                                      \
        F(int, __open_2, (const char *, int))                                                                \
        F(int, __open64_2, (const char *, int))                                                              \
        F(int, __openat_2, (int, const char *, int))                                                         \
        F(int, __openat64_2, (int, const char *, int))                                                       \
        F(FILE *, fopen, (const char *, const char *))                                                       \
        F(FILE *, fopen64, (const char *, const char *))                                                     \
        F(int, stat, (const char *, struct stat *))                                                          \
        F(int, stat64, (const char *, struct stat64 *))                                                      \
        F(int, __xstat, (int, const char *, struct stat *))                                                  \
        F(int, __xstat64, (int, const char *, struct stat64 *))                                              \
        F(int, fstat, (int, struct stat *))                                                                  \
        F(int, fstat64, (int, struct stat64 *))                                                              \
        F(int, __fxstat, (int, int, struct stat *))                                                          \
        F(int, __fxstat64, (int, int, struct stat64 *))                                                      \
        F(int, access, (const char *, int))

static struct next {
#define FIELD(type, name, arguments) type(*name) arguments;
        FUNCTIONS(FIELD)
#undef FIELD
} next_functions;

static void find_next(void)
{
#define FIND(type, name, arguments) next_functions.name = dlsym(RTLD_NEXT, #name);
        FUNCTIONS(FIND)
#undef FIND
}

/* Other libraries' constructors may call us before ours ran. */
static struct next *next(void)
{
        if (__builtin_expect(!next_functions.open, 0))
                find_next();
        return &next_functions;
}

static __attribute__((constructor)) void start(void)
{
        next();
}

static const struct virtual_files *shown(void)
{
        return atomic_load_explicit(&freeflow_virtual_files_2, memory_order_acquire);
}

/* A descriptor of the device's file of this path, for a caller who asks for it by these flags; -1:
 * it is none of those, and `path` is what to open, or an error. */
static int open_own(const char **path, int flags, bool *failed)
{
        const struct virtual_files *files = shown();
        const char *other;
        int fd = -ENOENT;

        *failed = false;
        if (files && *path)
                fd = files->open(*path, flags);
        if (fd >= 0)
                return fd;
        if (fd != -ENOENT) {
                errno = -fd;
                *failed = true;
        } else if (files && *path && (other = files->other(*path))) {
                *path = other;
        }
        return -1;
}

/* The mode is only there if the flags ask for it; without, what is read is not used. */
#define MODE_OF(flags)                                                                                       \
        ({                                                                                                   \
                va_list list_;                                                                               \
                unsigned mode_;                                                                              \
                                                                                                             \
                va_start(list_, flags);                                                                      \
                mode_ = va_arg(list_, unsigned);                                                             \
                va_end(list_);                                                                               \
                mode_;                                                                                       \
        })

#define OPEN(name, otherwise, before, ...)                                                                   \
        CALL int name before                                                                                 \
        {                                                                                                    \
                bool failed;                                                                                 \
                int fd = open_own(&path, flags, &failed);                                                    \
                                                                                                             \
                if (fd >= 0 || failed)                                                                       \
                        return fd;                                                                           \
                return next()->name ? next()->name(__VA_ARGS__) : next()->otherwise(__VA_ARGS__);            \
        }

OPEN(open, open, (const char *path, int flags, ...), path, flags, MODE_OF(flags))
OPEN(open64, open, (const char *path, int flags, ...), path, flags, MODE_OF(flags))
OPEN(openat, openat, (int folder, const char *path, int flags, ...), folder, path, flags, MODE_OF(flags))
OPEN(openat64, openat, (int folder, const char *path, int flags, ...), folder, path, flags, MODE_OF(flags))

int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int folder, const char *path, int flags);
int __openat64_2(int folder, const char *path, int flags);
OPEN(__open_2, open, (const char *path, int flags), path, flags)
OPEN(__open64_2, open, (const char *path, int flags), path, flags)
OPEN(__openat_2, openat, (int folder, const char *path, int flags), folder, path, flags)
OPEN(__openat64_2, openat, (int folder, const char *path, int flags), folder, path, flags)

static FILE *open_stream(const char *path, const char *mode, FILE *(*function)(const char *, const char *))
{
        bool reads = *mode == 'r', failed;
        FILE *stream;
        int fd;

        for (const char *at = mode; *at; at++)
                reads &= *at != '+';
        fd = open_own(&path, reads ? O_RDONLY : O_RDWR, &failed);
        if (failed)
                return NULL;
        if (fd < 0)
                return function(path, mode);
        stream = fdopen(fd, mode);
        if (!stream)
                sys_1(SYS_close, fd);
        return stream;
}

CALL FILE *fopen(const char *path, const char *mode)
{
        return open_stream(path, mode, next()->fopen);
}

CALL FILE *fopen64(const char *path, const char *mode)
{
        return open_stream(path, mode, next()->fopen64 ? next()->fopen64 : next()->fopen);
}

/* Look at the device's file of this path. False: it is none, and `path` is what to look at. The
 * kernel's structure is the C libraries'. */
static bool look_at_own(const char **path, void *found)
{
        const struct virtual_files *files = shown();
        const char *other = files && *path ? files->other(*path) : NULL;
        int fd = files && *path && !other ? files->open(*path, O_RDONLY | O_CLOEXEC) : -1;

        if (other)
                *path = other;
        if (fd < 0)
                return false;
        sys_4(SYS_newfstatat, fd, "", found, AT_EMPTY_PATH);
        sys_1(SYS_close, fd);
        return true;
}

#define STAT(name, otherwise, type, before, ...)                                                             \
        CALL int name before                                                                                 \
        {                                                                                                    \
                _Static_assert(sizeof(struct type) == sizeof(struct stat), "64 bits");                       \
                if (look_at_own(&path, found))                                                               \
                        return 0;                                                                            \
                return next()->name ? next()->name(__VA_ARGS__) : next()->otherwise(path, (void *)found);    \
        }

STAT(stat, stat, stat, (const char *path, struct stat *found), path, found)
STAT(stat64, stat, stat64, (const char *path, struct stat64 *found), path, found)

/* What programs call that were linked with glibc before 2.33. */
int __xstat(int version, const char *path, struct stat *found);
int __xstat64(int version, const char *path, struct stat64 *found);
STAT(__xstat, stat, stat, (int version, const char *path, struct stat *found), version, path, found)
STAT(__xstat64, stat, stat64, (int version, const char *path, struct stat64 *found), version, path, found)

/* What a descriptor is that passes for another file. */
static bool look_disguised(int fd, struct stat *found)
{
        const struct virtual_files *files = shown();
        uint64_t number = 0;
        const char *disguise = files ? files->disguise(fd, &number) : NULL;

        if (!disguise || sys_4(SYS_newfstatat, AT_FDCWD, disguise, found, 0))
                return false;
        if (number)
                found->st_rdev = number;
        return true;
}

#define FSTAT(name, otherwise, type, before, ...)                                                            \
        CALL int name before                                                                                 \
        {                                                                                                    \
                if (look_disguised(fd, (struct stat *)found))                                                \
                        return 0;                                                                            \
                return next()->name ? next()->name(__VA_ARGS__) : next()->otherwise(fd, (void *)found);      \
        }

FSTAT(fstat, fstat, stat, (int fd, struct stat *found), fd, found)
FSTAT(fstat64, fstat, stat64, (int fd, struct stat64 *found), fd, found)

int __fxstat(int version, int fd, struct stat *found);
int __fxstat64(int version, int fd, struct stat64 *found);
FSTAT(__fxstat, fstat, stat, (int version, int fd, struct stat *found), version, fd, found)
FSTAT(__fxstat64, fstat, stat64, (int version, int fd, struct stat64 *found), version, fd, found)

CALL int access(const char *path, int wanted)
{
        struct stat found;

        if (!look_at_own(&path, &found))
                return next()->access(path, wanted);
        if (!(wanted & (W_OK | X_OK)))
                return 0;
        errno = EACCES;
        return -1;
}
