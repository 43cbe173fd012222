/* epoll_ctl(), and what happens to registrations when their connection changes. Rule that keeps
 * poller.h's invariant:
 *
 *      - Whoever makes a registration ACTIVE, by epoll_ctl() or because its connection has moved to
 *        a ring or left one, passes it on to the threads that sleep: poller_pass_on().
 *
 * A signal handler may come while its own thread works on the lists. The handler changes nothing
 * then: that work, or the next wait, checks all registrations again (poller_wake_interrupted()).
 */
#include "poller.h"
#include "poller_internal.h"

#include "real.h"
#include "sys.h"

#include <errno.h>
#include <sys/socket.h>

/* --- epoll_ctl() --- */

/* For a registration that the kernel reports to us. */
static int control_ring(struct poller *poller, struct registration *r, struct end *end, int operation,
                        const struct epoll_event *event)
{
        if (operation == EPOLL_CTL_ADD && !r->deleted)
                return (int)result(-EEXIST);
        if (operation != EPOLL_CTL_ADD && r->deleted)
                return (int)result(-ENOENT);
        if (operation == EPOLL_CTL_DEL) {
                r->deleted = true;
                registration_deactivate(poller, r, STATE_OFF);
                return 0;
        }
        if (!event)
                return (int)result(-EFAULT);
        if (operation == EPOLL_CTL_MOD && event->events & EPOLLEXCLUSIVE)
                return (int)result(-EINVAL);
        r->deleted = false;
        r->events = event->events & ~(uint32_t)EPOLLEXCLUSIVE;
        r->data = event->data.u64;
        r->unreported = 1;
        if (r->state == STATE_OFF)
                r->state = STATE_ARMED;
        registration_update_kernel(poller, r, end);
        registration_to_ring(poller, r, end);
        return 0;
}

/* For a registration that the kernel reports to the program; from now on to us, if the connection
 * uses a ring by now. */
static int control_kernel(struct poller *poller, struct registration *r, struct end *end, int operation,
                          const struct epoll_event *event)
{
        /* What the kernel accepts together with EPOLLEXCLUSIVE. It refuses the rest. */
        const uint32_t with_exclusive =
            EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLWAKEUP | EPOLLET | EPOLLEXCLUSIVE;
        const uint32_t events = r->events, generation = atomic_load(&r->generation);
        const uint64_t data = r->data;
        const bool was_tagged = r->tagged, ring = end && end_uses_ring(end);
        struct epoll_event passed = *event;
        int outcome;

        /* An exclusive registration can't be changed, so it can't move to a ring either. Without
         * the flag all of a connection's waiters wake, instead of at least one. */
        if (operation == EPOLL_CTL_ADD && end && passed.events & EPOLLEXCLUSIVE &&
            !(passed.events & ~with_exclusive) && sys_option(r->fd, SOL_SOCKET, SO_ACCEPTCONN) <= 0)
                passed.events &= ~(uint32_t)EPOLLEXCLUSIVE;
        registration_retag(r);
        r->events = (passed.events & ~(uint32_t)EPOLLEXCLUSIVE) | EPOLLERR | EPOLLHUP;
        r->data = passed.data.u64;
        if (ring && !(passed.events & EPOLLEXCLUSIVE)) {
                passed = (struct epoll_event){.events = registration_mask(r, end),
                                              .data.u64 = registration_tag(r)};
        } else {
                passed.data = registration_for_program(r, false).data;
        }
        outcome = real()->epoll_ctl(poller->epfd - 1, operation, r->fd, &passed);
        if (outcome < 0) {
                r->events = events;
                r->data = data;
                r->tagged = was_tagged;
                atomic_store(&r->generation, generation);
                return outcome;
        }
        r->unreported = 1;
        r->fired = false;
        if (ring && !(passed.events & EPOLLEXCLUSIVE)) {
                r->kernel_mask = passed.events;
                registration_enter_ring(poller, r, end);
        }
        return outcome;
}

/* One instance in another: events of the inner one must wake a thread that sleeps in the outer one.
 */
