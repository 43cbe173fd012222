#include "poll_wait.h"

#include "identity.h"
#include "poller.h"
#include "ready.h"
#include "remote.h"
#include "scratch.h"
#include "sleep.h"
#include "statistics.h"

/* --- what the descriptors are --- */

enum kind { KIND_PLAIN, KIND_COUNTED, KIND_RING, KIND_POLLER };

static enum kind kind_of_end(const struct end *end)
{
        uint32_t rx = load_acquire(&end->rx.phase);
        uint32_t tx = load_acquire(&end->tx.phase);

        if (rx == PHASE_READY || rx == PHASE_RING || tx == PHASE_RING)
                return KIND_RING;
        /* After a ring too: the end may begin again (reentry.h). */
        return rx == PHASE_TCP || !load_relaxed(&end->final) ? KIND_COUNTED : KIND_PLAIN;
}

static enum kind kind_of(int fd, uint64_t *key)
{
        struct end *end = fd < 0 ? NULL : end_of(fd, key);

        if (!end)
                return fd >= 0 && poller_is(fd) ? KIND_POLLER : KIND_PLAIN;
        return kind_of_end(end);
}

static struct end *ring_end(int fd)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);

        return end && end_is(end, key) && kind_of_end(end) == KIND_RING ? end : NULL;
}

enum poll_needs poll_needs(struct pollfd *fds, nfds_t count)
{
        enum poll_needs needs = POLL_KERNEL;
        uint64_t key;

        for (nfds_t i = 0; i < count; i++)
                switch (kind_of(fds[i].fd, &key)) {
                case KIND_RING:
                case KIND_POLLER:
                        return POLL_RINGS;
                case KIND_COUNTED:
                        needs = POLL_KERNEL_COUNTED;
                        break;
                case KIND_PLAIN:
                        break;
                }
        return needs;
}

/* In a key: the sleep is one with a bell of the connection's slot. */
#define ON_BELL UINT64_C(0x80000000)

static _Atomic uint32_t *counter_of(uint64_t key)
{
        struct end *end = &family->ends[(uint32_t)(key & ~ON_BELL) - 1];

        return key & ON_BELL ? &end->waits : &end->rx.kernel;
}

/* Count the call. `bells`: it will check rings, and arm bells for them. False: a connection isn't
 * where the call would look for it any more. */
static bool begin(const struct pollfd *fds, nfds_t count, uint64_t *keys, bool bells)
{
        bool unchanged = true;

        for (nfds_t i = 0; i < count; i++) {
                uint64_t key = 0;
                enum kind kind = kind_of(fds[i].fd, &key);

                keys[i] = kind == KIND_COUNTED ? key : kind == KIND_RING && bells ? key | ON_BELL : 0;
                if (kind == KIND_RING && !bells)
                        unchanged = false;
                if (!keys[i])
                        continue;
                atomic_fetch_add(counter_of(keys[i]), 1);
                /* Pairs with upgrade_receiver(): it sees the count, or we see the ring. And with
                 * flow_leave_slot(): it sees the count, or we see that the ring is gone. */
                atomic_thread_fence(memory_order_seq_cst);
                if (kind_of(fds[i].fd, &key) != kind)
                        unchanged = false;
        }
        return unchanged;
}

bool poll_kernel_begin(const struct pollfd *fds, nfds_t count, uint64_t *keys)
{
        return begin(fds, count, keys, false);
}

void poll_kernel_end(nfds_t count, const uint64_t *keys)
{
        for (nfds_t i = 0; i < count; i++)
                if (keys[i] && end_is(&family->ends[(uint32_t)(keys[i] & ~ON_BELL) - 1], keys[i]))
                        atomic_fetch_sub(counter_of(keys[i]), 1);
}

/* --- checking --- */

