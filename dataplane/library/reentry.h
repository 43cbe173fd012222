/* From TCP to the ring once more: an end that has fallen back leaves its slot, is counted again,
 * and requests again when the rule is met again.
 *
 * Without it a long connection would stay on TCP for the rest of its life after a router's restart,
 * a lost link, or a moment at which its path wasn't worth it.
 *
 * - Only an end that can come back does: not one whose program has done what rings can't carry,
 *   which was passed on, shared, bypassed or corrupted. `final` says so. It is set by whoever falls
 *   back for such a reason, at whichever time, so one that follows a harmless one counts too.
 * - Both directions have ended: the ring that we sent into, and the one that we received from, of
 *   which all bytes have been read. One direction alone waits for the other.
 * - Each end does so at its own time, or never (an older library, a reason of its own that holds
 *   for good). Its request then waits at the router like that of any connection whose peer has sent
 *   none. The router matches requests only, and an end has released its slot before it requests.
 * - Positions are those of the TCP connection: all bytes that went over TCP since it began, after a
 *   ring as before it, and none that went through a ring. So both ends agree about `start`, and the
 *   kernel's counters tell whether bytes have bypassed the library: they are compared before the
 *   end leaves its slot, if no call is in the kernel then, and again when it has another one
 *   (attach.h).
 * - Calls that go over TCP after a ring are counted in `kernel` as those before it, poll() and
 *   select() included. One that is still in the kernel when the end leaves its slot counts its
 *   bytes when it returns, and until then no receiver gets ready and no sender begins (upgrade.h).
 *   So a thread that sleeps in the kernel all the time is no obstacle.
 * - A thread that sleeps with a bell of the old slot would not hear the new one. It is counted in
 *   `waits`, and the end stays in the slot until it has woken. Of a thread that is between two
 *   steps of a call nothing needs to be known: each step begins with the phase and finds the rings
 *   anew, under the lock. Registrations in epoll go back to the kernel first.
 * - The end keeps its generation, as it is the same connection. What tells one stay from the next
 *   is the slot's incarnation. Only one process may hold the end, as for the first request, so
 *   nobody else has mappings or tables that mean the old slot.
 * - In a remote arena a receiver may know that the ring has ended by the relays' word (`stopped`)
 *   while the peer's program hasn't sent since: its next send still needs the relays to say that
 *   its bytes have arrived. So the slot is kept until that peer has sent over TCP, or has said
 *   itself that the ring has ended. What our own ring still has on its way is delivered after the
 *   slot's release, as after a close: the router takes the slot for another connection only when
 *   the relay has let go of it. What a remote receiver defers was due when the ring ended, so
 *   nothing is deferred by an end that leaves its slot.
 * - family_account() takes this stay in the ring for one connection, so restraint counts each
 *   request once.
 */
#ifndef FREEFLOW_REENTRY_H
#define FREEFLOW_REENTRY_H

#include "backoff.h"

/* Of an attached end with a direction that has ended, without a lock: is it time to call
 * reentry_leave_slot()? */
static inline bool reentry_is_due(struct end *end)
{
        if (load_relaxed(&end->final))
                return false;
        if (__builtin_expect(!load_relaxed(&end->due), 0))
                backoff_begin(end);
        return backoff_is_over(end);
}

/* Leave the slot, if that is possible now. Otherwise it isn't due for a moment. */
void reentry_leave_slot(int fd, struct end *end, uint64_t key);

#endif