static void nest(struct poller *poller, struct registration *r, bool made)
{
        struct poller *inner = poller_of(r->fd);

        if (made) {
                r->next_nested = poller->nested;
                poller->nested = registration_number(r);
        }
        if (inner)
                inner->polled = true;
        if (poller_is_slept_on(poller))
                poller_wake_one(poller);
}

/* `*tracked`: we have the registration, if there is one now. */
static int control(struct poller *poller, int operation, int fd, uint64_t key, struct epoll_event *event,
                   bool *tracked)
{
        struct end *end = key ? &family->ends[(uint32_t)key - 1] : NULL;
        enum taken outer = lock_take(&poller_table, self()), taken = lock_take(&poller->lock, self());
        struct registration *r = registration_find(poller, fd);
        bool made = false;
        int outcome;

        if (r && r->key != key) {
                /* Of a descriptor of this number that was closed by a call that we didn't see. */
                registration_drop(poller, r);
                r = NULL;
        }
        if (r && r->state != STATE_KERNEL && end && end_uses_ring(end)) {
                outcome = control_ring(poller, r, end, operation, event);
        } else {
                if (r && r->state != STATE_KERNEL)
                        registration_to_kernel(poller, r, false);
                if (r && r->deleted) {
                        registration_drop(poller, r);
                        r = NULL;
                }
                if (operation == EPOLL_CTL_ADD && !r) {
                        r = registration_add(poller, fd, key);
                        made = *tracked = r != NULL;
                }
                outcome = r && event && operation != EPOLL_CTL_DEL
                              ? control_kernel(poller, r, end, operation, event)
                              : real()->epoll_ctl(poller->epfd - 1, operation, fd, event);
                if (outcome < 0 ? made : r && operation == EPOLL_CTL_DEL)
                        registration_drop(poller, r);
                else if (outcome >= 0 && r && !end)
                        nest(poller, r, made);
        }
        poller_pass_on(poller);
        lock_release(&poller->lock, taken);
        lock_release(&poller_table, outer);
        return outcome;
}

int poller_control(int epfd, int operation, int fd, struct epoll_event *event, bool *untracked)
{
        struct poller *poller = poller_of(epfd), *inner = poller ? poller_of(fd) : NULL;
        bool tracked = poller != NULL;
        uint64_t key = 0;
        struct end *end = end_of(fd, &key);
        int outcome;

        if (poller && operation == EPOLL_CTL_ADD)
                atomic_fetch_add_explicit(&poller->added, 1, memory_order_relaxed);
        outcome = poller && (end || inner) ? control(poller, operation, fd, end ? key : 0, event, &tracked)
                                           : real()->epoll_ctl(epfd, operation, fd, event);
        *untracked = end && !tracked && outcome >= 0 && operation == EPOLL_CTL_ADD;
        return outcome;
}

/* --- a connection changes --- */

static void wake_all_interrupted(void)
{
        for (uint32_t i = 0; i < pollers_used; i++)
                if (pollers[i].epfd)
                        poller_wake_interrupted(&pollers[i]);
}

bool poller_attach(struct end *end)
{
        enum taken outer = lock_take(&poller_table, self());
        bool all = true;

        if (outer == LOCK_NESTED)
                return false;
        for (struct registration *r = registration_of_end(end, NULL); r && all;
             r = registration_of_end(end, r)) {
                struct poller *poller = &pollers[r->poller];
                enum taken taken = lock_take(&poller->lock, self());

                all = taken == LOCK_TAKEN && poller_give_bell(poller, atomic_load(&end->place.arena)) &&
                      registration_to_ring(poller, r, end);
                if (taken == LOCK_TAKEN)
                        poller_pass_on(poller);
                lock_release(&poller->lock, taken);
        }
        lock_release(&poller_table, outer);
        return all;
}

bool poller_detach(struct end *end)
{
        enum taken outer = lock_take(&poller_table, self());
        bool all = outer == LOCK_TAKEN;

        for (struct registration *r = all ? registration_of_end(end, NULL) : NULL; r && all;
             r = registration_of_end(end, r)) {
                struct poller *poller = &pollers[r->poller];
                enum taken taken = lock_take(&poller->lock, self());

                all = taken == LOCK_TAKEN;
                if (all && r->state != STATE_KERNEL)
                        registration_to_kernel(poller, r, false);
                lock_release(&poller->lock, taken);
        }
        lock_release(&poller_table, outer);
        return all;
}

