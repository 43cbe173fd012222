/* What the library knows of one end of a connection, and of each of its two directions. flow.h
 * changes their stage and phases. */
#ifndef FREEFLOW_END_H
#define FREEFLOW_END_H

#include "lock.h"
#include "place.h"
#include "spin.h"

enum {
        MEMBERS = 256, /* processes of one family that have a number */
        MEMBER_WORDS = MEMBERS / 64,
};

/* Where one direction's bytes go. A receiver: TCP -> READY -> RING -> OVER; a sender: TCP -> RING
 * -> OVER. Both begin again at TCP when the end leaves its slot (reentry.h). */
enum phase {
        PHASE_TCP,   /* over TCP, and they are counted */
        PHASE_READY, /* receiver: still over TCP, but every wait checks the ring too */
        PHASE_RING,  /* through the ring */
        PHASE_OVER,  /* the ring has ended: over TCP, and they are counted */
};

/* One direction, as the end that keeps it knows it. */
struct flow {
        struct lock lock;
        _Atomic uint32_t phase;
        _Atomic uint32_t
            kernel; /* calls in the kernel that don't check the ring, while PHASE_TCP or PHASE_OVER */
        _Atomic uint32_t
            deferred; /* receiver: TCP has an event that the program mustn't see yet (remote.h) */
        _Atomic uint64_t position; /* bytes over TCP so far */
        _Atomic uint64_t edge;     /* sender: tail, receiver: head; the ring's words only publish it */
        _Atomic uint64_t base;     /* sender: where the ring began anew */
        _Atomic uint64_t limit;    /* receiver: position at which the ring begins, in PHASE_READY and later */
        _Atomic uint64_t reserved; /* sender: end of what is being put, 0: nothing is */
        /* sender: highest offset used since the bulk area was reclaimed; receiver: highest one read
         * by its mapping */
        _Atomic uint64_t touched;
        _Atomic uint64_t seen;    /* sender: `edge` at the last scan of reclaim.c */
        _Atomic uint64_t clean;   /* `edge` up to which no byte is known to have bypassed the ring (raw.h) */
        _Atomic uint64_t sent;    /* sender: bytes that the kernel had been given when the ring began */
        _Atomic uint32_t stopped; /* sender: may not go on before the ring is empty */
        struct spinner spinner;
        _Atomic uint32_t
            checked;           /* ready_stamp() when the kernel's state of the connection was last checked */
        _Atomic uint32_t full; /* sender: times that there was no room */
        _Atomic uint32_t timeout; /* SO_RCVTIMEO or SO_SNDTIMEO in ms, 0: none */
};

/* How far an end is on its way to shared memory. */
enum stage {
        STAGE_CLOSED,    /* a socket without a connection yet, or none any more */
        STAGE_CANDIDATE, /* connected, counted; also again, after it has left a slot */
        STAGE_REQUESTED, /* the router has the request; no answer yet */
        STAGE_ANSWERING, /* a thread takes the answer: the end isn't freed before it has */
        STAGE_REFUSED,   /* for good: the next call on the connection untracks it */
        STAGE_GRANTED,   /* there is a slot: the next call on the connection compares the counters */
        STAGE_ATTACHED,  /* the flows' phases say the rest */
};

/* What the program has shut down: bits of `shut`. */
enum { SHUT_READ = 1, SHUT_WRITE = 2, SHUTTING_WRITE = 4 /* it is just doing so */ };

struct end {
        _Atomic uint32_t generation; /* odd: in use */
        _Atomic uint32_t stage;
        _Atomic uint32_t holders; /* processes that have descriptors of it */
        _Atomic uint32_t operations;
        _Atomic uint32_t reason; /* why the connection is, or will stay, on TCP */
        _Atomic uint32_t nonblocking;
        _Atomic uint32_t active; /* opened by connect(): its SYN counts as a byte acknowledged */
        _Atomic uint32_t shut;
        _Atomic uint32_t error; /* reported by the kernel, and not yet returned to the program */
        /* Options that the kernel has, and that also hold for what was left in the ring when they
         * were set.
         */
        _Atomic uint32_t low;          /* SO_RCVLOWAT; 0: the kernel has the program's own value */
        _Atomic uint32_t peeked;       /* 1 + SO_PEEK_OFF; 0: off */
        _Atomic uint32_t inq;          /* TCP_INQ */
        _Atomic uint32_t delays;       /* TCP_CORK and TCP_NODELAY of a sender in a ring: cork.h */
        _Atomic uint32_t epoch;        /* router_epoch() at the request */
        _Atomic uint64_t opened;       /* ns */
        _Atomic uint64_t requested_at; /* ns of the first request; 0: none, or it has been accounted for */
        _Atomic uint64_t counted_from; /* bytes over TCP, both ways, that the rule doesn't count */
        _Atomic uint64_t due;          /* ns: no request and no re-entry before (backoff.h); 0: not set */
        _Atomic uint32_t setbacks;     /* times that `due` was set for another try */
        _Atomic uint32_t final;        /* it has left its ring for a reason that holds for good */
        _Atomic uint32_t waits;        /* sleeps that only the present slot's bells end */
        _Atomic uint64_t cookie;
        _Atomic uint32_t kept; /* the kernel's keepalive isn't what the program has set: keep.h */
        _Atomic int32_t keep_on, keep_idle, keep_pause, keep_count;
        struct place place;
        _Atomic uint64_t members[MEMBER_WORDS]; /* those of the holders that have a number */
        _Alignas(64) struct flow rx;
        _Alignas(64) struct flow tx;
};

#endif
