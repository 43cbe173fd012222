#include "io_uring.h"

#include "arena.h"
#include "clock.h"
#include "protocol.h"
#include "retire.h"

#include <stdatomic.h>
#include <string.h>

#define SECOND UINT64_C(1000000000)

enum { SHARE = 20 }; /* of the time, at most one part is spent with it */

static _Atomic uint64_t looked, took; /* ns: when the last look was over, and how long it took */
static _Atomic bool found;
static _Atomic uint32_t next; /* ticks() */

static bool is_other(int fd, const char *link)
{
        (void)fd;
        return strcmp(link, "anon_inode:[io_uring]") != 0;
}

bool io_uring_is_there(uint64_t pause)
{
        uint64_t begin = now(), last = atomic_load_explicit(&looked, memory_order_relaxed);
        uint64_t rest = atomic_load_explicit(&took, memory_order_relaxed) * SHARE;

        if (atomic_load_explicit(&found, memory_order_relaxed))
                return true;
        if (last && begin - last < (rest > pause ? rest : pause))
                return false;
        if (each_descriptor(0, is_other) == VISITED_SOME) {
                atomic_store(&found, true);
                retire_soon(REASON_RAW);
        }
        atomic_store_explicit(&took, now() - begin, memory_order_relaxed);
        atomic_store_explicit(&looked, now(), memory_order_relaxed);
        return atomic_load(&found);
}

void io_uring_check(void)
{
        uint32_t tick;

        /* Without a connection that has moved there is nothing to fear. */
        if (__builtin_expect(!atomic_load_explicit(&looked, memory_order_relaxed), 1))
                return;
        tick = ticks();
        if ((int32_t)(tick - atomic_load_explicit(&next, memory_order_relaxed)) < 0)
                return;
        atomic_store_explicit(&next, tick + 1000, memory_order_relaxed);
        if (io_uring_is_there(SECOND))
                retire_now_if_due();
}