/* The events of a descriptor's ring. */
static short ring_events(const struct pollfd *polled)
{
        struct end *end;
        short events = 0;

        if (polled->fd < 0)
                return 0;
        if (poller_is(polled->fd))
                return poller_ready(polled->fd) ? polled->events & (POLLIN | POLLRDNORM) : 0;
        end = ring_end(polled->fd);
        if (!end)
                return 0;
        if (polled->events & (POLLIN | POLLRDNORM) && ready_bytes(end))
                events |= polled->events & (POLLIN | POLLRDNORM);
        if (polled->events & (POLLOUT | POLLWRNORM) && ready_space(end))
                events |= polled->events & (POLLOUT | POLLWRNORM);
        if (ready_broken(end))
                events |= (short)remote_broken_events((uint16_t)polled->events);
        if (events && !identity_holds(polled->fd, end)) {
                identity_lost(polled->fd);
                return 0;
        }
        return events;
}

/* Set `revents` to the rings' events. Returns the number of descriptors with events. */
static int check(struct pollfd *fds, nfds_t count)
{
        int ready = 0;

        for (nfds_t i = 0; i < count; i++) {
                fds[i].revents = ring_events(&fds[i]);
                ready += fds[i].revents != 0;
        }
        return ready;
}

/* All descriptors have events, and TCP has none to add. */
static bool is_all(const struct pollfd *fds, nfds_t count, int ready)
{
        if ((nfds_t)ready != count)
                return false;
        for (nfds_t i = 0; i < count; i++) {
                struct end *end = ring_end(fds[i].fd);

                if (end && ready_end(end))
                        return false;
        }
        return true;
}

/* The first end that has received something from a peer on another core. Its spinner knows whether
 * spinning pays. */
static struct end *spinning_end(const struct pollfd *fds, nfds_t count)
{
        uint32_t here = core();

        for (nfds_t i = 0; i < count && i < POLL_FEW; i++) {
                struct end *end = ring_end(fds[i].fd);
                uint32_t there = end ? load_relaxed(&end_receives(end).ring->sender_cpu) : 0;

                if (there && there != here)
                        return end;
        }
        return NULL;
}

struct checked {
        struct pollfd *fds;
        nfds_t count;
};

static int check_while_spinning(void *context)
{
        const struct checked *checked = context;

        return check(checked->fds, checked->count);
}

static bool spin(struct pollfd *fds, nfds_t count)
{
        struct end *end = spinning_end(fds, count);
        struct checked checked = {fds, count};

        return end &&
               spin_until(&end->rx.spinner, spin_budget(&end->rx.spinner), check_while_spinning, &checked);
}

/* --- bells --- */

struct poll_bell {
        uint32_t arena;
        int bell;
};

/* The bells of a wait: one per arena. */
struct bells {
        int count;
        unsigned reasons; /* for a short sleep */
        struct poll_bell *of;
};

static int bell_for(struct bells *bells, uint32_t arena)
{
        int bell;

        for (int i = 0; i < bells->count; i++)
                if (bells->of[i].arena == arena)
                        return bells->of[i].bell;
        bell = bell_take(arena, false);
        if (bell >= 0)
                bells->of[bells->count++] = (struct poll_bell){arena, bell};
        return bell;
}

/* Arm a connection's ring. Returns reasons for a short sleep. */
static unsigned arm_end(struct end *end, short events, struct bells *bells)
{
        uint32_t arena = atomic_load(&end->place.arena);
        int bell = bell_for(bells, arena);

        if (bell < 0) {
                if (events & (POLLIN | POLLRDNORM))
                        sleep_without_bell(end, arena);
                return SLEEP_NO_BELL;
        }
        sleep_arm(end, bell, events & (POLLIN | POLLRDNORM) || end_is_remote(end),
                  events & (POLLOUT | POLLWRNORM) && atomic_load(&end->tx.phase) == PHASE_RING);
        return !bell_is_known(arena, atomic_load(&end->place.side), bell) || ready_between(end)
                   ? SLEEP_UNRINGABLE
                   : 0;
}

