/* mlockall(), which never locks the library's own memory (sparse.h). */
#include "calls.h"

#include "sparse.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* MCL_ONFAULT and MLOCK_ONFAULT, which old headers don't have. */
enum { ON_FAULT = 4, LOCK_ON_FAULT = 1 };

static _Atomic bool locks_future;

static uintptr_t hexadecimal(const char **text)
{
        uintptr_t number = 0;

        for (;; (*text)++) {
                char c = **text;

                if (c >= '0' && c <= '9')
                        number = number * 16 + (uintptr_t)(c - '0');
                else if (c >= 'a' && c <= 'f')
                        number = number * 16 + (uintptr_t)(c - 'a' + 10);
                else
                        return number;
        }
}

/* Call `visit` with the process's mappings, without the library's. Returns false if the kernel
 * doesn't list them. */
static bool each_program_range(void (*visit)(uintptr_t, uintptr_t, void *), void *data)
{
        char buffer[2048], line[64] = "";
        long fd = sys_4(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC, 0), got;
        size_t length = 0;

        if (fd < 0)
                return false;
        while ((got = sys_3(SYS_read, fd, buffer, sizeof buffer)) > 0)
                for (long i = 0; i < got; i++) {
                        const char *text = line;
                        uintptr_t first, last;

                        if (buffer[i] != '\n') {
                                if (length < sizeof line - 1)
                                        line[length++] = buffer[i];
                                continue;
                        }
                        line[length] = 0;
                        length = 0;
                        first = hexadecimal(&text);
                        text++;
                        last = hexadecimal(&text);
                        sparse_each_outside(first, last, visit, data);
                }
        sys_1(SYS_close, fd);
        return got == 0;
}

static void add_size(uintptr_t first, uintptr_t last, void *data)
{
        *(uint64_t *)data += last - first;
}

/* Errors are ignored, as mlockall() ignores them. */
static void lock_range(uintptr_t first, uintptr_t last, void *data)
{
        if (!*(bool *)data)
                sys_2(SYS_mlock, first, last - first);
        else
                sys_3(SYS_mlock2, first, last - first, LOCK_ON_FAULT);
}

/* The kernel compares the limit with the whole address space. The library's part doesn't count
 * here. */
static bool is_within_limit(void)
{
        struct rlimit limit = {0};
        uint64_t size = 0;

        sys_4(SYS_prlimit64, 0, RLIMIT_MEMLOCK, 0, &limit);
        return each_program_range(add_size, &size) && size <= limit.rlim_cur;
}

/* Lock the program's present memory without the library's, and its future memory if the flags say
 * so. */
static long lock_program(int flags)
{
        bool on_fault = flags & ON_FAULT;
        long status;

        if (!is_within_limit()) {
                status = sys_1(SYS_mlockall, MCL_CURRENT | ON_FAULT);
                if (status < 0)
                        return status;
                sparse_unlock();
        }
        if (flags & MCL_FUTURE) {
                status = sys_1(SYS_mlockall, flags & ~MCL_CURRENT);
                if (status < 0)
                        return status;
        } else if (atomic_load(&locks_future)) {
                sys_0(SYS_munlockall);
        }
        atomic_store(&locks_future, flags & MCL_FUTURE);
        each_program_range(lock_range, &on_fault);
        return 0;
}

CALL int mlockall(int flags)
{
        long status;

        if (!process.on || !(flags & MCL_CURRENT) || flags & ~(MCL_CURRENT | MCL_FUTURE | ON_FAULT)) {
                status = sys_1(SYS_mlockall, flags);
                if (status == 0)
                        atomic_store(&locks_future, true);
                return (int)result(status);
        }
        status = lock_program(flags);
        if (status == -EINVAL) { /* before Linux 4.4 */
                status = sys_1(SYS_mlockall, flags);
                sparse_unlock();
        }
        return (int)result(status);
}
