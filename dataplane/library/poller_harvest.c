/* Collecting the events of an instance: of its rings, of the kernel, and of the instances inside
 * it. Rules that keep poller.h's invariant:
 *
 *      - The kernel gives a bell's event, a wake-up or an event of TCP to one thread, even to one
 *        that doesn't wait. That thread makes the registration ACTIVE, and passes on what it leaves
 *        ACTIVE when it returns, with events or without: poller_pass_on().
 *      - An event for a tag that no registration has any more is dropped (poller_table.c).
 *
 * Order: as in the kernel, the event that came first is reported first. Rings carry stamps for
 * that. What only the kernel reports counts as older than what a ring has now.
 */
#include "poller_internal.h"

#include "ready.h"
#include "sys.h"

#include <string.h>

enum {
        MOST_CALLS = 8,    /* epoll_pwait() calls in the kernel for one of the program's */
        MOST_EVENTS = 256, /* of rings, for one call */
        TURNS = 8,         /* calls with room for one event, of which one checks the rings first */
        QUIET = 64,        /* checks without an event before a registration is armed */
        FULL_BELL = 64,    /* bytes in a bell of an epoll instance; the kernel's smallest default takes
                              > 200 */
};

/* Events of rings, and when each came. */
struct list {
        struct epoll_event *events;
        int count;
        uint64_t stamps[MOST_EVENTS];
};

static int at_most(int value)
{
        return value < MOST_EVENTS ? value : MOST_EVENTS;
}

/* --- bells --- */

/* Slots in which something has happened, as the peer says. */
static _Atomic uint64_t *dirty_slots(uint32_t arena, int bell)
{
        return &arena_header(mapping_of(arena))
                    ->sides[atomic_load(&family->arenas[arena].side) % SIDES]
                    .dirty[bell];
}

/* With too many for the list, the next check of all ACTIVE registrations finds the rest. */
static void add_pending(struct poller *poller, const struct registration *r)
{
        if (poller->pending_count < BATCH)
                poller->pending[poller->pending_count++] = registration_number(r);
}

/* A registration of another poller may change meanwhile; one of this poller can't. */
static void mark_ready(struct poller *poller, struct registration *r, uint32_t number)
{
        if (registration_is_of(poller, r) && (uint32_t)r->key == number && r->state == STATE_ARMED) {
                registration_activate(poller, r);
                add_pending(poller, r);
        }
}

/* The bell has been rung for these slots: their registrations become ACTIVE. */
static void mark_dirty_ready(struct poller *poller, uint32_t arena, int bell)
{
        uint64_t dirty = atomic_exchange(dirty_slots(arena, bell), 0);

        for (; dirty; dirty &= dirty - 1) {
                uint32_t number = atomic_load(&mapping_of(arena)->slots[__builtin_ctzll(dirty)]), i;

                if (!number)
                        continue;
                i = load_relaxed(&poller_only[number - 1]);
                if (i && i != SEVERAL) {
                        mark_ready(poller, &registrations[i - 1], number);
                } else if (i) {
                        /* Chains are read under the table's lock, which comes before ours. */
                        atomic_fetch_or(dirty_slots(arena, bell), dirty & -dirty);
                        poller->settle_due = true;
                }
        }
}

static void bell_rang(struct poller *poller, uint32_t arena, int bell, uint32_t events)
{
        struct mapping *mapping = mapping_of(arena);

        if (bell_descriptor(arena, bell) < 0) {
                /* The bell of a process that shares the instance by fork: the kernel has given us
                 * its event. So what it was for is ours to find, among all that we have. */
                if (atomic_load(&mapping->base))
                        bell_look(arena, bell);
                poller->settle_due = poller->rescan_due = true;
                return;
        }
        /* Each time that we arm it, the peer rings once at most. So the bell can't be full before
         * this. */
        if (events & (EPOLLHUP | EPOLLERR) || load_relaxed(&mapping->armed[bell]) > FULL_BELL) {
                store_relaxed(&mapping->armed[bell], 0);
                if (!bell_drain(arena, bell) && atomic_load(&mapping->remote))
                        /* TCP doesn't report that the relay has ended. */
                        poller->settle_due = poller->rescan_due = true;
        }
        bell_look(arena, bell);
        mark_dirty_ready(poller, arena, bell);
}

