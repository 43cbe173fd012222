/* The shared memory of two ends: the arena, its slots, and in each slot one ring per direction.
 *
 * An arena is a sealed memfd that the router makes for two processes, one at each side, and that
 * only their families (the processes that fork from them) ever map. It has SLOTS slots; a slot
 * carries one connection. Both sides can write every word of it, so neither trusts any of it:
 * `ring.h` says what each side keeps in private memory.
 *
 * In a remote arena side 1 is this host's relay, and the connection's other end is a process of
 * another host that has such an arena too: what side 0 writes into direction 0 here, the relays
 * write into direction 1 there, at the same offsets. Its rings are smaller than RING_SIZE: so the
 * file's size, which is sealed, says what kind of arena it is, whatever a process writes into it.
 */
/* clang-format off */
/*      page 0                   struct arena: magic, version, bells
 *      page 2 ..                SLOTS x 2 pages: for each slot and direction one struct ring and the ring's
 *                               first bytes
 *      BULK_OFFSET ..           SLOTS x 2 x size_of_ring: the rest of each ring, touched only as far as it is
 *                               used; in a remote arena registered with the RDMA device, and never reclaimed
 *
 * A ring is size_of_ring bytes of address space: RING_SIZE, or a power of two below it in a remote
 * arena, from REMOTE_RING_LEAST to REMOTE_RING_MOST. The bytes at offsets below SMALL_SIZE lie in
 * the slot's own page, the others at the same offset of the bulk area. Small messages restart at
 * offset 0 whenever the ring is empty, so a connection that only carries small messages costs its
 * two pages and no more.
 *
 * Direction d of a slot is written by side d and read by side 1 - d.
 *
 * Pairing of the atomics, w: written by, r: read by:
 *      tail     w sender (release)    r receiver (acquire)   bytes ever put in; what lies below is readable
 *      base     w sender, only while the ring is empty, before tail; r receiver after tail
 *      stamp    w sender, only while the ring is empty, before tail; r receiver: when its first byte came
 *      head     w receiver (release)  r sender (acquire)     bytes ever taken out
 *      ready    w receiver (release)  r sender (acquire)     the receiver checks the ring before every wait
 *      start    w sender (release)    r receiver (acquire)   1 + position in the connection of the ring's first byte
 *      end      w sender (release)    r receiver (acquire)   1 + tail at which the ring ended; TCP goes on from there
 *      clean    w sender, before tail; r receiver after tail: up to this tail no byte had gone over TCP since the
 *               move when it was put (raw.h)
 *      messages w sender, before tail; r router: how often bytes were put, for people
 *      visible  w receiver (release)  r sender and relay, once the receiver is gone (acquire): of a queue pair: its
 *                                                            program may see what was executed below (record.h)
 *      stop     w receiver (seq_cst)  r sender (seq_cst)     the receiver requests that the ring ends; STOP_RAW:
 *                                                            because bytes came over TCP
 *      busy     w sender (seq_cst)    r receiver (seq_cst)   the sender is between checking `stop` and publishing;
 *                                                            a queue pair's (relaxed): it waits for the other one
 *      waiters  w both (seq_cst)                             this direction's sleepers: wait_begin(), wake()
 * Of each bell, in struct arena: `dirty` (slots in which something happened) and `rung` (rung.h),
 * both seq_cst.
 *
 * Of remote arenas only:
 *      over     w relay (release)     r receiver (acquire)   the sender's end is gone, what it put is below tail
 *      stopped  w relay (release)     r receiver (acquire)   answer to `stop`: the sender has stopped, and what
 *                                                            it put is below tail
 *      broken   w relay, router       r both                 bytes can't be delivered any more: the connection
 *               (release)             (acquire)              ends as by a reset
 *      received w relay (release)     r sender (acquire)     bytes that the peer's ring has, and with the first of
 *                                                            them its `start`
 *      move     w sender (release)    r relay (acquire)      the next move that the relay is to make, by its number
 *      moved    w relay (release)     r sender (acquire)     MOVE_OUTCOME times the number of the last one that is
 *                                                            over, and how it ended; `seen` is written before
 *      moves    w relay (release)     r sender (acquire)     it may request moves; in the ring that it receives:
 *               w receiver            r relay                its library knows them; written before `ready`
 *
 * In a remote arena `start` comes with the first byte: a ring into which nothing was put has none.
 */
/* clang-format on */
#ifndef FREEFLOW_LAYOUT_H
#define FREEFLOW_LAYOUT_H

#include "atomics.h"

#include <stddef.h>
#include <stdint.h>

#define FREEFLOW_MAGIC UINT64_C(0x31776f6c66656572) /* "reeflow1" */
#define FREEFLOW_VERSION 3

enum {
        PAGE = 4096,
        SLOTS = 64, /* one word of `dirty` has a bit for each */
        SIDES = 2,
        BELLS = 256, /* waiters per side: epoll instances and threads that sleep at one time */
        BELL_WORDS = BELLS / 64,
        RING_SIZE =
            4 * 1024 * 1024, /* below 1 MiB bulk stays slow: lines go from core to core, not through L3 */
        REMOTE_RING_LEAST = 64 * 1024,
        REMOTE_RING_MOST = RING_SIZE / 2,
        RING_HEADER = 384,
        SMALL_SIZE = PAGE - RING_HEADER,
        ARENA_PAGES = 2, /* struct arena */
        SLOT_OFFSET = ARENA_PAGES * PAGE,
        BULK_OFFSET = 1024 * 1024, /* after the slots, on a boundary of its own */
};

/* Values of `stop`. */
enum { STOP_REQUESTED = 1, STOP_RAW = 2 };

