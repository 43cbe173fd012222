/* Arming registrations, and waking a sleeper to take over. Rules that keep poller.h's invariant:
 *
 *      - ARMED means that the bell will ring for all that the registration wants and that isn't
 *        there yet. An edge-triggered registration that has reported room must not report it again
 *        before a sender has found none: that sender makes it ACTIVE (poller_sender_full()).
 *      - Arming sets the waiter's bit first and checks the registration again afterwards:
 *        registration_arm(), then registration_events(). wait_begin() pairs with wake(): either the
 *        peer sees the bit, or the check sees what the peer has published.
 *      - A thread that made a registration ACTIVE, or leaves one ACTIVE when it returns to the
 *        program, calls poller_pass_on(): it arms the registration; if there is something to
 *        report, or the peer can't ring the bell yet, it wakes a sleeper.
 */
#include "poller.h"
#include "poller_internal.h"

#include "ready.h"
#include "sleep.h"
#include "sparse.h"
#include "sys.h"

#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

/* --- the instance's bells and its eventfd --- */

int poller_bell(const struct poller *poller, uint32_t arena)
{
        uint64_t word = poller->bells ? poller->bells[arena] : 0;

        if (word && bell_descriptor(arena, (int)(word & 511) - 1) < 0)
                return -1;
        /* There may be another arena under the number by now. */
        return word && word >> 9 == (atomic_load(&mapping_of(arena)->id) & UINT64_MAX >> 9)
                   ? (int)(word & 511) - 1
                   : -1;
}

void poller_forget_bells(struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);

        if (poller->bells)
                memset(poller->bells, 0, (high < ARENAS ? high : ARENAS) * sizeof *poller->bells);
}

bool poller_give_bell(struct poller *poller, uint32_t arena)
{
        /* Edge-triggered: each byte is an event, and need not be read for that (bell_rang()). */
        struct epoll_event event = {.events = EPOLLIN | EPOLLET};
        uint64_t id = atomic_load(&mapping_of(arena)->id);
        int bell;

        if (!poller->bells) {
                poller->bells = reserve(ARENAS * sizeof *poller->bells, MAP_PRIVATE);
                if (!poller->bells)
                        return false;
        }
        if (poller_bell(poller, arena) >= 0)
                return true;
        bell = bell_take(arena, false);
        if (bell < 0)
                return false;
        event.data.u64 = TAG_BELL | arena << 8 | (uint32_t)bell;
        /* Bytes that came late for the waiter that had it before. */
        bell_drain(arena, bell);
        if (bell_descriptor(arena, bell) < 0)
                return poller_give_bell(poller, arena);
        sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, bell_descriptor(arena, bell), &event);
        poller->bells[arena] = id << 9 | (uint32_t)(bell + 1);
        return true;
}

/* When there is no descriptor for an eventfd: register a bell for EPOLLOUT, which always
 * holds. */
static void wake_by_bell(const struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t arena = 0; poller->bells && arena < high && arena < ARENAS; arena++) {
                int bell = poller_bell(poller, arena);
                struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET,
                                            .data.u64 = TAG_BELL | arena << 8 | (uint32_t)bell};

                if (bell >= 0 && sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD,
                                       bell_descriptor(arena, bell), &event) >= 0)
                        return;
        }
}

void poller_wake_one(struct poller *poller)
{
        uint64_t one = 1;

        if (poller->wake_pending)
                return;
        if (!poller->wake_fd) {
                struct epoll_event event = {.events = EPOLLIN, .data.u64 = TAG_WAKE};
                int fd = own_descriptor((int)sys_2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));

                if (fd >= 0 && sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, fd, &event) < 0) {
                        close_own(fd);
                        fd = -1;
                }
                if (fd < 0) {
                        wake_by_bell(poller);
                        return;
                }
                poller->wake_fd = fd + 1;
        }
        poller->wake_pending = true;
        sys_3(SYS_write, poller->wake_fd - 1, &one, sizeof one);
}

void poller_wake_interrupted(struct poller *poller)
{
        uint64_t one = 1;

        atomic_store(&poller->rescan_due, true);
        atomic_store(&poller->settle_due, true);
        if (poller->wake_fd)
                sys_3(SYS_write, poller->wake_fd - 1, &one, sizeof one);
        else
                wake_by_bell(poller);
}

void poller_take_wakeup(struct poller *poller)
{
        uint64_t drained;

        if (poller->wake_fd)
                sys_3(SYS_read, poller->wake_fd - 1, &drained, sizeof drained);
        poller->wake_pending = false;
}