/* What mark_dirty_ready() has left. Under both locks. */
static void settle(struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);
        bool rescan;

        atomic_store(&poller->settle_due, false);
        rescan = atomic_exchange(&poller->rescan_due, false);
        for (uint32_t i = 0; i < registrations_used && rescan; i++) {
                struct registration *r = &registrations[i];
                struct end *end = registration_is_of(poller, r) && r->key ? registration_end(r) : NULL;

                if (end) {
                        registration_refresh(poller, r, end, true);
                        mark_ready(poller, r, (uint32_t)r->key);
                }
        }
        for (uint32_t arena = 0; arena < high && arena < ARENAS; arena++) {
                int bell = poller_bell(poller, arena);
                uint64_t dirty = bell < 0 ? 0 : atomic_exchange(dirty_slots(arena, bell), 0);

                for (; dirty; dirty &= dirty - 1) {
                        uint32_t number = atomic_load(&mapping_of(arena)->slots[__builtin_ctzll(dirty)]);
                        struct registration *r = NULL;

                        while (number && (r = registration_of_end(&family->ends[number - 1], r)))
                                mark_ready(poller, r, number);
                }
        }
}

void poller_settle(struct poller *poller)
{
        enum taken outer = lock_take(&poller_table, self());
        enum taken taken = lock_take(&poller->lock, self());

        settle(poller);
        lock_release(&poller->lock, taken);
        lock_release(&poller_table, outer);
}

/* --- the kernel's events --- */

/* An event for the program, of a registration that has our tag. Returns the number of events. */
static int untag(struct registration *r, uint32_t reported, struct epoll_event *event)
{
        reported &= r->events | EPOLLERR | EPOLLHUP;
        if (!reported)
                return 0;
        r->fired = (r->events & EPOLLONESHOT) != 0;
        *event = (struct epoll_event){.events = reported, .data.u64 = r->data};
        return 1;
}

/* Take our own descriptors' events out of what the kernel returned. Returns how many are left.
 * Under the poller's lock. */
static int sort_out_own(struct poller *poller, struct epoll_event *events, int count)
{
        bool ours = false;
        int kept = 0;

        for (int i = 0; i < count; i++) {
                uint64_t data = events[i].data.u64;

                if ((data & TAG_MASK) == TAG_REGISTRATION) {
                        struct registration *r = registration_of_tag(poller, data);

                        if (!r || (r->state == STATE_KERNEL && r->fired))
                                continue;
                        if (r->state == STATE_KERNEL) {
                                kept += untag(r, events[i].events, &events[kept]);
                                continue;
                        }
                        r->kernel_events |= events[i].events;
                        r->kernel_edge = true;
                        if (r->state == STATE_ARMED)
                                registration_activate(poller, r);
                        add_pending(poller, r);
                        ours = true;
                } else if ((data & TAG_MASK) != TAG_BELL) {
                        events[kept++] = events[i];
                } else if (data == TAG_WAKE) {
                        poller_take_wakeup(poller);
                } else {
                        bell_rang(poller, (uint32_t)(data >> 8) & (ARENAS - 1), (int)(data & 0xff),
                                  events[i].events);
                }
        }
        if (ours)
                ready_kernel_reported();
        return kept;
}

/* The same, and what it couldn't do under one lock: `*settled`. Under the poller's lock, which it
 * releases for a moment.
 */
static int take_kernel_events(struct poller *poller, struct epoll_event *events, int count, enum taken *taken,
                              bool *settled)
{
        count = sort_out_own(poller, events, count);
        *settled = poller->settle_due;
        if (*settled) {
                lock_release(&poller->lock, *taken);
                poller_settle(poller);
                *taken = lock_take(&poller->lock, self());
        }
        return count;
}

/* Pending connections that have left their rings: the kernel reports them to the program again, at
 * once if there is something. Returns whether there are any. Under the poller's lock. */
static bool return_to_kernel(struct poller *poller)
{
        bool any = false;

        for (uint32_t i = 0; i < poller->pending_count; i++) {
                struct registration *r = &registrations[poller->pending[i]];
                struct end *end =
                    registration_is_of(poller, r) && r->state == STATE_ACTIVE ? registration_end(r) : NULL;

                if (end && !end_uses_ring(end)) {
                        registration_to_kernel(poller, r, false);
                        any = true;
                }
        }
        return any;
}

/* --- events of rings --- */

static void report(struct poller *poller, struct registration *r, struct end *end, uint32_t events,
                   struct list *list, uint32_t turn)
{
        list->events[list->count] = (struct epoll_event){.events = events, .data.u64 = r->data};
        list->stamps[list->count] = ready_bytes(end) ? load_relaxed(&end_receives(end).ring->stamp) : 0;
        r->empty_checks = 0;
        r->turn = turn;
        r->position = (uint32_t)list->count++;
        if (r->events & EPOLLONESHOT)
                registration_deactivate(poller, r, STATE_OFF);
}

