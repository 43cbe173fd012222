/* Records: what the rings of a queue pair carry.
 *
 * A queue pair has one slot of an arena. What its program posts goes into one ring as requests, and
 * the process at the other side executes them in their order, in its own memory. Its answers to
 * requests of this side come in the same ring as its own requests, in between.
 *
 * A record is a header, `length` bytes of payload, and up to seven bytes that mean nothing, so that
 * each header is aligned. Fields that an operation has no use for are 0:
 */
/* clang-format off */
/*              flags          length     psn       immediate            rkey    total               address
 *      SEND    FIRST, LAST,   its piece  next      data, or the key     0       bytes of the        0
 *              IMMEDIATE or                        to invalidate,                message
 *              INVALIDATE,                         in the last piece
 *              SOLICITED
 *      WRITE   as SEND,       its piece  next      data, in the last    key     bytes of the        where the
 *              no INVALIDATE                       piece                         whole write         piece goes
 *      READ    none           0          next      0                    key     bytes to read,      from where
 *                                                                                one piece
 *      SWAP    none           16         next      0                    key     8                   of the word
 *      ADD     none           8          next      0                    key     8                   of the word
 *      DATAGRAM IMMEDIATE,    message    next      data                 Q_Key   0                   queue pairs: to,
 *              SOLICITED                                                                            from << 32
 *      RESPONSE none          what was   request's 0                    0       0                   0
 *                             asked for
 *      DONE    none           0          request's 0                    0       0                   0
 *      REFUSED none           0          request's enum record_refusal  0       0                   0
 *      CREDIT  none           0          0         code of the time     0       receives posted     0
 *                                                   to wait for more             since the beginning
 *      CLOSE   none           0          0         0                    0       0                   0
 *      ASK     none           0          0         0                    key     0                   0
 *      DIRECT  none           that of    0         0                    ASK's   0                   0
 *                              record_direct
 */
/* clang-format on */
/* The payload of SWAP is the value to compare with and the one to store, that of ADD the value to
 * add; the answer to each is the word as it was. Numbers are in the host's order, which is
 * little-endian on every host that FreeFlow runs on; immediate data is as the program gave it. ASK
 * and DIRECT are about memory that one side may use without records (direct.h).
 *
 * Requests are numbered: `psn` grows by one from 0 on. A message or a write longer than a piece is
 * cut. Between two pieces of it there is no other request, but there may be answers, CREDIT and
 * CLOSE.
 *
 * Nobody waits for both directions at once, because the room in a ring is shared out:
 *
 *      - A record takes a quarter of the ring at most: record_piece().
 *      - RESPONSEs use a quarter of it at most. The side that asks for them sees to that: it has no
 *        more requests open than that their RESPONSEs, with headers, fit there.
 *      - All other records are only put while three quarters are not exceeded by them and whatever
 *        else nobody has taken yet.
 *
 * So there is room for each RESPONSE that was asked for, and whoever takes all records in their
 * order never has to leave one for want of room for its answer; nor do RESPONSEs keep other records
 * out for ever. In a remote arena the relays report late what has been taken, but no later than
 * when half of the ring seems full: there a RESPONSE may have to wait until they do. Then its
 * request is left in the ring, not taken, until it fits.
 *
 * A request was executed when `head` has passed its record. What it does is not to be visible to
 * the program of its process before that is certain: the program may end the process as soon as it
 * sees the last thing for which it has waited, and the request has to complete at the other side
 * all the same. So `head` passes a message before its receive completes. A write can't be behind
 * `head` before all of it is written: `visible` passes it before its last bytes are. Answers to
 * requests before it are published by then. The answer to an atomic operation is in the ring before
 * its word changes, and is published behind that. If the process ends in between, the other side
 * publishes it in its place. Between hosts it can't: relays move only what is published.
 *
 * A process publishes whole records; relays publish bytes. Both sides may write anything at any
 * time. So each header is copied before it is checked, it is never read again, and positions are
 * checked as in ring.h. A side that breaks these rules ends this queue pair, and can do nothing
 * else.
 */
#ifndef FREEFLOW_RECORD_H
#define FREEFLOW_RECORD_H

#include "../library/cursor.h"
#include "../library/view.h"

enum record_operation {
        RECORD_SEND = 1,
        RECORD_WRITE = 2,
        RECORD_READ = 3,
        RECORD_SWAP = 4,
        RECORD_ADD = 5,
        RECORD_DATAGRAM = 6,
        RECORD_LAST_REQUEST = RECORD_DATAGRAM,
        RECORD_RESPONSE = 7,
        RECORD_DONE = 8,
        RECORD_REFUSED = 9,
        RECORD_CREDIT = 10,
        RECORD_CLOSE = 11,
        RECORD_ASK = 12,
        RECORD_DIRECT = 13,
        RECORD_OPERATIONS,
};

enum record_flag {
        RECORD_FIRST = 1,
        RECORD_LAST = 2,
        RECORD_IMMEDIATE = 4,
        RECORD_INVALIDATE = 8,
        RECORD_SOLICITED = 16,
};

