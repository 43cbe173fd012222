/* Bytes that bypassed the library after the connection had moved: by a raw system call, an
 * io_uring, a function of the C library that the library doesn't wrap, a program that inherited the
 * descriptor.
 *
 * They are on the TCP connection, where nothing should be. The kernel counts what it was given to
 * send, so the sender finds them before it puts anything behind them in the ring: it ends the ring
 * there, and all that follows goes over TCP, in order. It doesn't ask the kernel before each put. A
 * send by the kernel takes longer than `raw_near`, so a thread whose last put went into the same
 * ring less than that ago has sent nothing in between. Otherwise it asks, for at most 2 % of its
 * time. What it puts without having asked isn't `clean`.
 *
 * A receiver that finds bytes on TCP which no `end` announced takes them for what comes next if the
 * ring is empty and has been empty since they may have been sent: either all that was in it was put
 * clean, or TCP was seen empty after the last byte was taken. Otherwise the order isn't known, and
 * the connection is reset.
 *
 * `clean` is the peer's word. A peer that writes wrong values there spoils the order of its own
 * stream.
 */
#ifndef FREEFLOW_RAW_H
#define FREEFLOW_RAW_H

#include "clock.h"
#include "family.h"

/* A thread's last put. */
struct raw_last {
        struct end *end;
        uint64_t stamp; /* clock_stamp() */
        uint64_t spent; /* see bucket_take() */
        int fd;
};

extern __thread struct raw_last raw_last __attribute__((tls_model("initial-exec")));
extern _Atomic uint64_t raw_near; /* in units of clock_stamp() */

enum raw {
        RAW_NONE,     /* no bytes have bypassed the ring */
        RAW_UNKNOWN,  /* the kernel wasn't asked */
        RAW_BYPASSED, /* some have, or the program has shut down its side */
        RAW_LOST,     /* the descriptor is no longer this connection's */
};

/* Before a connection's first byte in a ring: note what the kernel has counted until then. False:
 * not all of it came from the library. */
bool raw_begin(int fd, struct end *end);
/* Under the sender's lock: ask the kernel. If the ring is clean, the peer is told. */
enum raw raw_check(int fd, struct end *end);
/* The same, if the thread's share of time allows. */
enum raw raw_check_in_share(int fd, struct end *end, uint64_t stamp);
/* The thread is about to sleep: ask about what it has put without asking, if its share of time
 * allows. */
void raw_settle_last(void);
/* A receiver is about to sleep. False: there are bytes on TCP, or its end. */
bool raw_tcp_is_empty(int fd, struct end *end);

static inline bool raw_is_clean(const struct flow *flow)
{
        return load_relaxed(&flow->clean) == load_relaxed(&flow->edge);
}

/* Under the sender's lock, before a put: ask unless the last put was just now. */
static inline enum raw raw_before_put(int fd, struct end *end, uint64_t stamp)
{
        if (__builtin_expect(raw_last.end == end && stamp - raw_last.stamp < load_relaxed(&raw_near) &&
                                 raw_is_clean(&end->tx),
                             1))
                return RAW_NONE;
        return raw_check_in_share(fd, end, stamp);
}

static inline void raw_after_put(int fd, struct end *end, uint64_t stamp, size_t size)
{
        enum { QUICK = 4096 }; /* bytes; more take a while to copy */

        raw_last.end = end;
        raw_last.fd = fd;
        raw_last.stamp = size > QUICK ? clock_stamp() : stamp;
}

static inline void raw_settle(void)
{
        if (__builtin_expect(raw_last.end && !raw_is_clean(&raw_last.end->tx), 0))
                raw_settle_last();
}

#endif