/* Shell sort by stamp. */
static void put_in_order(struct list *list)
{
        for (int gap = list->count / 2; gap; gap /= 2)
                for (int i = gap; i < list->count; i++) {
                        struct epoll_event event = list->events[i];
                        uint64_t stamp = list->stamps[i];
                        int k = i;

                        for (; k >= gap && list->stamps[k - gap] > stamp; k -= gap) {
                                list->events[k] = list->events[k - gap];
                                list->stamps[k] = list->stamps[k - gap];
                        }
                        list->events[k] = event;
                        list->stamps[k] = stamp;
                }
}

/* Begin the active list at `first`; what was before it comes after its last one. */
static void rotate(struct poller *poller, uint32_t first)
{
        uint32_t tail = first, before = registrations[first].previous;

        while (registrations[tail].next != NONE)
                tail = registrations[tail].next;
        registrations[tail].next = poller->active;
        registrations[poller->active].previous = tail;
        registrations[first].previous = NONE;
        registrations[before].next = NONE;
        poller->active = first;
}

/* Ring events of the ACTIVE registrations. Under the poller's lock. */
static void harvest(struct poller *poller, struct list *list, int size, bool spinning)
{
        uint32_t i = poller->active, last = NONE;

        while (i != NONE && list->count < size) {
                struct registration *r = &registrations[i];
                struct end *end = registration_end(r);
                uint32_t events, next = r->next;

                if (!end) {
                        registration_deactivate(poller, r, STATE_ARMED);
                        i = next;
                        continue;
                }
                if (!end_uses_ring(end)) {
                        registration_to_kernel(poller, r, false);
                        i = next;
                        continue;
                }
                events = registration_events(r, end, true);
                if (events) {
                        report(poller, r, end, events, list, poller->turn);
                        last = i;
                } else if (!spinning && ++r->empty_checks > QUIET && registration_arm(poller, r, end) &&
                           !registration_events(r, end, false)) {
                        registration_deactivate(poller, r, STATE_ARMED);
                }
                i = next;
        }
        /* With more ready than there is room for, the next call begins after the last one reported.
         */
        if (list->count == size && last != NONE && registrations[last].state == STATE_ACTIVE && i != NONE)
                rotate(poller, i);
}

/* What the pending registrations have to report. Under the poller's lock. */
static void report_pending(struct poller *poller, struct list *list, int size, uint32_t turn)
{
        for (uint32_t i = 0; i < poller->pending_count; i++) {
                struct registration *r = &registrations[poller->pending[i]];
                struct end *end =
                    registration_is_of(poller, r) && r->state == STATE_ACTIVE ? registration_end(r) : NULL;
                uint32_t events;

                if (!end || !end_uses_ring(end) || (r->turn != turn && list->count == size))
                        continue;
                events = registration_events(r, end, true);
                if (events && r->turn == turn)
                        list->events[r->position].events |= events;
                else if (events)
                        report(poller, r, end, events, list, turn);
        }
        poller->pending_count = 0;
}

/* Rings are checked one by one. So one that was checked early may have got something before one
 * that was found later: report it too. Under the poller's lock. */
static void report_earlier(struct poller *poller, struct list *list, int size, uint32_t turn)
{
        uint64_t latest = 0;

        for (int i = 0; i < list->count; i++)
                latest = list->stamps[i] > latest ? list->stamps[i] : latest;
        for (uint32_t i = poller->active, next; latest && i != NONE && list->count < size; i = next) {
                struct registration *r = &registrations[i];
                struct end *end = r->turn == turn ? NULL : registration_end(r);
                uint32_t events;

                /* Before it is reported: then it may leave the list. */
                next = r->next;
                if (!end || !ready_bytes(end) || load_relaxed(&end_receives(end).ring->stamp) > latest)
                        continue;
                events = registration_events(r, end, true);
                if (events)
                        report(poller, r, end, events, list, turn);
        }
}

/* --- all together --- */

/* Events of epoll instances inside this one. Under the poller's lock. */
static int harvest_nested(struct poller *poller, struct epoll_event *events, int size)
{
        int count = 0;

        for (uint32_t i = poller->nested; i != NONE && count < size; i = registrations[i].next_nested) {
                struct registration *r = &registrations[i];
                struct epoll_event once = {.events = EPOLLONESHOT};

                if (!registration_nested_ready(r))
                        continue;
                events[count++] = (struct epoll_event){.events = EPOLLIN, .data.u64 = r->data};
                if (r->events & EPOLLONESHOT) {
                        /* The kernel must not report it again. */
                        registration_retag(r);
                        once.data.u64 = registration_tag(r);
                        sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &once);
                        r->fired = true;
                }
        }
        return count;
}

