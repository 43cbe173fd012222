#include "sparse.h"

#include "calls.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/resource.h>

enum { RANGES = 16400 }; /* tables, and a place for each arena */

/* MCL_ONFAULT and MLOCK_ONFAULT, which old headers don't have. */
enum { ON_FAULT = 4, LOCK_ON_FAULT = 1 };

struct range {
        uintptr_t first, last;
};

/* Ours, in no order; never taken away: a place is used again for the next arena. */
static struct range *_Atomic ranges;
static _Atomic uint32_t ranges_used;
static _Atomic bool locks_future;

static bool failed(long status)
{
        return status < 0 && status > -4096;
}

static void *unlocked(size_t size, int flags, int fd)
{
        long got = sys_6(SYS_mmap, 0, size, PROT_NONE, flags | MAP_NORESERVE, fd, 0);

        if (failed(got))
                return NULL;
        sys_2(SYS_munlock, got, size);
        if (failed(sys_3(SYS_mprotect, got, size, PROT_READ | PROT_WRITE))) {
                sys_2(SYS_munmap, got, size);
                return NULL;
        }
        /* Hosts that make huge pages of everything would give two megabytes for the first byte touched. */
        sys_3(SYS_madvise, got, size, MADV_NOHUGEPAGE);
        return (void *)got;
}

static void keep(void *place, size_t size)
{
        struct range *all = atomic_load(&ranges), *none = NULL;
        uint32_t number;

        if (!all) {
                all = unlocked(RANGES * sizeof *all, MAP_PRIVATE | MAP_ANONYMOUS, -1);
                if (!all)
                        return;
                if (!atomic_compare_exchange_strong(&ranges, &none, all)) {
                        sys_2(SYS_munmap, all, RANGES * sizeof *all);
                        all = none;
                }
        }
        number = atomic_fetch_add(&ranges_used, 1);
        if (number < RANGES)
                all[number] = (struct range){(uintptr_t)place, (uintptr_t)place + size};
}

void *reserve(size_t size, int kind)
{
        return unlocked(size, kind | MAP_ANONYMOUS, -1);
}

void *reserve_for_good(size_t size, int kind)
{
        void *place = reserve(size, kind);

        if (place)
                keep(place, size);
        return place;
}

long sparse_map(void *before, size_t size, int flags, int fd)
{
        void *made = unlocked(size, flags, fd);
        long moved;

        if (!made)
                return -ENOMEM;
        if (!before) {
                keep(made, size);
                return (long)made;
        }
        moved = sys_5(SYS_mremap, made, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, before);
        if (failed(moved))
                sys_2(SYS_munmap, made, size);
        return moved;
}

/* --- mlockall() --- */

/* Call `visit` with all parts of a mapping that aren't ours. */
static void each_part(uintptr_t first, uintptr_t last, void (*visit)(uintptr_t, uintptr_t, void *),
                      void *data)
{
        const struct range *all = atomic_load(&ranges);
        uint32_t used = atomic_load(&ranges_used);

        while (first < last) {
                uintptr_t end = last, on = last;

                for (uint32_t i = 0; i < used && i < RANGES && all; i++) {
                        if (all[i].first <= first && first < all[i].last) {
                                end = first;
                                on = all[i].last;
                                break;
                        }
                        if (all[i].first > first && all[i].first < end)
                                on = end = all[i].first;
                }
                if (end > first)
                        visit(first, end, data);
                first = on;
        }
}

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

/* All of the process's memory but ours. False: the kernel doesn't say what there is. */
static bool each_of_program(void (*visit)(uintptr_t, uintptr_t, void *), void *data)
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
                        each_part(first, last, visit, data);
                }
        sys_1(SYS_close, fd);
        return got == 0;
}

static void add_up(uintptr_t first, uintptr_t last, void *data)
{
        *(uint64_t *)data += last - first;
}

/* As mlockall(), which doesn't say either what can't be locked. */
static void lock_part(uintptr_t first, uintptr_t last, void *data)
{
        if (!*(bool *)data)
                sys_2(SYS_mlock, first, last - first);
        else
                sys_3(SYS_mlock2, first, last - first, LOCK_ON_FAULT);
}

static void unlock_ours(void)
{
        const struct range *all = atomic_load(&ranges);
        uint32_t used = atomic_load(&ranges_used);

        for (uint32_t i = 0; i < used && i < RANGES && all; i++)
                sys_2(SYS_munlock, all[i].first, all[i].last - all[i].first);
}

/* The kernel's own limit counts all address space: ours doesn't count. */
static bool is_within_limit(void)
{
        struct rlimit limit = {0};
        uint64_t size = 0;

        sys_4(SYS_prlimit64, 0, RLIMIT_MEMLOCK, 0, &limit);
        return each_of_program(add_up, &size) && size <= limit.rlim_cur;
}

/* What there is now but ours, and all that comes if it is asked for. */
static long lock_program(int flags)
{
        bool on_fault = flags & ON_FAULT;
        long status;

        if (!is_within_limit()) {
                status = sys_1(SYS_mlockall, MCL_CURRENT | ON_FAULT);
                if (status < 0)
                        return status;
                unlock_ours();
        }
        if (flags & MCL_FUTURE) {
                status = sys_1(SYS_mlockall, flags & ~MCL_CURRENT);
                if (status < 0)
                        return status;
        } else if (atomic_load(&locks_future)) {
                sys_0(SYS_munlockall);
        }
        atomic_store(&locks_future, flags & MCL_FUTURE);
        each_of_program(lock_part, &on_fault);
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
                unlock_ours();
        }
        return (int)result(status);
}
