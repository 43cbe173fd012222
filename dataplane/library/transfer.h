/* One call that moves bytes: what the program asked for, how far the call has come, and how it goes
 * on where there is no ring.
 *
 * A call is a row of steps. A step takes the flow's lock, does what can be done now without
 * waiting, and says how the call goes on (enum outcome); the caller releases the lock, waits if
 * need be, and takes the next step. send.c and receive.c have the steps.
 */
#ifndef FREEFLOW_TRANSFER_H
#define FREEFLOW_TRANSFER_H

#include "real.h"
#include "ring.h"

enum call {
        CALL_READ,
        CALL_READV,
        CALL_RECV,
        CALL_RECVFROM,
        CALL_RECVMSG,
        CALL_WRITE,
        CALL_WRITEV,
        CALL_SEND,
        CALL_SENDTO,
        CALL_SENDMSG,
        CALL_SENDFILE,   /* `other` is a file, `offset` where */
        CALL_SPLICE_IN,  /* from the pipe `other` into the socket */
        CALL_SPLICE_OUT, /* from the socket into the pipe `other` */
};

/* What the program asked for. */
struct operation {
        enum call call;
        int fd;
        int flags;
        const struct iovec *vec;
        int count;
        union {
                struct iovec one; /* what `vec` is for calls with one buffer */
                /* Of a file that has to be waited for: bytes that were read without a lock. */
                struct {
                        unsigned char *ahead;
                        size_t ahead_size;
                };
        };
        union {
                struct msghdr *message;
                off_t ahead_at; /* where those bytes were */
        };
        struct sockaddr *address;
        socklen_t *address_size;
        socklen_t size_of_address;
        int other;
        bool by_kernel;  /* a ring can't carry it: the connection falls back to TCP first */
        bool refused;    /* the kernel has refused it */
        bool file_waits; /* its file system can't read without waiting */
        off_t *offset;
        size_t size; /* of all buffers, or to move */
};

/* One call, from its first step to its last. */
struct transfer {
        struct operation *o;
        struct end *end;
        uint64_t key;
        struct flow *flow;
        struct cursor cursor;
        size_t done;
        /* Of the last step: */
        uint32_t phase;   /* in which the step found the flow */
        struct view view; /* its ring */
        long moved;       /* bytes, 0, or -errno */
        /* For the next: */
        bool event;        /* TCP may have something: the kernel is to be asked */
        uint64_t deadline; /* of the socket's time-out, see wait_for() */
};

/* How a call goes on after a step. */
enum outcome {
        OUTCOME_RING,    /* not a step's: in the ring */
        OUTCOME_MOVED,   /* bytes were moved */
        OUTCOME_NOT_NOW, /* `moved` says why none were */
        OUTCOME_AGAIN,   /* take the next step at once */
        OUTCOME_TCP,     /* by the kernel; then transfer_leave_kernel() */
        OUTCOME_OVER,    /* the same, as the ring has ended */
        OUTCOME_GONE,    /* by the kernel: the end is no longer this connection's */
        OUTCOME_LOST,    /* the descriptor is no longer this connection's: transfer_find() */
        /* A sender's: */
        OUTCOME_FALL_BACK, /* the peer requests it, or has closed */
        OUTCOME_BYPASSED,  /* bytes have bypassed the ring (raw.h) */
        OUTCOME_BROKEN,    /* the path through the relays is lost */
        OUTCOME_CORRUPT,   /* the other side wrote invalid words */
};

/* Bytes after which the other side may begin. */
enum { PIECE = 128 * 1024 };
/* Buffers of a call that is shortened. */
enum { VECTORS = 16 };
/* What a pipe that says POLLOUT takes without blocking. */
enum { PIPE_PAGE = 4096 };

ssize_t operation_native(const struct operation *operation);
bool operation_is_splice(const struct operation *operation);

/* Under the sender's or the receiver's lock, in PHASE_TCP: the phase of a call that begins now,
 * which may be the one at which bytes go to the ring. */
uint32_t transfer_move(struct transfer *t, enum taken taken);
/* The rest of a call goes over TCP, up to `most` bytes of all: all of it, or what is left after a
 * ring has ended. Another thread may have moved the end out of its slot between two steps, so a
 * call that began in the ring may find it on TCP as before any ring. To the program it is one call:
 * an error after the first byte is only returned by the next one. */
ssize_t transfer_rest(struct transfer *t, size_t most, bool sending);
/* After OUTCOME_OVER, if the call has moved nothing: may the end leave its slot now? True: the call
 * isn't in the kernel any more, and takes its next step. */
bool transfer_reenters(struct transfer *t);
/* After OUTCOME_LOST: is the descriptor another end's now, and has the call moved nothing? Then it
 * begins again there. False: transfer_native(). */
bool transfer_find(struct transfer *t);
/* May this call wait for its socket? */
bool transfer_may_wait(const struct transfer *t);

/* Buffers of the call from the cursor on, `size` bytes at most. Returns their number. */
int transfer_buffers(const struct operation *o, const struct cursor *cursor, size_t size, struct iovec *vec);
void cursor_skip(struct cursor *cursor, size_t size);
/* Read from, or write to, a pipe without waiting, because other threads wait for our lock. -EAGAIN:
 * not now.
 */
long pipe_now(long call, int fd, short events, void *place, size_t size);
/* Wait for the pipe of a splice, whatever the socket's mode is. Returns 0 or -errno. */
long pipe_await(const struct operation *o, short events);

/* The first part of each step, under the lock: OUTCOME_RING, _TCP, _OVER or _GONE. */
static inline enum outcome transfer_enter(struct transfer *t, enum taken taken)
{
        if (!end_is(t->end, t->key))
                return OUTCOME_GONE;
        t->phase = load_relaxed(&t->flow->phase);
        if (__builtin_expect(t->phase == PHASE_TCP, 0))
                t->phase = transfer_move(t, taken);
        if (t->phase == PHASE_TCP) {
                /* Before the lock is released: nobody may move the flow while the call is in the
                 * kernel. */
                atomic_fetch_add_explicit(&t->flow->kernel, 1, memory_order_relaxed);
                return OUTCOME_TCP;
        }
        if (t->phase == PHASE_OVER) {
                /* Nor may anybody read the kernel's counters (reentry.h). */
                atomic_fetch_add_explicit(&t->flow->kernel, 1, memory_order_relaxed);
                return OUTCOME_OVER;
        }
        return OUTCOME_RING;
}

/* A call that transfer_enter() sent to the kernel has returned. Who sees the counter at zero sees
 * what the call has moved. */
static inline void transfer_leave_kernel(struct transfer *t)
{
        atomic_fetch_sub_explicit(&t->flow->kernel, 1, memory_order_release);
}

/* The call returns `with`. False: for functions that say whether it goes on. */
static inline bool transfer_ends(ssize_t *answer, ssize_t with)
{
        *answer = with;
        return false;
}

/* What the C library returns: bytes moved so far, or the error. */
static inline ssize_t transfer_result(const struct transfer *t, long error)
{
        return t->done ? (ssize_t)t->done : result(error);
}

/* What the C library returns of a call that is the kernel's alone, unless it has moved bytes
 * already. */
static inline ssize_t transfer_native(const struct transfer *t)
{
        return t->done ? (ssize_t)t->done : operation_native(t->o);
}

#endif
