/* Bytes that went past the library after the connection had moved: by a raw system call, an io_uring, a
 * function of the C library that nobody stands in front of, a program that inherited the descriptor.
 *
 * They are on the TCP connection, where nothing should be. The kernel counts what it has to send, so the
 * sender finds them before it puts anything behind them in the ring: it ends the ring there, and all that
 * follows goes over TCP, in order. It doesn't ask the kernel before each put: a send that the kernel does
 * takes longer than RAW_NEAR, so a thread whose last put went into the same ring less than that ago has sent
 * nothing in between. Otherwise it asks, for 2 % of its time at most; what it then puts without having asked
 * isn't `clean`.
 *
 * A receiver that finds bytes on TCP which no `end` announced takes them for what comes next if the ring is
 * empty and was so all the time since they can have been sent: either all that was in it was put clean, or
 * TCP was seen empty after the last byte was taken. Else the order isn't known, and the connection is reset.
 *
 * `clean` is the peer's word. Who writes nonsense there spoils the order of his own stream.
 */
#ifndef FREEFLOW_RAW_H
#define FREEFLOW_RAW_H

#include "clock.h"
#include "family.h"

/* The put that a thread did last. */
struct raw_last {
        struct end *end;
        uint64_t stamp; /* clock_stamp() */
        uint64_t spent; /* clock_stamp() until which its share of questions is used up */
        int fd;
};

extern __thread struct raw_last raw_last __attribute__((tls_model("initial-exec")));
extern _Atomic uint64_t raw_near; /* in units of clock_stamp() */

enum raw {
        RAW_NONE,     /* nothing went past us */
        RAW_UNKNOWN,  /* not looked at */
        RAW_BYPASSED, /* something did, or the program has shut down its side */
        RAW_LOST,     /* the descriptor isn't this connection any more */
};

/* A connection's first byte in a ring: what the kernel has counted until then. False: not by us. */
bool raw_begin(int fd, struct end *end);
/* Under the sender's lock; what is found clean is said to the peer. */
enum raw raw_check(int fd, struct end *end);
enum raw raw_check_in_share(int fd, struct end *end, uint64_t stamp);
/* The thread is about to sleep: look after what it has put without asking, if its share of time allows. */
void raw_settle_last(void);
/* A receiver is about to sleep. False: there is something on TCP. */
bool raw_tcp_is_empty(int fd, struct end *end);

/* Under the sender's lock, before a put. */
static inline enum raw raw_before_put(int fd, struct end *end, uint64_t stamp)
{
        if (__builtin_expect(raw_last.end == end &&
                                 stamp - raw_last.stamp <
                                     atomic_load_explicit(&raw_near, memory_order_relaxed) &&
                                 atomic_load_explicit(&end->tx.clean, memory_order_relaxed) ==
                                     atomic_load_explicit(&end->tx.edge, memory_order_relaxed),
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

static inline bool raw_is_clean(const struct flow *flow)
{
        return atomic_load_explicit(&flow->clean, memory_order_relaxed) ==
               atomic_load_explicit(&flow->edge, memory_order_relaxed);
}

static inline void raw_settle(void)
{
        if (__builtin_expect(raw_last.end && !raw_is_clean(&raw_last.end->tx), 0))
                raw_settle_last();
}

#endif
