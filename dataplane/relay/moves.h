/* Moves: bytes of a process's registered memory that the device writes into registered memory of
 * the peer's process, and that no processor copies.
 *
 * Only queue pairs have moves, if both routers have allowed them (RELAY_MOVING_QUEUE_PAIR) and both
 * processes' libraries know them. The process requests one move at a time in its ring's header
 * (library/layout.h), from a file of its own into a file of the peer's, whose number and token the
 * peer's process has told it.
 *
 *      this relay                        the peer's relay
 *      REACH file, token             ->  is it a file of the process at that end, with this token?
 *                                    <-  REACHED file, address, key, size; or size 0: no
 *      bytes, in any number of batches
 *      MOVED file, number            ->
 *                                    <-  SEEN file, number, what the file's header said just now
 *
 * What the header says is the memory's key as long as its owner has not given the file up. So the
 * process knows by SEEN that the owner has all bytes: whatever is written before the header is read
 * is there when the owner takes the memory back.
 *
 * When the router gives up a file:
 *
 *                                    <-  REVOKE file
 *      REVOKED file                  ->  nothing is written there any more: it is deregistered
 *
 * REVOKED also comes unasked, of a file that this relay has no use for. Nothing of all that
 * outlives the channel: when the link is lost, the move ends with MOVE_AGAIN, and both relays
 * forget what they reach and have granted. A peer that does not answer REVOKE loses the link.
 *
 * A peer's relay can write into the files that it was granted, behind their headers, as long as a
 * connection is there on which it was. It never knows the address or key of another one.
 */
#ifndef FREEFLOW_RELAY_MOVES_H
#define FREEFLOW_RELAY_MOVES_H

#include "lent_files.h"
#include "mirror.h"

extern const struct mirror_moves moves_of_mirrors;

/* The peer's process knows moves. */
void moves_allow(struct mirror *m);

/* Looks whether the process has requested one. */
void moves_scan(struct mirror *m);
/* Fills in a block that is due about moves. False: there is none. */
bool moves_say(struct mirror *m, struct wire_block *block);
/* Adds bytes of the move that is under way to a batch. */
void moves_write(struct mirror *m, uint64_t batch);
/* A block with one flag of WIRE_OF_MOVES has come. */
void moves_receive(struct mirror *m, const struct wire_block *block);
/* Batches are complete. */
void moves_completed(struct link *link);
/* The router gives a file up. */
void moves_revoke(struct lent_file *file);
/* When the link's oldest REVOKE was sent that is not answered; 0: there is none. */
uint64_t moves_revoked_at(const struct link *link);

#endif
