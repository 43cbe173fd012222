/* Is a descriptor still the connection's that the table says? It isn't when the program has closed or
 * replaced it by a system call that nobody stands in front of, or another process has that shares its
 * descriptors.
 *
 * The kernel is asked whenever something doesn't fit: an error that a connection doesn't have. And before
 * bytes or readiness of a ring are given to a descriptor, and before it is registered with epoll: not if the
 * same thread did so for the same connection less than `raw_near` ago, since nobody closes and opens that
 * fast, and for 1 % of its time at most.
 */
#ifndef FREEFLOW_IDENTITY_H
#define FREEFLOW_IDENTITY_H

#include "clock.h"
#include "raw.h"

struct identity_last {
        const struct end *end;
        uint64_t stamp; /* clock_stamp() */
        uint64_t spent; /* clock_stamp() until which the thread's share of questions is used up */
};

extern __thread struct identity_last identity_last __attribute__((tls_model("initial-exec")));

bool identity_check(int fd, const struct end *end, uint64_t stamp);
/* The table's entry of this descriptor goes, and what epoll instances had of it; nothing happens to the
 * connection. Without a lock. If it is another connection's, the table says so then. */
void identity_lost(int fd);

static inline bool identity_holds(int fd, const struct end *end)
{
        uint64_t stamp = clock_stamp();

        if (__builtin_expect(identity_last.end == end &&
                                 stamp - identity_last.stamp <
                                     atomic_load_explicit(&raw_near, memory_order_relaxed),
                             1)) {
                identity_last.stamp = stamp;
                return true;
        }
        return identity_check(fd, end, stamp);
}

#endif