/* Why a request was not executed. The queue pair at each side is in an error state afterwards. */
enum record_refusal {
        REFUSED_ACCESS = 1,    /* the key doesn't allow it: remote access error */
        REFUSED_REQUEST = 2,   /* too long for the receive, or not aligned: remote invalid request error */
        REFUSED_OPERATION = 3, /* the responder failed: remote operation error */
        REFUSALS,
};

enum {
        RECORD_PIECE = 64 * 1024,            /* bytes of a payload, at most */
        RECORD_MESSAGE = 1024 * 1024 * 1024, /* bytes of a message or a write, at most */
        RECORD_DATAGRAM_BYTES = 4096 + 32,   /* a message, and GIDs in front of it */
        RECORD_TIMES = 32,                   /* codes of CREDIT: values of min_rnr_timer */
};

struct record {
        uint32_t length;
        uint8_t operation;
        uint8_t flags;
        uint16_t zero;
        uint32_t psn;
        uint32_t immediate;
        uint32_t rkey;
        uint32_t total;
        uint64_t address;
};

_Static_assert(sizeof(struct record) == 32, "headers are aligned in the ring, and have no padding");

/* The payload of DIRECT: what of a key's memory is in which file. */
struct record_direct {
        uint64_t memory; /* the router's number; 0: none of it is in a file */
        uint64_t token;  /* to be shown to the router */
        uint64_t base;   /* the key's address of the first byte */
        uint64_t length;
        uint64_t offset; /* in the file */
        uint32_t access; /* enum key_access */
        uint32_t later;  /* 1: some may be soon, when it is asked for again */
};

/* The sender's part of a ring, in private memory. */
struct record_sender {
        struct view view;
        uint64_t tail; /* up to here records were put; published up to `published` */
        uint64_t published;
        uint64_t base;
        uint32_t psn; /* of the next request */
        bool waits;   /* the relay tells of all room that it hears of */
};

/* The receiver's part of a ring, in private memory. */
struct record_receiver {
        struct view view;
        uint64_t head;
        uint64_t address; /* WRITE: where the next piece goes */
        uint32_t psn;     /* of the next request */
        uint32_t missing; /* bytes of pieces that are still to come */
        uint32_t total;
        uint32_t rkey;
        uint32_t taken;  /* bytes of the payload of `now` */
        uint8_t pending; /* the operation whose pieces are coming; 0: none */
        bool held;       /* `now` is the record at `head` */
        struct record now;
};

enum record_outcome {
        RECORD_OK,
        RECORD_WAIT,    /* no room, or no whole record */
        RECORD_CORRUPT, /* the other side has broken the rules */
};

/* Bytes of a payload in this ring, at most. */
static inline uint32_t record_piece(const struct view *view)
{
        uint64_t piece = view_size(view) / 4 - sizeof(struct record);

        return piece < RECORD_PIECE ? (uint32_t)piece : RECORD_PIECE;
}

/* Bytes of a ring that a record with this much payload takes. */
static inline uint64_t record_size(uint32_t length)
{
        return sizeof(struct record) + ((uint64_t)length + 7) / 8 * 8;
}

/* Bytes of a ring that RESPONSEs may take, which the side that asks for them keeps to. */
static inline uint64_t record_response_share(const struct view *view)
{
        return view_size(view) / 4;
}

static inline bool record_is_request(const struct record *record)
{
        return record->operation && record->operation <= RECORD_LAST_REQUEST;
}

/* Are the header's fields those of its operation, with at most `piece` bytes of payload? */
bool record_is_valid(const struct record *record, uint32_t piece);

/* A slot that the router has prepared: both sides begin at position 0. */
void record_send_from(struct record_sender *sender, struct view view);
void record_receive_from(struct record_receiver *receiver, struct view view);

/* Put a record behind those before. `record` is valid but for its psn, which is set if it is a
 * request. Its payload comes from `payload`, which is moved. Not published yet. */
enum record_outcome record_put(struct record_sender *sender, struct record *record, struct cursor *payload);
/* Make what was put readable. The caller then wakes receivers. False: nothing was put. */
bool record_publish(struct record_sender *sender);
/* Has the other side executed all below this position of `tail`? In a remote arena it may have, and
 * the relays have not said so yet. */
enum record_outcome record_taken(const struct record_sender *sender, uint64_t tail);
/* The other side executes no more. May its program have seen what it executed below this position?
 */
bool record_was_visible(const struct record_sender *sender, uint64_t tail);

/* The next record: `receiver->now`. The same again until record_done(). */
enum record_outcome record_next(struct record_receiver *receiver);
/* Copy the next bytes of the payload of `now`: no more than are left of it. */
void record_take(struct record_receiver *receiver, struct cursor *to, uint32_t size);
/* Go on behind `now`, for a copy of a receiver: what the other side knows is not changed. */
void record_skip(struct record_receiver *receiver);
/* In place of the other side, which has ended: publish an answer that it has put. False: there is
 * none with this number and length. */
bool record_publish_answer(const struct view *view, uint32_t psn, uint32_t length);
/* What `now` does is about to be visible to the program. */
void record_show(struct record_receiver *receiver);
/* `now` was executed: its room is free. The caller then wakes senders. */
void record_done(struct record_receiver *receiver);

#endif
