/* The tables of epoll instances and registrations, and the kernel's part of each registration.
 *
 * The kernel's registration of a connection that uses a ring has our tag instead of the program's
 * data, and is edge-triggered: the kernel reports each event to us, once. Then a change that the
 * program makes, often with each request, needs no system call.
 *
 * A thread may be late with an event that the kernel gave to it. By then the registration may have
 * been changed, moved or replaced. Each change gives it another tag, and an event under an old tag
 * is dropped. Nothing is lost by that: the change made the kernel check again.
 */
#include "poller.h"
#include "poller_internal.h"

#include "sparse.h"
#include "sys.h"

#include <string.h>

enum { GENERATIONS = 1 << 14 }; /* with a registration's number 32 bits */

struct poller *pollers;
struct registration *registrations;
_Atomic uint32_t *poller_of_fd;
_Atomic uint32_t *poller_only;
struct lock poller_table;
uint32_t registrations_used, pollers_used;

static uint32_t free_list = NONE;

size_t poller_memory(void)
{
        return REGISTRATIONS * sizeof *registrations + DESCRIPTORS * sizeof *poller_of_fd +
               ENDS * sizeof *poller_only + POLLERS * sizeof *pollers + 4 * (size_t)PAGE;
}

void poller_start_ends(char **place)
{
        poller_only = take_part(place, ENDS * sizeof *poller_only);
}

void poller_start(char **place)
{
        poller_of_fd = take_part(place, DESCRIPTORS * sizeof *poller_of_fd);
        registrations = take_part(place, REGISTRATIONS * sizeof *registrations);
        pollers = take_part(place, POLLERS * sizeof *pollers);
}

struct poller *poller_of(int epfd)
{
        uint64_t word;

        if (!process.on || (unsigned)epfd >= DESCRIPTORS || !pollers)
                return NULL;
        word = load_relaxed(&process.fds[epfd]);
        if (!((uint32_t)word & FD_POLLER) || (uint32_t)word == FD_OWN)
                return NULL;
        return &pollers[((uint32_t)word & ~FD_POLLER) % POLLERS];
}

bool poller_is(int fd)
{
        return poller_of(fd) != NULL;
}

void poller_made(int epfd)
{
        enum taken taken;

        if (!process.on || (unsigned)epfd >= DESCRIPTORS)
                return;
        taken = lock_take(&poller_table, self());
        for (uint32_t i = 0; i < POLLERS; i++) {
                struct poller *poller = &pollers[i];
                uint64_t *bells;

                /* A thread that still sleeps in a closed instance must not meet the next one here.
                 */
                if (poller->epfd || poller->sleepers)
                        continue;
                if (i >= pollers_used)
                        pollers_used = i + 1;
                bells = poller->bells;
                memset(poller, 0, sizeof *poller);
                poller->bells = bells;
                poller->epfd = epfd + 1;
                poller->active = NONE;
                poller->nested = NONE;
                fd_set_word(epfd, FD_POLLER | i);
                break;
        }
        lock_release(&poller_table, taken);
}

void poller_alias(int old, int new)
{
        struct poller *poller = poller_of(old);

        if (!poller || (unsigned)new >= DESCRIPTORS)
                return;
        poller->aliases++;
        fd_set_word(new, atomic_load(&process.fds[old]));
}

/* --- registrations --- */

uint64_t registration_tag(const struct registration *r)
{
        return TAG_REGISTRATION | load_relaxed(&r->generation) % GENERATIONS * REGISTRATIONS |
               registration_number(r);
}

void registration_retag(struct registration *r)
{
        atomic_fetch_add_explicit(&r->generation, 1, memory_order_relaxed);
}

struct registration *registration_of_tag(const struct poller *poller, uint64_t tag)
{
        struct registration *r = &registrations[(uint32_t)tag % REGISTRATIONS];

        return registration_is_of(poller, r) && registration_tag(r) == tag ? r : NULL;
}

