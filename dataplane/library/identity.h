/* Does a descriptor still belong to the connection that the table has for it? It doesn't if the
 * program has closed or replaced it by a system call that the library doesn't wrap, or if another
 * process that shares its descriptors has.
 *
 * The kernel is asked when a call fails with an error that a connection doesn't have. It is also
 * asked before bytes or readiness of a ring are reported for a descriptor, and before it is
 * registered with epoll; but not if the same thread asked about the same connection less than
 * `raw_near` ago, since no close and open are that fast, and for at most 1 % of the thread's time.
 */
#ifndef FREEFLOW_IDENTITY_H
#define FREEFLOW_IDENTITY_H

#include "clock.h"
#include "raw.h"

struct identity_last {
        const struct end *end;
        uint64_t stamp; /* clock_stamp() */
        uint64_t spent; /* see bucket_take() */
};

extern __thread struct identity_last identity_last __attribute__((tls_model("initial-exec")));

bool identity_check(int fd, const struct end *end, uint64_t stamp);
/* Without a lock: remove the table's entry of this descriptor, and its registrations with epoll.
 * Nothing happens to the connection. If the descriptor is now another connection's, the table has
 * that afterwards. */
void identity_lost(int fd);

static inline bool identity_holds(int fd, const struct end *end)
{
        uint64_t stamp = clock_stamp();

        if (__builtin_expect(
                identity_last.end == end && stamp - identity_last.stamp < load_relaxed(&raw_near), 1)) {
                identity_last.stamp = stamp;
                return true;
        }
        return identity_check(fd, end, stamp);
}

#endif