#define ARENA_SIZE ((size_t)BULK_OFFSET + (size_t)SLOTS * SIDES * RING_SIZE)

static inline size_t arena_size(size_t size_of_ring)
{
        return (size_t)BULK_OFFSET + (size_t)SLOTS * SIDES * size_of_ring;
}

/* Which waiters sleep. `any` says whether to check `bells`, so that waking nobody takes one load.
 */
struct waiters {
        _Atomic uint32_t any;
        uint32_t unused;
        _Atomic uint64_t bells[BELL_WORDS];
};

/* A move: bytes of a file for registered memory of the process that are to be written into one of
 * the peer's process, by the relays' device (moves.h of the relay). Offsets are in the files. */
struct move_request {
        _Atomic uint64_t number; /* grows by one; 0: none */
        _Atomic uint64_t from;   /* the router's number of the own file */
        _Atomic uint64_t from_offset;
        _Atomic uint64_t to; /* the peer's router's number of its file */
        _Atomic uint64_t to_offset;
        _Atomic uint64_t token; /* of that file */
        _Atomic uint64_t length;
};

/* How a move ended. */
enum move_outcome {
        MOVE_DONE = 1,       /* all bytes are there, and `seen` is what the file's header said then */
        MOVE_AGAIN = 2,      /* some may be there: the link was lost, or the file is given up */
        MOVE_NOT_FROM = 3,   /* the own file can't be used */
        MOVE_NOT_TO = 4,     /* the peer's can't */
        MOVE_OUTCOME = 1000, /* `moved` is this many times the number, and the outcome */
};

struct ring {
        /* sender's */
        _Alignas(64) _Atomic uint64_t tail;
        _Atomic uint64_t base;
        _Atomic uint64_t start;
        _Atomic uint64_t end;
        _Atomic uint32_t busy;
        _Atomic uint32_t sender_cpu; /* 1 + core on which the sender last was; 0: not known */
        _Atomic uint64_t stamp;      /* clock_stamp() at the first byte since the ring was empty */
        _Atomic uint64_t clean;
        _Atomic uint64_t messages;
        /* receiver's */
        _Alignas(64) _Atomic uint64_t head;
        _Atomic uint32_t ready;
        _Atomic uint32_t stop;
        _Atomic uint32_t receiver_cpu;
        _Atomic uint64_t visible;
        /* sleepers: receivers for bytes, senders for space */
        _Alignas(64) struct waiters receivers;
        _Alignas(64) struct waiters senders;
        /* of the slot's connection: both sides compare it with the router's grant */
        _Alignas(64) _Atomic uint64_t incarnation;
        /* w sender, before it announces that it waits: bytes in the ring at which it wants to be
         * woken; in a remote arena below which it wants to, 0: never */
        _Atomic uint32_t room;
        _Atomic uint32_t over;
        _Atomic uint32_t stopped;
        _Atomic uint32_t broken;
        _Atomic uint64_t received;
        struct move_request move;
        _Atomic uint64_t moved;
        _Atomic uint64_t seen;
        _Atomic uint32_t moves;
};

_Static_assert(sizeof(struct ring) <= RING_HEADER, "the ring's header fits before its first bytes");
_Static_assert(offsetof(struct ring, clean) == 48, "layout is part of the version");
_Static_assert(offsetof(struct ring, messages) == 56, "layout is part of the version");
_Static_assert(offsetof(struct ring, head) == 64, "sender and receiver write different lines");
_Static_assert(offsetof(struct ring, visible) == 88, "layout is part of the version");
_Static_assert(offsetof(struct ring, receivers) == 128, "waiters have lines of their own");
_Static_assert(offsetof(struct ring, senders) == 192, "waiters have lines of their own");
_Static_assert(offsetof(struct ring, incarnation) == 256, "layout is part of the version");
_Static_assert(offsetof(struct ring, room) == 264, "layout is part of the version");
_Static_assert(offsetof(struct ring, over) == 268, "layout is part of the version");
_Static_assert(offsetof(struct ring, stopped) == 272, "layout is part of the version");
_Static_assert(offsetof(struct ring, broken) == 276, "layout is part of the version");
_Static_assert(offsetof(struct ring, received) == 280, "layout is part of the version");
_Static_assert(offsetof(struct ring, move) == 288, "layout is part of the version");
_Static_assert(offsetof(struct ring, moved) == 344, "layout is part of the version");
_Static_assert(offsetof(struct ring, seen) == 352, "layout is part of the version");
_Static_assert(offsetof(struct ring, moves) == 360, "layout is part of the version");

/* One side's bells, as both sides use them. */
struct side {
        _Atomic uint32_t published; /* reserved: neither written nor read */
        uint32_t unused;
        /* w other side: it has these bells of ours and can ring them */
        _Atomic uint64_t known[BELL_WORDS];
        /* w other side (or), r this side (exchange): slots in which something happened, per bell */
        _Alignas(64) _Atomic uint64_t dirty[BELLS];
};

struct arena {
        uint64_t magic;
        uint32_t version;
        uint32_t size_of_ring;
        uint32_t remote; /* 1: side 1 is this host's relay; 0: both sides are processes */
        _Alignas(64) struct side sides[SIDES];
        /* w both: whether each side's bells have been rung and not looked at (rung.h) */
        _Alignas(64) _Atomic uint32_t rung[SIDES][BELLS];
};

_Static_assert(offsetof(struct arena, rung) == 4288, "layout is part of the version");
_Static_assert(sizeof(struct arena) <= (size_t)ARENA_PAGES * PAGE, "the arena's header fits its pages");
_Static_assert(SLOT_OFFSET + SLOTS * SIDES * PAGE <= BULK_OFFSET, "the slots end before the bulk area");

#endif