static void arm(const struct pollfd *fds, nfds_t count, struct bells *bells)
{
        for (nfds_t i = 0; i < count; i++) {
                struct end *end;

                if (poller_is(fds[i].fd)) {
                        bells->reasons |= poller_arm(fds[i].fd) ? SLEEP_UNRINGABLE : 0;
                        continue;
                }
                end = ring_end(fds[i].fd);
                if (end)
                        bells->reasons |= arm_end(end, fds[i].events, bells);
        }
}

static void disarm(const struct pollfd *fds, nfds_t count, struct bells *bells)
{
        for (nfds_t i = 0; i < count; i++) {
                struct end *end = ring_end(fds[i].fd);

                if (!end)
                        continue;
                for (int b = 0; b < bells->count; b++)
                        if (bells->of[b].arena == atomic_load(&end->place.arena)) {
                                wait_end(&end_receives(end).ring->receivers, bells->of[b].bell);
                                wait_end(&end_sends(end).ring->senders, bells->of[b].bell);
                                break;
                        }
        }
        for (int b = 0; b < bells->count; b++)
                bell_return(bells->of[b].arena, bells->of[b].bell);
        bells->count = 0;
}

/* --- the kernel's part --- */

/* The kernel's events that must not wake us while they are deferred. Once both sides are shut down,
 * all that it can report is POLLHUP. */
static void leave_out_deferred(struct pollfd *polled, const struct end *end)
{
        polled->events &= (short)~(POLLIN | POLLRDNORM | POLLRDBAND | POLLRDHUP);
        if (load_relaxed(&end->shut) & 6)
                polled->fd = -1;
}

/* What to poll in the kernel: room in TCP's buffer means nothing for bytes that go to the ring.
 * Returns whether something is left out that a sleep would miss. */
static bool copy_for_kernel(const struct pollfd *fds, nfds_t count, struct pollfd *copy, bool asleep)
{
        bool deferred = false;

        for (nfds_t i = 0; i < count; i++) {
                struct end *end = ring_end(fds[i].fd);

                copy[i] = (struct pollfd){.fd = fds[i].fd, .events = fds[i].events};
                if (end && copy[i].events & (POLLOUT | POLLWRNORM) &&
                    atomic_load(&end->tx.phase) == PHASE_RING)
                        copy[i].events = (short)((copy[i].events & ~(POLLOUT | POLLWRNORM)) | POLLRDHUP);
                if (end && remote_is_early(end))
                        copy[i].events |= POLLRDHUP;
                if (end && asleep && remote_defers(end)) {
                        leave_out_deferred(&copy[i], end);
                        deferred = true;
                }
        }
        return deferred;
}

/* Add the kernel's events to the rings'. Returns the number of descriptors with events. */
static int add_kernel_events(struct pollfd *fds, nfds_t count, const struct pollfd *kernel)
{
        bool reported = false;
        int ready = 0;

        for (nfds_t i = 0; i < count; i++) {
                const short out = fds[i].events & (POLLOUT | POLLWRNORM);
                const short raw = kernel[i].revents;
                struct end *end = raw ? ring_end(fds[i].fd) : NULL;
                short more = raw;

                if (end) {
                        reported = true;
                        more = (short)remote_visible(end, fds[i].fd, (uint16_t)raw);
                }
                /* A peer that has closed its side may never read the ring. The next send falls back
                 * to TCP, where there is room, or an error. */
                if (raw & POLLRDHUP && out && !(kernel[i].events & out))
                        more |= out;
                if (!(fds[i].events & POLLRDHUP))
                        more &= (short)~POLLRDHUP;
                fds[i].revents |= more;
                ready += fds[i].revents != 0;
        }
        if (reported)
                ready_kernel_reported();
        return ready;
}

/* --- waiting --- */

/* Memory for a wait for `count` descriptors. */
struct memory {
        struct pollfd *copy; /* 2 * count: the descriptors, and the bells */
        struct poll_bell *bells;
        uint64_t *keys;
};

