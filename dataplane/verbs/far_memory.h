/* Direct memory of another host: WRITEs that the relays' device carries out between registered
 * memory of both processes, instead of records that are copied into a ring and out of it.
 *
 * A queue pair learns of the other side's memory as within a host (direct.h), and requests one move
 * at a time of its relay (library/layout.h). It does so for large WRITEs, from memory that is an
 * extent of this process, when all is executed that it has put into its ring. Nothing behind a move
 * is put before that is over, so the order is that of the send queue.
 *
 * When a move is over, the relay says what the header of the other side's file said after the last
 * byte had arrived. If that is the key, the owner had not given the memory up by then, and so has
 * all bytes. Otherwise the WRITE goes as records, from its beginning.
 */
#ifndef FREEFLOW_FAR_MEMORY_H
#define FREEFLOW_FAR_MEMORY_H

#include "queue_pair.h"

enum { FAR_LEAST = 64 * 1024 /* bytes of a WRITE */ };

/* Under `sending`: may moves be requested, and does the other side know of it? */
bool far_may(const struct queue_pair *queue);
/* Under `sending`: the other side has told where a key's memory is. */
bool far_learn(struct queue_pair *queue, uint32_t key, const struct record_direct *direct);
/* Under `sending`, of a request that has not begun. RECORD_WAIT: a move of it is under way, or has
 * to wait. RECORD_OK: it is executed, or has to go as records: `work->whole` says which. */
enum record_outcome far_move(struct queue_pair *queue, struct send_work *work);

#endif
