/* Queue pairs of type UD (IBV_QPT_UD): datagrams from their send queues into the rings of peers,
 * and from those into receives.
 *
 * A datagram is lost if there is no such queue pair, or if that has another Q_Key or too small a
 * receive. A datagram for which there is no receive stays in its ring for a moment. If none is
 * posted by then, datagrams for that queue pair are lost at once until one is.
 *
 * In front of each message a receive gets a header (struct ibv_grh) with the GIDs of both sides.
 *
 * Mutexes, in this order: `receiving` of a peer, that of a list here, those of queue pairs.
 */
#ifndef FREEFLOW_DATAGRAMS_H
#define FREEFLOW_DATAGRAMS_H

#include "datagram_peers.h"
#include "queue_pair.h"

/* The queue pair is made, or about to be destroyed. */
void datagrams_join(struct queue_pair *queue);
void datagrams_leave(struct queue_pair *queue);
/* Before that: wait for a moment until what the program has posted is put. A device would have sent
 * it long since, and there are programs that don't wait for that. */
void datagrams_finish(struct queue_pair *queue);

/* Under `sending`: put what can be put. `awaits`: the bell rings once there is room for more. */
void datagrams_push(struct queue_pair *queue, bool awaits);
/* Put what can be put. As progress_make(). */
void datagrams_make(struct queue_pair *queue, const struct cq *polled, bool wait);
/* Take what has come for any queue pair. `wait`: of all peers, as progress_make(). A program that
 * polls takes what has come of those that were heard lately, and of some of the others in turn: so
 * a poll does not take longer the more peers there are. True: there was something. */
bool datagrams_take(const struct cq *polled, bool wait);
/* Take what the process has sent itself. */
void datagrams_take_own(void);
/* Does something that has come wait for a receive? */
bool datagrams_are_held(void);
/* Does a thread at the other side of one of them poll on this core, as far as is known? Each side
 * says so in the ring that comes in: 1 + the core's number. */
bool datagrams_meet(uint32_t core);

/* As progress_arm(), for all peers. */
bool datagrams_arm(void);
/* The same for one, and as progress_disarm(). */
bool datagrams_arm_one(struct datagram_peer *peer);
void datagrams_disarm_one(struct datagram_peer *peer);
/* The bell has rung for this peer: take what has come of it. */
bool datagrams_take_from(struct datagram_peer *peer);
/* An arena has this bell. */
void datagrams_set_bell(uint32_t arena, int bell);
/* Peers whose rings say that they are over end. */
void datagrams_check(void);
void datagrams_check_one(struct datagram_peer *peer);
/* Take all that the peer has sent, and use its rings no more: their place is the caller's. False:
 * it has ended before. `returned`: the other process has not used the slot. */
bool datagrams_end(struct datagram_peer *peer, uint32_t number, bool returned, struct place *place);
/* In a child of fork(): there are none. */
void datagrams_forget(void);

static inline bool queue_has_datagrams(const struct queue_pair *queue)
{
        return queue->plain.qp_base.qp_type == IBV_QPT_UD;
}

#endif