static void connection_changed(struct end *end, bool again)
{
        enum taken outer = lock_take(&poller_table, self());

        if (outer == LOCK_NESTED) {
                wake_all_interrupted();
                return;
        }
        for (struct registration *r = registration_of_end(end, NULL); r; r = registration_of_end(end, r)) {
                struct poller *poller = &pollers[r->poller];
                enum taken taken = lock_take(&poller->lock, self());

                if (taken == LOCK_NESTED) {
                        poller_wake_interrupted(poller);
                } else {
                        registration_refresh(poller, r, end, again);
                        poller_pass_on(poller);
                }
                lock_release(&poller->lock, taken);
        }
        lock_release(&poller_table, outer);
}

void poller_sender_changed(struct end *end)
{
        connection_changed(end, false);
}

void poller_receiver_changed(struct end *end)
{
        connection_changed(end, true);
}

/* No bell was armed for room, since there was some. Under the poller's lock. */
static void await_room(struct poller *poller, struct registration *r, enum taken taken)
{
        if (taken == LOCK_NESTED) {
                poller_wake_interrupted(poller);
        } else if (r->state == STATE_ARMED && r->events & EPOLLET && r->events & (EPOLLOUT | EPOLLWRNORM)) {
                registration_activate(poller, r);
                poller_pass_on(poller);
        }
}

/* The usual case, without the table's lock: the end has one registration. */
static void await_room_in_only(const struct end *end, uint32_t number)
{
        struct registration *r = &registrations[number - 1];
        uint32_t place = load_relaxed(&r->poller);
        struct poller *poller = &pollers[place];
        enum taken taken;

        if (place == POLLERS)
                return;
        taken = lock_take(&poller->lock, self());
        if (registration_is_of(poller, r) && atomic_load(&poller_only[end_number(end)]) == number)
                await_room(poller, r, taken);
        lock_release(&poller->lock, taken);
}

void poller_sender_full(struct end *end)
{
        uint32_t number = load_relaxed(&poller_only[end_number(end)]);
        enum taken outer, taken;

        atomic_fetch_add_explicit(&end->tx.full, 1, memory_order_relaxed);
        if (number && number != SEVERAL) {
                await_room_in_only(end, number);
                return;
        }
        if (!number)
                return;
        outer = lock_take(&poller_table, self());
        for (struct registration *r = outer == LOCK_NESTED ? NULL : registration_of_end(end, NULL); r;
             r = registration_of_end(end, r)) {
                struct poller *poller = &pollers[r->poller];

                taken = lock_take(&poller->lock, self());
                await_room(poller, r, taken);
                lock_release(&poller->lock, taken);
        }
        if (outer == LOCK_NESTED)
                wake_all_interrupted();
        lock_release(&poller_table, outer);
}

/* --- a descriptor goes --- */

/* Under the table's lock. */
static bool move_to_alias(int fd, struct registration *r)
{
        struct end *end = registration_end(r);
        int other = end ? end_next_descriptor(end, -1) : -1;

        while (other == fd)
                other = end_next_descriptor(end, other);
        if (other < 0)
                return false;
        registration_move(r, other);
        return true;
}

/* Before a registration is dropped: the kernel keeps its own as long as a process has the file
 * open, and our tag will mean another registration. `stays`: the descriptor stays open. Under both
 * locks. */
static void untag_in_kernel(struct poller *poller, struct registration *r, bool stays)
{
        struct end *end = r->key ? registration_end(r) : NULL;
        struct epoll_event event;

        stays = stays || !end || end_held_elsewhere(end) || atomic_load(&process.local[end_number(end)]) > 1;
        if (stays && r->state != STATE_KERNEL) {
                registration_to_kernel(poller, r, true);
        } else if (stays && r->tagged && !r->fired) {
                event = registration_for_program(r, true);
                sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event);
        }
}

