/* The requests of a queue pair: from the send queue into records, and their completions.
 *
 * Requests become records in the order in which they were posted, as far as there is room, and
 * complete in that order:
 *
 *      SEND, WRITE     when the other side has executed the last record. In a local arena it has
 *                      when it has taken it, in a remote one it says so (DONE).
 *                      Once that is gone all that it had executed is complete (record.h), and the
 *                      rest fails.
 *                      Those of type UC when it is put, or when it is lost for want of another side,
 *                      or of a receive, for some time.
 *      READ, atomics   when all answers have come
 *      windows         when the requests before are complete; they were bound or made invalid when
 *                      it was their turn
 *
 * A request waits for its turn
 *      - if it needs a receive of the other side's, until that has posted one (CREDIT);
 *      - if it asks for an answer, until there is room for that and not too many are open;
 *      - with a fence, until what was asked for has come.
 *
 * All is called under `sending`.
 */
#ifndef FREEFLOW_REQUESTER_H
#define FREEFLOW_REQUESTER_H

#include "queue_pair.h"

/* Put what can be put, and publish it. */
void requester_push(struct queue_pair *queue);
/* Complete what is done. */
void requester_complete(struct queue_pair *queue, const struct cq *polled);
/* The other side's answer to a request, or a note of it. False: it breaks the rules. */
bool requester_answer(struct queue_pair *queue, struct record_receiver *receiver, const struct cq *polled);
/* The other side has ended, and all that it has published was taken. Its program may have seen what
 * an atomic operation has done: then its answer is in the ring, and is to be taken now. False:
 * there is none. */
bool requester_find_answer(struct queue_pair *queue);
/* Has the oldest request waited for too long? Called after all that came in has been executed. */
void requester_check_time(struct queue_pair *queue);

#endif
