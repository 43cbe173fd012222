/* From the ring back to TCP, and the reset of a connection that can't go back.
 *
 * The sender writes `end` into the ring and goes on over TCP; the receiver reads the ring up to
 * there. The sender does so when the other side requests it (`stop`), when the program does
 * something that rings can't carry, or when the kernel says that the peer has closed its side, so
 * that errors and signals are the kernel's own.
 */
#ifndef FREEFLOW_FALLBACK_H
#define FREEFLOW_FALLBACK_H

#include "mapping.h"

/* Fall back to TCP, both ways, for good. Bytes that are left in the ring are still ours to read. An
 * end that isn't attached is tracked no more. */
void fall_back(int fd, struct end *end, uint64_t key, uint32_t reason);
/* The same under both locks, for an attached end. True: nothing comes through the ring any more,
 * and nothing is in it. */
bool fallback_both(int fd, struct end *end, uint32_t reason);
/* After it: can nothing more come into the ring, though the sender may not have said so yet? */
bool fallback_sender_stopped(struct end *end);
/* Bytes in the ring, which only we can read; RING_CORRUPT. */
int64_t fallback_left(struct end *end);
/* Request the fallback of the peers of all connections that are to be handed over, before each is
 * waited for. */
void fallback_announce(struct end *end);

/* The rest under the sender's lock. Must the peer be told that nothing more comes in the ring? A
 * remote one waits for that even if nothing ever came. */
bool fallback_may_end_ring(struct end *end);
/* Before the ring ends: reset the connection if bytes bypassed it and nobody knows where they
 * belong. */
void fallback_check_order(int fd, struct end *end);
/* Nothing more comes in the ring. */
void fallback_end_ring(struct end *end);
/* What goes over TCP now may arrive before the relays have brought `start`: the receiver would take
 * it for what comes before the ring. So a sender that falls back that early waits for them. False:
 * they don't bring it. */
bool fallback_await_start(struct end *end);
/* The ring ends, because bytes go over TCP again: for good, unless the peer asked for it. */
void fallback_sender(int fd, struct end *end, uint32_t reason);
/* For tests: is the sender to fall back just now? Then the peer's is asked to, too. */
bool fallback_at_random(struct end *end);
/* Bytes have bypassed the ring. If they come after all that is in it, it ends and the connection is
 * TCP again; else the connection is reset. */
void fallback_bypassed(int fd, struct end *end);
/* Bytes have bypassed the ring: the peer is to fall back too, and the router gets the reason. */
void fallback_report_bypass(struct end *end);

/* Under the receiver's lock, the ring being empty: there are bytes on TCP that no `end` announced.
 * Returns as receive_now(); -EBADE: nobody knows where they belong, the connection was reset. */
long fallback_unannounced(int fd, struct end *end);

/* The other side wrote invalid words: the connection ends as by a reset. */
void reset_corrupt(int fd, struct end *end);
/* The path through the relays is lost, and the connection with it. Under a flow's lock; a sender
 * leaves to its readers what has come before. */
void reset_broken(int fd, struct end *end, bool receiver);

#endif