void poller_leave(int fd, uint64_t key)
{
        enum taken outer;

        if (!pollers || (unsigned)fd >= DESCRIPTORS || !atomic_load(&poller_of_fd[fd]))
                return;
        outer = lock_take(&poller_table, self());
        for (uint32_t i = atomic_load(&poller_of_fd[fd]) - 1; i != NONE;) {
                struct registration *r = &registrations[i];
                struct poller *poller = &pollers[r->poller];
                enum taken taken;

                i = r->next_of_fd;
                if (key && r->key != key)
                        continue;
                /* Of a duplicate: the kernel keeps it as long as the connection is open somewhere.
                 */
                if (!key && fd_is_end(r->key) && move_to_alias(fd, r))
                        continue;
                taken = lock_take(&poller->lock, self());
                untag_in_kernel(poller, r, key != 0);
                registration_drop(poller, r);
                lock_release(&poller->lock, taken);
        }
        lock_release(&poller_table, outer);
}

void poller_replace(int fd, uint64_t key, int file, int flags)
{
        uint32_t first = pollers && (unsigned)fd < DESCRIPTORS ? atomic_load(&poller_of_fd[fd]) : 0;
        enum taken outer;

        if (!first) {
                sys_3(SYS_dup3, file, fd, flags);
                return;
        }
        outer = lock_take(&poller_table, self());
        first = atomic_load(&poller_of_fd[fd]);
        for (uint32_t i = first - 1; i != NONE; i = registrations[i].next_of_fd)
                sys_4(SYS_epoll_ctl, pollers[registrations[i].poller].epfd - 1, EPOLL_CTL_DEL, fd, 0);
        sys_3(SYS_dup3, file, fd, flags);
        for (uint32_t i = first - 1; i != NONE;) {
                struct registration *r = &registrations[i];
                struct poller *poller = &pollers[r->poller];
                struct epoll_event event = {.events = r->events, .data.u64 = r->data};
                enum taken taken;

                i = r->next_of_fd;
                if (r->key != key)
                        continue;
                taken = lock_take(&poller->lock, self());
                if (r->state == STATE_OFF || r->fired)
                        event.events &= EPOLLONESHOT;
                if (!r->deleted)
                        sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, fd, &event);
                registration_drop(poller, r);
                lock_release(&poller->lock, taken);
        }
        lock_release(&poller_table, outer);
}

static void return_bells(struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);

        if (!poller->bells)
                return;
        for (uint32_t arena = 0; arena < ARENAS && arena < high; arena++)
                if (poller_bell(poller, arena) >= 0)
                        bell_return(arena, poller_bell(poller, arena));
        /* The next instance in this place uses the memory. */
        poller_forget_bells(poller);
}

void poller_closed(int fd)
{
        struct poller *poller = poller_of(fd);
        enum taken outer, taken;

        poller_leave(fd, 0);
        if (!poller)
                return;
        if (poller->aliases) {
                poller->aliases--;
                fd_set_word(fd, 0);
                for (int other = 0; poller->epfd == fd + 1 && other < DESCRIPTORS; other++)
                        if (poller_of(other) == poller)
                                poller->epfd = other + 1;
                return;
        }
        outer = lock_take(&poller_table, self());
        taken = lock_take(&poller->lock, self());
        for (uint32_t i = 0; i < registrations_used; i++)
                if (registration_is_of(poller, &registrations[i]))
                        registration_drop(poller, &registrations[i]);
        if (poller->wake_fd)
                close_own(poller->wake_fd - 1);
        return_bells(poller);
        poller->wake_fd = 0;
        fd_set_word(fd, 0);
        poller->epfd = 0;
        lock_release(&poller->lock, taken);
        lock_release(&poller_table, outer);
}

void poller_forked(void)
{
        if (!pollers)
                return;
        atomic_store(&poller_table.word, 0);
        for (uint32_t i = 0; i < pollers_used; i++) {
                struct poller *poller = &pollers[i];

                if (!poller->epfd)
                        continue;
                atomic_store(&poller->lock.word, 0);
                poller->sleepers = 0;
                poller->wake_fd = 0;
                poller->wake_pending = false;
                poller_forget_bells(poller);
        }
        for (uint32_t i = 0; i < registrations_used; i++)
                if (registrations[i].state == STATE_ARMED)
                        registration_activate(&pollers[registrations[i].poller], &registrations[i]);
}