/* All events that there are now, the kernel's too. */
static int check_all(struct pollfd *fds, nfds_t count, int ready, struct pollfd *copy, const sigset_t *mask)
{
        static const struct timespec at_once;
        int got;

        if (is_all(fds, count, ready))
                return ready;
        copy_for_kernel(fds, count, copy, false);
        got = real()->ppoll(copy, count, &at_once, mask);
        if (got < 0)
                return ready ? ready : got;
        return add_kernel_events(fds, count, copy);
}

/* One sleep. Returns the number of descriptors with events, which may be 0, or -1 with errno set.
 */
static int sleep_once(struct pollfd *fds, nfds_t count, const struct memory *memory, struct sleep *sleep,
                      const sigset_t *mask)
{
        struct bells bells = {.of = memory->bells};
        struct pollfd *copy = memory->copy;
        bool here = begin(fds, count, memory->keys, true);
        struct end *end;
        int ready, got;

        /* From here on each connection is where we look for it. */
        if (here)
                arm(fds, count, &bells);
        if (!here || check(fds, count)) {
                disarm(fds, count, &bells);
                poll_kernel_end(count, memory->keys);
                return check_all(fds, count, check(fds, count), copy, mask);
        }
        if (copy_for_kernel(fds, count, copy, true))
                bells.reasons |= SLEEP_DEFERRED;
        for (int b = 0; b < bells.count; b++)
                copy[count + (nfds_t)b] = (struct pollfd){
                    .fd = bell_descriptor(bells.of[b].arena, bells.of[b].bell), .events = POLLIN};
        end = spinning_end(fds, count);
        got = sleep_in_poll(copy, count + (nfds_t)bells.count,
                            sleep_duration(sleep, sleep_left(sleep), bells.reasons), mask,
                            end ? &end->rx.spinner : NULL);
        for (int b = 0; b < bells.count; b++)
                if (got > 0 && copy[count + (nfds_t)b].revents)
                        bell_drain(bells.of[b].arena, bells.of[b].bell);
        disarm(fds, count, &bells);
        poll_kernel_end(count, memory->keys);
        if (got < 0)
                return got;
        ready = check(fds, count);
        return got > 0 ? add_kernel_events(fds, count, copy) : ready;
}

static int wait_with(struct pollfd *fds, nfds_t count, const struct memory *memory, int64_t timeout,
                     const sigset_t *mask)
{
        bool spun = false;
        struct sleep sleep;

        sleep_start(&sleep, sleep_deadline(timeout));
        for (;;) {
                int ready = check(fds, count);

                if (!ready && timeout && !spun) {
                        spun = true;
                        if (spin(fds, count)) {
                                statistics_count(&statistics.spins);
                                ready = check(fds, count);
                        }
                }
                if (ready || !timeout) {
                        ready = check_all(fds, count, ready, memory->copy, mask);
                        if (ready || !timeout)
                                return ready;
                }
                ready = sleep_once(fds, count, memory, &sleep, mask);
                if (ready)
                        return ready;
                if (sleep.deadline && !sleep_left(&sleep))
                        return 0;
        }
}

int poll_wait(struct pollfd *fds, nfds_t count, int64_t timeout, const sigset_t *mask)
{
        struct pollfd few[2 * POLL_FEW];
        struct poll_bell few_bells[POLL_FEW];
        uint64_t few_keys[POLL_FEW];
        struct memory memory = {few, few_bells, few_keys};
        struct scratch own;
        int ready;

        if (count > POLL_FEW) {
                memory.copy = scratch_take(
                    SCRATCH_WAIT, count * (2 * sizeof *few + sizeof *few_bells + sizeof *few_keys), &own);
                if (!memory.copy)
                        return -1;
                memory.keys = (uint64_t *)(void *)(memory.copy + 2 * count);
                memory.bells = (struct poll_bell *)(void *)(memory.keys + count);
        }
        ready = wait_with(fds, count, &memory, timeout, mask);
        if (count > POLL_FEW)
                scratch_return(SCRATCH_WAIT, &own);
        return ready;
}
