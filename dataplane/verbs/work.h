/* Work requests that a program has posted: the send and the receive queue of a queue pair.
 *
 * Requests and their lists of memory are copied, and so is inline data: the program may reuse its
 * structures at once. Of memory that they name only keys and addresses are kept. The keys are held
 * while bytes are copied, piece by piece.
 */
#ifndef FREEFLOW_WORK_H
#define FREEFLOW_WORK_H

#include "ah.h"
#include "memory.h"
#include "mutex.h"
#include "port.h"

#include <sys/uio.h>

enum { WORD = 8 /* bytes of an atomic operation */ };

/* A list of memory, and what its keys have to allow. */
struct work_memory {
        const struct ibv_sge *pieces;
        uint32_t count;
        uint32_t domain;
        uint32_t access;              /* enum key_access */
        const unsigned char *inlined; /* the bytes themselves, instead of pieces */
};

/* A place in such a list. */
struct work_spot {
        uint32_t piece;
        uint32_t offset;
};

/* Part of such a list, whose keys are held. */
struct work_held {
        struct iovec vec[MOST_PIECES + 1];
        uint32_t keys[MOST_PIECES];
        uint32_t count; /* of keys */
};

/* Hold `size` bytes from a place on, which moves behind them. False: a key does not allow that. No
 * more than are in the list; work_let_go() follows. */
bool work_hold(const struct work_memory *memory, struct work_spot *spot, uint32_t size,
               struct work_held *held);
void work_let_go(struct work_held *held);
/* Do the keys allow the use of the whole list? */
bool work_is_allowed(const struct work_memory *memory);

/* --- send queues */

struct send_work {
        uint64_t id;
        union {
                struct {
                        uint64_t address;
                        uint64_t operands[2]; /* to compare with or to add; to store */
                };
                struct {
                        union ibv_gid from, to; /* UD */
                        uint32_t number;        /* of the queue pair there */
                };
                struct {
                        struct ibv_mw *window;
                        struct ibv_mw_bind_info bind;
                };
        };
        uint64_t behind;       /* the position behind its last record */
        struct work_spot spot; /* of the next byte to put, or of the next one to come */
        uint32_t rkey;         /* UD: the Q_Key */
        uint32_t immediate;    /* or the key to make invalid */
        uint32_t total;        /* bytes */
        uint32_t put;          /* bytes that records were put for */
        uint32_t got;          /* READ: bytes that have come */
        uint32_t psn;          /* of the last record that was put */
        uint32_t expected;     /* READ and atomics: the number that the next answer has */
        uint32_t count;        /* pieces of memory */
        uint8_t opcode;        /* enum ibv_wr_opcode */
        uint8_t flags;         /* enum ibv_send_flags */
        uint8_t status;        /* enum ibv_wc_status, with which it completes */
        bool begun;            /* a record was put */
        bool whole;            /* the last one was */
        bool answered;         /* all that it asked for has come */
        bool direct;           /* it was executed without a record */
        bool recorded;         /* it has to go as records: far_memory.h */
};

/* Indices grow without end: head <= answered <= next <= tail. */
struct send_queue {
        struct send_work *works;
        struct ibv_sge *pieces;
        unsigned char *inlined;
        uint32_t mask;
        uint32_t most; /* requests */
        uint32_t most_pieces, most_inline;
        uint32_t head;    /* the oldest that has not completed */
        uint32_t reading; /* none before it awaits an answer */
        uint32_t next;    /* the oldest of which records are still to be put */
        uint32_t tail;
};

/* False: no memory. `most` and the others are what the program asks for, within the limits. */
bool send_queue_start(struct send_queue *queue, uint32_t most, uint32_t pieces, uint32_t inlined);
void send_queue_end(struct send_queue *queue);
/* Copy a request, whose operation and flags the caller has checked. `datagram`: it has an address.
 * Returns 0, ENOMEM if the queue is full, or EINVAL. */
int send_queue_add(struct send_queue *queue, const struct ibv_send_wr *wr, bool datagram);
/* The memory of a request: to read from, or, where an answer goes, to write to. */
struct work_memory send_memory(const struct send_queue *queue, const struct send_work *work, uint32_t domain);

static inline struct send_work *send_at(const struct send_queue *queue, uint32_t index)
{
        return &queue->works[index & queue->mask];
}

/* READ and the atomics: the other side answers, with bytes. */
static inline bool send_is_asking(const struct send_work *work)
{
        return work->opcode == IBV_WR_RDMA_READ || work->opcode == IBV_WR_ATOMIC_CMP_AND_SWP ||
               work->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
}

/* Does the other side need a receive for it? */
static inline bool send_takes_receive(const struct send_work *work)
{
        return work->opcode == IBV_WR_SEND || work->opcode == IBV_WR_SEND_WITH_IMM ||
               work->opcode == IBV_WR_SEND_WITH_INV || work->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
}

/* This side does it alone. */
static inline bool send_is_local(const struct send_work *work)
{
        return work->opcode == IBV_WR_LOCAL_INV || work->opcode == IBV_WR_BIND_MW;
}

/* --- receive queues */

/* A receive, with its list. */
struct receive_work {
        uint64_t id;
        uint64_t room; /* bytes */
        uint32_t count;
        struct ibv_sge pieces[MOST_PIECES];
};

/* A receive as it is kept. */
struct receive_slot {
        uint64_t id;
        uint32_t count;
};

struct receive_queue {
        struct mutex mutex;
        struct receive_slot *slots;
        struct ibv_sge *pieces;
        uint32_t mask;
        uint32_t most;
        uint32_t most_pieces;
        _Atomic uint32_t head, tail; /* only written under the mutex */
};

static inline uint32_t receives_in(const struct receive_queue *queue)
{
        return atomic_load_explicit(&queue->tail, memory_order_relaxed) -
               atomic_load_explicit(&queue->head, memory_order_relaxed);
}

bool receive_queue_start(struct receive_queue *queue, uint32_t most, uint32_t pieces);
void receive_queue_end(struct receive_queue *queue);
/* Copy a receive. Returns 0, ENOMEM if the queue is full, or EINVAL. */
int receive_queue_add(struct receive_queue *queue, const struct ibv_recv_wr *wr);
/* Take the oldest one. False: there is none. */
bool receive_queue_take(struct receive_queue *queue, struct receive_work *work);
/* Change how many there is room for, keeping those that are there. Returns 0, EINVAL if more are
 * there, or ENOMEM. */
int receive_queue_resize(struct receive_queue *queue, uint32_t most);
/* Forget all. */
void receive_queue_clear(struct receive_queue *queue);

#endif
