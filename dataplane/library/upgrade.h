/* From TCP to the ring and back: when, and at which byte.
 *
 * Before: both directions count what goes over TCP. An end asks the router once the rule is met (settings.h).
 * When it has a slot, its counters are compared with the kernel's: a difference means that bytes went past
 * the library (io_uring, raw system calls, the C library's streams), and the connection stays on TCP.
 *
 * A receiver then sets `ready`, at a moment when no call that couldn't see the ring waits in the kernel. A
 * sender that sees it writes down its position as `start`, at a moment when no send is in the kernel, and
 * goes on in the ring. The receiver takes bytes from TCP up to `start`, never more than were queued before it
 * last found `start` unset, and then from the ring. So it doesn't matter who attaches first, and whether the
 * other one ever does.
 *
 * Back: the sender writes `end` and goes on over TCP. It does so when the other side asks (`leave`), or when
 * the kernel says that the peer has closed its side, so that errors and signals are the kernel's own.
 */
#ifndef FREEFLOW_UPGRADE_H
#define FREEFLOW_UPGRADE_H

#include "family.h"

struct view;

/* Once per call on a connection that isn't attached yet: count, ask, look for the answer. Returns false if
 * the connection isn't ours to look at any more. */
bool attach_step(int fd, struct end *end, uint64_t key, uint64_t bytes);
struct timeval;
/* Of a socket option, in ms; 0: none. */
uint32_t attach_timeout(const struct timeval *time);
/* Under the receiver's lock: become ready if that can be now. Not while several processes have the
 * connection: those who wait in the kernel in another one can't be told. */
void upgrade_receiver(struct end *end);
/* Under the sender's lock: go to the ring if that can be now. */
void upgrade_sender(int fd, struct end *end);
/* Under the sender's lock: has the peer to be told that nothing more comes in the ring? A remote one waits
 * for that even if nothing ever came. */
bool fallback_may_end_ring(struct end *end);
/* Under the sender's lock, before the ring ends: reset the connection if bytes went past us and nobody knows
 * where they belong. */
void fallback_check_order(int fd, struct end *end);
/* Under the sender's lock: nothing more comes in the ring. */
void fallback_end_ring(struct end *end);
/* The same, because bytes go over TCP again. */
void fallback_sender(int fd, struct end *end, uint32_t reason);
/* Under the sender's lock: before the first byte is published. */
void upgrade_start(struct end *end, const struct view *view);
/* Leave the ring, both ways. Bytes that are left in it are still ours to read. */
void fall_back(int fd, struct end *end, uint64_t key, uint32_t reason);
/* After it: can nothing more come into the ring, though the sender may not have said so yet? */
bool fallback_sender_stopped(struct end *end);
/* The same for a descriptor that somebody reads who knows nothing of the ring: what is left there he gets too
 * (pump.h). */
void hand_over(int fd, struct end *end, uint64_t key, uint32_t reason);
/* One that isn't attached stays on TCP: somebody got it whom we don't see. Each process of the family stops
 * looking at it at its next call. */
void stage_refuse(struct end *end, uint64_t key, uint32_t reason);
/* Is the descriptor, of this process or of a child in its memory, one of this attached end? The kernel is
 * asked. */
bool end_is_behind(int fd, const struct end *end);
/* From now on `program`, which this takes over, is what the program reads and writes: pump.h. */
void hand_over_to(int fd, struct end *end, uint64_t key, int program, uint32_t reason);
/* When the program ends: what it still sends goes over TCP, and comes after what is in the ring. */
void close_at_exit(int fd, struct end *end, uint64_t key);
/* Before the last close: the ring ends, and unread bytes make it a reset, as they do in TCP. */
void close_ring(int fd, struct end *end, uint64_t key);
/* Under the sender's lock: bytes went past the library. If they come after all that is in the ring, it ends
 * and the connection is TCP again; else it is reset. */
void fallback_bypassed(int fd, struct end *end);
/* Under the receiver's lock, the ring being empty: there are bytes on TCP that no `end` announced. As
 * receive_now(); -EBADE: nobody knows where they belong, the connection was reset. */
long fallback_unannounced(int fd, struct end *end);
/* The other side wrote nonsense: the connection ends as by a reset. */
void reset_corrupt(int fd, struct end *end);
/* The path through the relays is lost: so does this one. Under a flow's lock; a sender leaves to its readers
 * what has come before. */
void reset_broken(int fd, struct end *end, bool receiver);
/* Ask the peers of all connections that are to be handed over to leave their rings, before each is waited
 * for. */
void fallback_announce(struct end *end);

#endif
