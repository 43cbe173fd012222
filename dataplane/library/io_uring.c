#include "io_uring.h"

#include "clock.h"
#include "own.h"
#include "protocol.h"

#include <string.h>

enum { SHARE = 20 }; /* at most one part of the time is spent on scans */

static _Atomic uint64_t scanned, took; /* ns: when the last scan was over, and how long it took */
static _Atomic bool found;

static bool is_other(int fd, const char *link)
{
        (void)fd;
        return strcmp(link, "anon_inode:[io_uring]") != 0;
}

bool io_uring_is_there(uint64_t pause)
{
        uint64_t begin = now(), last = atomic_load_explicit(&scanned, memory_order_relaxed);
        uint64_t rest = atomic_load_explicit(&took, memory_order_relaxed) * SHARE;

        if (atomic_load_explicit(&found, memory_order_relaxed))
                return true;
        if (last && begin - last < (rest > pause ? rest : pause))
                return false;
        if (each_descriptor(0, is_other) == VISITED_SOME) {
                atomic_store(&found, true);
                atomic_store(&process.retires, REASON_RAW);
        }
        atomic_store_explicit(&took, now() - begin, memory_order_relaxed);
        atomic_store_explicit(&scanned, now(), memory_order_relaxed);
        return atomic_load(&found);
}

bool io_uring_matters(void)
{
        return atomic_load_explicit(&scanned, memory_order_relaxed) != 0;
}