struct registration *registration_find(const struct poller *poller, int fd)
{
        uint32_t i = (unsigned)fd < DESCRIPTORS ? load_relaxed(&poller_of_fd[fd]) : 0;

        for (i--; i != NONE; i = registrations[i].next_of_fd)
                if (registration_is_of(poller, &registrations[i]))
                        return &registrations[i];
        return NULL;
}

static void chain(struct registration *r, int fd)
{
        r->fd = fd;
        r->next_of_fd = atomic_load(&poller_of_fd[fd]) - 1;
        atomic_store(&poller_of_fd[fd], registration_number(r) + 1);
}

static void unchain(const struct registration *r)
{
        uint32_t number = registration_number(r), i = atomic_load(&poller_of_fd[r->fd]) - 1;

        if (i == number) {
                atomic_store(&poller_of_fd[r->fd], r->next_of_fd + 1);
                return;
        }
        while (i != NONE && registrations[i].next_of_fd != number)
                i = registrations[i].next_of_fd;
        if (i != NONE)
                registrations[i].next_of_fd = r->next_of_fd;
}

void registration_move(struct registration *r, int fd)
{
        unchain(r);
        chain(r, fd);
}

struct registration *registration_add(struct poller *poller, int fd, uint64_t key)
{
        uint32_t number = free_list;
        struct registration *r;

        if (number != NONE)
                free_list = registrations[number].next_of_fd;
        else if (registrations_used < REGISTRATIONS)
                number = registrations_used++;
        else
                return NULL;
        r = &registrations[number];
        memset(&r->key, 0, sizeof *r - offsetof(struct registration, key));
        r->key = key;
        r->next = r->previous = NONE;
        atomic_store(&r->poller, (uint32_t)(poller - pollers));
        chain(r, fd);
        if (key) {
                uint32_t nothing = 0;

                if (!atomic_compare_exchange_strong(&poller_only[(uint32_t)key - 1], &nothing, number + 1))
                        atomic_store(&poller_only[(uint32_t)key - 1], SEVERAL);
        }
        return r;
}

void poller_forget_end(uint32_t number)
{
        store_relaxed(&poller_only[number], 0);
}

void registration_activate(struct poller *poller, struct registration *r)
{
        if (r->state == STATE_ACTIVE)
                return;
        r->state = STATE_ACTIVE;
        r->empty_checks = 0;
        r->previous = NONE;
        r->next = poller->active;
        if (poller->active != NONE)
                registrations[poller->active].previous = registration_number(r);
        poller->active = registration_number(r);
}

void registration_deactivate(struct poller *poller, struct registration *r, enum state state)
{
        if (r->state == STATE_ACTIVE) {
                if (r->previous != NONE)
                        registrations[r->previous].next = r->next;
                else
                        poller->active = r->next;
                if (r->next != NONE)
                        registrations[r->next].previous = r->previous;
        }
        r->state = state;
}

static void drop_nested(struct poller *poller, const struct registration *r)
{
        uint32_t number = registration_number(r), i = poller->nested;

        if (i == number) {
                poller->nested = r->next_nested;
                return;
        }
        while (i != NONE && registrations[i].next_nested != number)
                i = registrations[i].next_nested;
        if (i != NONE)
                registrations[i].next_nested = r->next_nested;
}

void registration_drop(struct poller *poller, struct registration *r)
{
        uint32_t this = registration_number(r) + 1;

        if (r->state != STATE_KERNEL)
                poller->ring_count--;
        registration_deactivate(poller, r, STATE_KERNEL);
        unchain(r);
        if (r->key)
                atomic_compare_exchange_strong(&poller_only[(uint32_t)r->key - 1], &this, 0);
        else
                drop_nested(poller, r);
        registration_retag(r);
        atomic_store(&r->poller, POLLERS);
        r->next_of_fd = free_list;
        free_list = registration_number(r);
}