/* Append events to others. What is among those already is reported once. */
static int merge(struct epoll_event *events, int known, struct epoll_event *more, int count)
{
        int total = known;

        for (int i = 0; i < count; i++) {
                int k = 0;

                while (k < known && events[k].data.u64 != more[i].data.u64)
                        k++;
                if (k < known)
                        events[k].events |= more[i].events;
                else
                        events[total++] = more[i];
        }
        return total;
}

/* After a sleep that only a bell has ended: can what it was for be reported without another look at
 * the kernel? Yes, if it is the only registration that is ACTIVE. It was published before the bell
 * was rung. So what came earlier, another bell or an event of TCP, was there when the kernel
 * collected its events. Several may have come in another order than their bells. */
static bool is_alone(const struct poller *poller)
{
        return poller->pending_count == 1 && poller->active == poller->pending[0] &&
               registrations[poller->active].next == NONE && poller->nested == NONE && !poller->polled;
}

int poller_translate(struct poller *poller, struct epoll_event *events, int count, int size)
{
        enum taken taken = lock_take(&poller->lock, self());
        /* Another thread may have the next turn, while the lock is released. */
        uint32_t turn = ++poller->turn;
        bool has_all = count < size, settled;
        struct list list;

        poller->pending_count = 0;
        count = take_kernel_events(poller, events, count, &taken, &settled);
        if (!count && poller->ring_count > 1 && (!has_all || settled || !is_alone(poller))) {
                /* Other rings may have something by now, and the kernel is polled once more. */
                lock_release(&poller->lock, taken);
                return 0;
        }
        list.events = events + count;
        list.count = 0;
        report_pending(poller, &list, at_most(size - count), turn);
        report_earlier(poller, &list, at_most(size - count), turn);
        put_in_order(&list);
        count += list.count;
        if (count)
                poller_pass_on(poller);
        lock_release(&poller->lock, taken);
        return count;
}

/* Poll the kernel, until it has events for the program or no event at all. Under the poller's lock.
 */
static int poll_kernel(struct poller *poller, struct epoll_event *events, int room, enum taken *taken)
{
        bool again = room > 0, settled;
        int count = 0;

        poller->pending_count = 0;
        /* Events for us alone have taken the place of those that may be behind them. */
        for (int calls = 0; again && !count && calls < MOST_CALLS; calls++) {
                int got = (int)sys_6(SYS_epoll_pwait, poller->epfd - 1, events, room, 0, 0, 8);

                count = take_kernel_events(poller, events, got > 0 ? got : 0, taken, &settled);
                again = got == room || return_to_kernel(poller);
        }
        return count;
}

int poller_collect(struct poller *poller, struct epoll_event *events, int size, bool with_kernel,
                   bool spinning)
{
        struct epoll_event others[BATCH];
        struct list list;
        enum taken taken = lock_take(&poller->lock, self());
        /* There must be room for what the kernel has. */
        int limit = size - (size + 3) / 4, count = 0;
        uint32_t turn = ++poller->turn;

        if (size == 1)
                limit = !with_kernel && turn % TURNS != 0;
        limit = at_most(limit);
        list.events = events;
        list.count = 0;
        harvest(poller, &list, limit, spinning);
        if (poller->nested != NONE)
                count = harvest_nested(poller, others, size - list.count < BATCH ? size - list.count : BATCH);
        if (with_kernel || poller->polled || !limit ||
            (list.count + count && load_relaxed(&poller->added) > 1)) {
                struct epoll_event of_kernel[BATCH];
                int room = size - list.count - count;

                if (room > BATCH - count)
                        room = BATCH - count;
                /* Only an instance inside this one is reported in both ways. */
                count = merge(others, count, of_kernel, poll_kernel(poller, of_kernel, room, &taken));
                report_pending(poller, &list, at_most(size - count), turn);
                if (!list.count && !count && !limit)
                        harvest(poller, &list, size, spinning);
        }
        report_earlier(poller, &list, at_most(size - count), turn);
        put_in_order(&list);
        if (count) {
                memmove(events + count, events, (size_t)list.count * sizeof *events);
                memcpy(events, others, (size_t)count * sizeof *events);
        }
        count += list.count;
        if (count)
                poller_pass_on(poller);
        lock_release(&poller->lock, taken);
        return count;
}
