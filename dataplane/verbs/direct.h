/* Direct memory: READ, WRITE and atomic operations as copies into memory of the other side that
 * this process has mapped, instead of records that the other side executes.
 *
 * After its first operation by a key a queue pair also asks for the key (ASK). The other side has
 * allowed that operation, and says which part of which file has the key's memory (DIRECT;
 * extents.h); it says nothing of any other key. The router gives the file to whoever shows what the
 * other side has said. From then on operations that lie wholly in that part are copies, as long as
 *
 *      - the file's header has the key: its owner has not given it up,
 *      - all that this queue pair has put into its ring is executed, and nothing has come from the
 *        other side that was not looked at. So all is executed in the order of the send queue, and
 *        nothing by a queue pair that has failed or that the other side has left.
 *
 * The last bytes are written last: who watches the last byte of a WRITE sees all of it.
 *
 * The owner may take the memory away while this process stands still in the middle of a copy. Then
 * the operation goes as a record, from its beginning. An atomic one fails instead: nobody knows
 * whether it was executed, and it must not be twice.
 *
 * It is an optimisation: whatever can't be copied goes as a record. Between hosts the relays'
 * device may write instead of this process: far_memory.h.
 */
#ifndef FREEFLOW_DIRECT_H
#define FREEFLOW_DIRECT_H

#include "queue_pair.h"

/* Who gets files of other processes: pair.h, or a test. */
struct direct_reacher {
        /* Under `sending`: ask for a file; direct_reached() follows, or not. */
        void (*ask)(struct queue_pair *queue, const struct record_direct *direct);
};

extern const struct direct_reacher *direct_reacher; /* NULL: no memory is direct */

/* Under `sending`: execute the request, which has not begun, or have it fail. False: it has to go
 * as a record. */
bool direct_try(struct queue_pair *queue, struct send_work *work);
/* The queue pair ends, or allows less than before: the other side uses none of the memory any more
 * that it was told of. Under no mutex. */
void direct_withdraw(struct queue_pair *queue);
/* Under `sending`: the request that had to go as a record has begun. */
void direct_begun(struct queue_pair *queue);
void direct_remember(struct queue_pair *queue, uint32_t key);
/* Under `receiving`: the other side was allowed to do something by this key. */
static inline void direct_allowed(struct queue_pair *queue, uint32_t key)
{
        if (queue->used_keys[0] != key)
                direct_remember(queue, key);
}

/* Under both: the note ASK or DIRECT has come. False: the other side breaks the rules. */
bool direct_take(struct queue_pair *queue, struct record_receiver *receiver);
/* The file is there. `writable`: it may be written. */
void direct_reached(struct queue_pair *queue, uint64_t memory, int memfd, bool writable);
/* There is another router: what the one before was asked for does not come. */
void direct_ask_again(struct queue_pair *queue);
/* The router does not give what was asked for last. */
void direct_missed(struct queue_pair *queue);

#endif