struct registration *registration_of_end(const struct end *end, const struct registration *r)
{
        int fd = r ? r->fd : end_next_descriptor(end, -1);
        uint32_t i = r ? r->next_of_fd : NONE;

        if (!r && fd >= 0)
                i = atomic_load(&poller_of_fd[fd]) - 1;
        while (fd >= 0) {
                for (; i != NONE; i = registrations[i].next_of_fd)
                        if ((uint32_t)registrations[i].key - 1 == end_number(end))
                                return &registrations[i];
                fd = end_next_descriptor(end, fd);
                i = fd >= 0 ? atomic_load(&poller_of_fd[fd]) - 1 : NONE;
        }
        return NULL;
}

/* --- what the kernel reports --- */

/* The connection's end, bytes of TCP, and room in TCP's buffer while bytes still go there. */
uint32_t registration_mask(const struct registration *r, struct end *end)
{
        bool room = r->events & (EPOLLOUT | EPOLLWRNORM) && atomic_load(&end->tx.phase) != PHASE_RING;

        return EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET | (room ? EPOLLOUT : 0u);
}

bool registration_update_kernel(struct poller *poller, struct registration *r, struct end *end)
{
        struct epoll_event event = {.events = registration_mask(r, end), .data.u64 = registration_tag(r)};

        if ((r->kernel_mask & event.events) == event.events)
                return true;
        r->kernel_mask = event.events;
        return sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event) >= 0;
}

void registration_enter_ring(struct poller *poller, struct registration *r, struct end *end)
{
        poller->ring_count++;
        r->kernel_events = 0;
        r->kernel_edge = r->deferred = r->loss_reported = false;
        r->remote = end_is_remote(end);
        r->tail_reported = atomic_load(&end->rx.edge);
        r->full_reported = atomic_load(&end->tx.full);
        if (r->fired)
                r->state = STATE_OFF;
        else
                registration_activate(poller, r);
        r->tagged = r->fired = false;
}

bool registration_to_ring(struct poller *poller, struct registration *r, struct end *end)
{
        if (r->state == STATE_KERNEL) {
                uint32_t generation = atomic_load(&r->generation);

                r->kernel_mask = 0;
                registration_retag(r);
                if (!registration_update_kernel(poller, r, end)) {
                        atomic_store(&r->generation, generation);
                        return false;
                }
                registration_enter_ring(poller, r, end);
        } else if (r->state != STATE_OFF && !r->deleted) {
                registration_activate(poller, r);
        }
        return true;
}

/* A one-shot registration keeps our tag: the kernel doesn't say whether it has fired, and the ring
 * must not report the event again. */
struct epoll_event registration_for_program(struct registration *r, bool last)
{
        struct epoll_event event = {.events = r->events, .data.u64 = r->data};

        r->tagged = !last && r->events & EPOLLONESHOT;
        if (r->tagged)
                event.data.u64 = registration_tag(r);
        return event;
}

void registration_to_kernel(struct poller *poller, struct registration *r, bool last)
{
        uint32_t generation = atomic_load(&r->generation);
        struct epoll_event event;

        registration_retag(r);
        event = registration_for_program(r, last);
        r->fired = r->state == STATE_OFF && !r->deleted;
        if (r->fired)
                event.events &= EPOLLONESHOT;
        registration_deactivate(poller, r, STATE_KERNEL);
        poller->ring_count--;
        if (r->deleted) {
                sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_DEL, r->fd, &event);
        } else if (sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event) < 0) {
                /* It was made with a descriptor that has been closed: the kernel keeps what it has.
                 */
                atomic_store(&r->generation, generation);
                r->tagged = true;
        }
}

void registration_refresh(struct poller *poller, struct registration *r, struct end *end, bool again)
{
        if (end_uses_ring(end)) {
                r->unreported |= again;
                registration_to_ring(poller, r, end);
                registration_update_kernel(poller, r, end);
        } else if (r->state != STATE_KERNEL) {
                registration_to_kernel(poller, r, false);
        }
}
