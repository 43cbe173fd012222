/* mlockall(), which never locks the library's own memory (sparse.h). */
#include "calls.h"

#include "process_maps.h"
#include "sparse.h"
#include "sys.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* MCL_ONFAULT and MLOCK_ONFAULT, which old headers don't have. */
enum { ON_FAULT = 4, LOCK_ON_FAULT = 1 };

static _Atomic bool locks_future;

/* Call `visit` with the process's mappings, without the library's. Returns false if the kernel
 * doesn't list them. */
static bool each_program_range(void (*visit)(uintptr_t, uintptr_t, void *), void *data)
{
        struct process_maps maps;
        char line[64];

        if (!process_maps_open(&maps, "/proc/self/maps"))
                return false;
        while (process_maps_line(&maps, line, sizeof line)) {
                const char *text = line;
                uintptr_t first = process_maps_number(&text, 16), last;

                text++;
                last = process_maps_number(&text, 16);
                sparse_each_outside(first, last, visit, data);
        }
        process_maps_close(&maps);
        return maps.got == 0;
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