/* --- arming --- */

bool registration_arm(struct poller *poller, struct registration *r, struct end *end)
{
        uint32_t arena = atomic_load(&end->place.arena);
        bool room;
        int bell;

        /* Another process that has the connection too may have ended the ring. */
        registration_update_kernel(poller, r, end);
        if (!poller_give_bell(poller, arena))
                return false;
        bell = poller_bell(poller, arena);
        atomic_fetch_add_explicit(&mapping_of(arena)->armed[bell], 2, memory_order_relaxed);
        /* An edge-triggered registration that has reported room waits for a sender that finds none
         * (poller_sender_full()). All others wait for room now: another thread may take the room
         * that is there before the caller checks. */
        room = r->events & (EPOLLOUT | EPOLLWRNORM) && atomic_load(&end->tx.phase) == PHASE_RING &&
               (!(r->events & EPOLLET) || r->unreported || atomic_load(&end->tx.full) != r->full_reported ||
                !ready_space(end));
        /* The kernel doesn't report a remote ring's end, nor its loss. */
        sleep_arm(end, bell, r->events & (EPOLLIN | EPOLLRDNORM) || r->remote, room);
        return bell_is_known(arena, atomic_load(&end->place.side), bell);
}

/* Arm an ACTIVE registration, unless it has something to report. Returns whether it has. */
static bool arm_active(struct poller *poller, struct registration *r)
{
        struct end *end = registration_end(r);
        bool known;

        if (end && !end_uses_ring(end)) {
                registration_to_kernel(poller, r, false);
                return false;
        }
        known = !end || registration_arm(poller, r, end);
        if (end && registration_events(r, end, false))
                return true;
        /* If the bell can't be rung, the registration stays on the list, and the sleep is short. */
        if (!known) {
                poller->unringable = true;
                poller->silent |= r->remote;
        } else {
                registration_deactivate(poller, r, STATE_ARMED);
        }
        return false;
}

bool poller_arm_all(struct poller *poller)
{
        bool ready = false;

        poller->unringable = poller->silent = false;
        for (uint32_t i = poller->active; i != NONE;) {
                struct registration *r = &registrations[i];

                i = r->next;
                ready = arm_active(poller, r) || ready;
        }
        return ready || poller->settle_due;
}

void poller_pass_on_active(struct poller *poller)
{
        bool due = false;

        for (uint32_t i = poller->active; i != NONE && !due;) {
                struct registration *r = &registrations[i];
                struct end *end = registration_end(r);

                i = r->next;
                due = (end && end_uses_ring(end) && registration_events(r, end, false)) ||
                      arm_active(poller, r);
                /* The bell can't be rung yet. A thread that sleeps in the instance makes its sleep
                 * short; one that sleeps elsewhere does so only if nothing else would report
                 * (poller_arm()). */
                if (r->state == STATE_ACTIVE && (poller->sleepers || r->remote))
                        due = true;
        }
        if (due)
                poller_wake_one(poller);
}

/* --- an instance in another one, or in poll() --- */

bool registration_nested_ready(const struct registration *r)
{
        return r->events & EPOLLIN && !r->fired && poller_ready(r->fd);
}

bool poller_ready(int epfd)
{
        struct poller *poller = poller_of(epfd);
        bool ready = false;
        enum taken taken;

        if (!poller)
                return false;
        taken = lock_take(&poller->lock, self());
        /* Otherwise the kernel would report the wake-up as an event. */
        if (poller->wake_pending)
                poller_take_wakeup(poller);
        for (uint32_t i = poller->active; i != NONE && !ready; i = registrations[i].next) {
                struct end *end = registration_end(&registrations[i]);

                ready = end && end_uses_ring(end) && registration_events(&registrations[i], end, false);
        }
        for (uint32_t i = poller->nested; i != NONE && !ready; i = registrations[i].next_nested)
                ready = registration_nested_ready(&registrations[i]);
        poller_pass_on(poller);
        lock_release(&poller->lock, taken);
        return ready;
}

bool poller_arm(int epfd)
{
        struct poller *poller = poller_of(epfd);
        enum taken taken;
        bool silent;

        if (!poller)
                return false;
        taken = lock_take(&poller->lock, self());
        poller->polled = true;
        poller_arm_all(poller);
        silent = poller->silent || poller->settle_due;
        for (uint32_t i = poller->nested; i != NONE; i = registrations[i].next_nested)
                silent = poller_arm(registrations[i].fd) || silent;
        lock_release(&poller->lock, taken);
        return silent;
}
