/* epoll, poll() and select(). */
#include "calls.h"

#include "arena.h"
#include "clock.h"
#include "identity.h"
#include "io_uring.h"
#include "poller.h"
#include "ready.h"
#include "reclaim.h"
#include "remote.h"
#include "spin.h"
#include "statistics.h"
#include "sys.h"
#include "upgrade.h"
#include "wait.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

enum {
        FEW = 64,           /* descriptors of a poll() that fit the stack */
        LONGEST_BLIND = 16, /* ms, when there is no bell */
        FIRST_NAP = 1,      /* ms */
        LONGEST_NAP = 1000,
};

/* --- epoll --- */

static int made(int fd)
{
        if (fd >= 0)
                poller_made(fd);
        return fd;
}

CALL int epoll_create(int size)
{
        return made(real()->epoll_create(size));
}

CALL int epoll_create1(int flags)
{
        return made(real()->epoll_create1(flags));
}

CALL int epoll_ctl(int epfd, int operation, int fd, struct epoll_event *event)
{
        uint64_t key;
        struct end *end = operation == EPOLL_CTL_ADD ? end_of(fd, &key) : NULL;

        if (end && atomic_load(&end->stage) == STAGE_ATTACHED && !identity_holds(fd, end))
                identity_lost(fd);
        return poller_control(epfd, operation, fd, event);
}

static int64_t from_ms(int ms)
{
        return ms < 0 ? -1 : ms * INT64_C(1000000);
}

/* What ns can't say, some hundred years, is for ever. */
static int64_t from_timespec(const struct timespec *time)
{
        return time && time->tv_sec < INT64_MAX / INT64_C(2000000000)
                   ? time->tv_sec * INT64_C(1000000000) + time->tv_nsec
                   : -1;
}

CALL int epoll_wait(int epfd, struct epoll_event *events, int size, int timeout)
{
        bool ours;
        int count;

        io_uring_check();
        count = poller_wait(epfd, events, size, from_ms(timeout), NULL, &ours);

        return ours ? count : real()->epoll_wait(epfd, events, size, timeout);
}

CALL int epoll_pwait(int epfd, struct epoll_event *events, int size, int timeout, const sigset_t *mask)
{
        bool ours;
        int count;

        io_uring_check();
        count = poller_wait(epfd, events, size, from_ms(timeout), mask, &ours);

        return ours ? count : real()->epoll_pwait(epfd, events, size, timeout, mask);
}

CALL int epoll_pwait2(int epfd, struct epoll_event *events, int size, const struct timespec *timeout,
                      const sigset_t *mask)
{
        bool ours = false;
        int count = 0;

        if (!timeout || (timeout->tv_nsec >= 0 && timeout->tv_nsec < 1000000000 && timeout->tv_sec >= 0))
                count = poller_wait(epfd, events, size, from_timespec(timeout), mask, &ours);
        if (ours)
                return count;
        if (real()->epoll_pwait2)
                return real()->epoll_pwait2(epfd, events, size, timeout, mask);
        return (int)result(-ENOSYS);
}

/* --- poll() --- */

enum kind { KIND_PLAIN, KIND_COUNTED, KIND_RING, KIND_POLLER };

static enum kind kind_of(int fd, uint64_t *key)
{
        struct end *end = fd < 0 ? NULL : end_of(fd, key);
        uint32_t rx, tx;

        if (!end)
                return fd >= 0 && poller_is(fd) ? KIND_POLLER : KIND_PLAIN;
        rx = atomic_load_explicit(&end->rx.phase, memory_order_acquire);
        tx = atomic_load_explicit(&end->tx.phase, memory_order_acquire);
        if (rx == PHASE_READY || rx == PHASE_RING || tx == PHASE_RING)
                return KIND_RING;
        return rx == PHASE_TCP ? KIND_COUNTED : KIND_PLAIN;
}

static struct end *ring_end(int fd)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);

        return end && end_is(end, key) && kind_of(fd, &key) == KIND_RING ? end : NULL;
}

/* What the ring adds to a descriptor's events. */
static short ring_events(const struct pollfd *polled)
{
        struct end *end;
        short found = 0;

        if (polled->fd < 0)
                return 0;
        if (poller_is(polled->fd))
                return poller_ready(polled->fd) ? polled->events & (POLLIN | POLLRDNORM) : 0;
        end = ring_end(polled->fd);
        if (!end)
                return 0;
        if (polled->events & (POLLIN | POLLRDNORM) && ready_bytes(end))
                found |= polled->events & (POLLIN | POLLRDNORM);
        if (polled->events & (POLLOUT | POLLWRNORM) && ready_space(end))
                found |= polled->events & (POLLOUT | POLLWRNORM);
        if (ready_broken(end))
                found |= (short)remote_broken_events((uint16_t)polled->events);
        if (found && !identity_holds(polled->fd, end)) {
                identity_lost(polled->fd);
                return 0;
        }
        return found;
}

static int look(struct pollfd *fds, nfds_t count)
{
        int found = 0;

        for (nfds_t i = 0; i < count; i++) {
                fds[i].revents = ring_events(&fds[i]);
                found += fds[i].revents != 0;
        }
        return found;
}

/* The ring says all that there is to say of these descriptors. */
static bool is_all(const struct pollfd *fds, nfds_t count, int found)
{
        if ((nfds_t)found != count)
                return false;
        for (nfds_t i = 0; i < count; i++) {
                struct end *end = ring_end(fds[i].fd);

                if (end && ready_end(end))
                        return false;
        }
        return true;
}

/* Bells that a wait over several connections needs: one per arena. */
struct bells {
        int count;
        bool all;   /* every connection has one that the other side can ring */
        bool blind; /* for some there is none to be had */
        struct one_bell {
                uint32_t arena;
                int bell;
        } * of;
};

static int bell_for(struct bells *bells, uint32_t arena)
{
        int bell;

        for (int i = 0; i < bells->count; i++)
                if (bells->of[i].arena == arena)
                        return bells->of[i].bell;
        bell = bell_take(arena);
        if (bell >= 0)
                bells->of[bells->count++] = (struct one_bell){arena, bell};
        return bell;
}

static void arm(const struct pollfd *fds, nfds_t count, struct bells *bells)
{
        bells->all = true;
        bells->blind = false;
        for (nfds_t i = 0; i < count; i++) {
                struct end *end;
                uint32_t arena;
                int bell;

                if (fds[i].fd < 0)
                        continue;
                if (poller_is(fds[i].fd)) {
                        if (poller_arm(fds[i].fd))
                                bells->all = false;
                        continue;
                }
                end = ring_end(fds[i].fd);
                if (!end)
                        continue;
                arena = atomic_load(&end->arena);
                bell = bell_for(bells, arena);
                if (bell < 0) {
                        bells->blind = true;
                        if (fds[i].events & (POLLIN | POLLRDNORM) && !bell_is_ordered(arena))
                                wait_elsewhere(end);
                        continue;
                }
                if (fds[i].events & (POLLIN | POLLRDNORM) || end_is_remote(end))
                        wait_begin(&end_receives(end).ring->receivers, bell);
                if (fds[i].events & (POLLOUT | POLLWRNORM) && atomic_load(&end->tx.phase) == PHASE_RING) {
                        ready_ask(end);
                        wait_begin(&end_sends(end).ring->senders, bell);
                }
                if (!bell_is_known(arena, atomic_load(&end->side), bell) || ready_between(end))
                        bells->all = false;
        }
}

static void disarm(const struct pollfd *fds, nfds_t count, struct bells *bells)
{
        for (nfds_t i = 0; i < count; i++) {
                struct end *end = fds[i].fd < 0 ? NULL : ring_end(fds[i].fd);

                if (!end)
                        continue;
                for (int b = 0; b < bells->count; b++)
                        if (bells->of[b].arena == atomic_load(&end->arena)) {
                                wait_end(&end_receives(end).ring->receivers, bells->of[b].bell);
                                wait_end(&end_sends(end).ring->senders, bells->of[b].bell);
                                break;
                        }
        }
        for (int b = 0; b < bells->count; b++)
                bell_return(bells->of[b].arena, bells->of[b].bell);
        bells->count = 0;
}

/* The end whose experience says whether to spin: one that we hear from and whose peer runs elsewhere. */
static struct end *spinner(const struct pollfd *fds, nfds_t count)
{
        uint32_t here = core();

        for (nfds_t i = 0; i < count && i < FEW; i++) {
                struct end *end = fds[i].fd < 0 ? NULL : ring_end(fds[i].fd);
                uint32_t there =
                    end ? atomic_load_explicit(&end_receives(end).ring->sender_cpu, memory_order_relaxed) : 0;

                if (there && there != here)
                        return end;
        }
        return NULL;
}

static bool spin(struct pollfd *fds, nfds_t count)
{
        struct end *end = spinner(fds, count);
        uint64_t budget = end ? spin_budget(&end->rx.spinner) : 0, begin = budget ? now() : 0;
        bool found = false;

        if (!budget)
                return false;
        do
                for (int i = 0; i < SPIN_LOOKS && !found; i++) {
                        relax();
                        found = look(fds, count) != 0;
                }
        while (!found && now() - begin < budget);
        spin_learn(&end->rx.spinner, found, budget, now() - begin);
        return found;
}

/* What the kernel isn't to wake us for while it is held back; its next word is that both sides are closed. */
static void leave_out(struct pollfd *polled, const struct end *end)
{
        polled->events &= (short)~(POLLIN | POLLRDNORM | POLLRDBAND | POLLRDHUP);
        if (atomic_load_explicit(&end->shut, memory_order_relaxed) & 6)
                polled->fd = -1;
}

/* The kernel's part: room in TCP's buffer means nothing for what goes to the ring. Returns whether something
 * is left out that a sleep would miss. */
static bool copy_for_kernel(const struct pollfd *fds, nfds_t count, struct pollfd *copy, bool asleep)
{
        bool withheld = false;

        for (nfds_t i = 0; i < count; i++) {
                struct end *end = fds[i].fd < 0 ? NULL : ring_end(fds[i].fd);

                copy[i] = (struct pollfd){.fd = fds[i].fd, .events = fds[i].events};
                if (end && copy[i].events & (POLLOUT | POLLWRNORM) &&
                    atomic_load(&end->tx.phase) == PHASE_RING)
                        copy[i].events = (short)((copy[i].events & ~(POLLOUT | POLLWRNORM)) | POLLRDHUP);
                if (end && remote_is_early(end))
                        copy[i].events |= POLLRDHUP;
                if (end && asleep && remote_defers(end)) {
                        leave_out(&copy[i], end);
                        withheld = true;
                }
        }
        return withheld;
}

/* Put the kernel's events beside the ring's. Returns descriptors with events. */
static int both(struct pollfd *fds, nfds_t count, const struct pollfd *kernel)
{
        int found = 0;
        bool news = false;

        for (nfds_t i = 0; i < count; i++) {
                const short out = fds[i].events & (POLLOUT | POLLWRNORM);
                const short raw = kernel[i].revents;
                struct end *end = raw && fds[i].fd >= 0 ? ring_end(fds[i].fd) : NULL;
                short more = raw;

                /* An instance of ours may only have had a bell: epoll_wait() would tell. */
                if (end) {
                        news = true;
                        more = (short)remote_visible(end, fds[i].fd, (uint16_t)raw);
                }
                /* A peer that has closed its side may never read the ring: the next send goes back to TCP,
                 * where there is room, or an error. */
                if (raw & POLLRDHUP && out && !(kernel[i].events & out))
                        more |= out;
                if (!(fds[i].events & POLLRDHUP))
                        more &= (short)~POLLRDHUP;
                fds[i].revents |= more;
                found += fds[i].revents != 0;
        }
        if (news)
                atomic_fetch_add_explicit(&ready_news, 1, memory_order_relaxed);
        return found;
}

/* Calls in the kernel that don't look at the ring, for the connections that may get one: none may while they
 * last. False: one has got one by now. */
static bool blind_begin(const struct pollfd *fds, nfds_t count, uint64_t *keys)
{
        bool blind = true;

        for (nfds_t i = 0; i < count; i++) {
                uint64_t key;

                keys[i] = fds[i].fd >= 0 && kind_of(fds[i].fd, &key) == KIND_COUNTED ? key : 0;
                if (!keys[i])
                        continue;
                atomic_fetch_add(&family->ends[(uint32_t)key - 1].rx.kernel, 1);
                /* Pairs with upgrade_receiver(). */
                atomic_thread_fence(memory_order_seq_cst);
                if (kind_of(fds[i].fd, &key) == KIND_RING)
                        blind = false;
        }
        return blind;
}

static void blind_end(nfds_t count, const uint64_t *keys)
{
        for (nfds_t i = 0; i < count; i++)
                if (keys[i]) {
                        struct end *end = &family->ends[(uint32_t)keys[i] - 1];

                        if (end_is(end, keys[i]))
                                atomic_fetch_sub(&end->rx.kernel, 1);
                }
}

/* What a wait() for `count` descriptors needs. */
struct places {
        struct pollfd *copy; /* twice as many */
        struct one_bell *bells;
        uint64_t *keys;
};

/* As ppoll(); timeout in ns, negative: for ever. */
static int wait(struct pollfd *fds, nfds_t count, const struct places *places, int64_t timeout,
                const sigset_t *mask)
{
        struct pollfd *copy = places->copy;
        uint64_t deadline = timeout > 0 ? now() + (uint64_t)timeout : 0;
        int64_t nap = FIRST_NAP * INT64_C(1000000);
        static const struct timespec at_once;
        bool spun = false;

        for (;;) {
                struct bells bells = {.of = places->bells};
                struct timespec time;
                int64_t left = timeout;
                struct end *end;
                uint64_t slept;
                bool withheld;
                int found = look(fds, count), got;

                if (!found && timeout && !spun) {
                        spun = true;
                        if (spin(fds, count)) {
                                statistics_count(&statistics.spins);
                                found = look(fds, count);
                        }
                }
                if (found || !timeout) {
                        if (is_all(fds, count, found))
                                return found;
                        copy_for_kernel(fds, count, copy, false);
                        got = real()->ppoll(copy, count, &at_once, mask);
                        if (got < 0 && !found)
                                return got;
                        if (got >= 0)
                                found = both(fds, count, copy);
                        if (found || !timeout)
                                return found;
                }
                arm(fds, count, &bells);
                if (!blind_begin(fds, count, places->keys) || look(fds, count)) {
                        blind_end(count, places->keys);
                        disarm(fds, count, &bells);
                        continue;
                }
                withheld = copy_for_kernel(fds, count, copy, true);
                for (int b = 0; b < bells.count; b++)
                        copy[count + (nfds_t)b] = (struct pollfd){
                            .fd = bell_descriptor(bells.of[b].arena, bells.of[b].bell), .events = POLLIN};
                if (deadline) {
                        uint64_t present = now();

                        left = present < deadline ? (int64_t)(deadline - present) : 0;
                }
                if (bells.blind && nap > LONGEST_BLIND * INT64_C(1000000))
                        nap = LONGEST_BLIND * INT64_C(1000000);
                if ((!bells.all || bells.blind) && (left < 0 || left > nap)) {
                        left = nap;
                        nap = nap * 2 < LONGEST_NAP * INT64_C(1000000) ? nap * 2
                                                                       : LONGEST_NAP * INT64_C(1000000);
                }
                if (withheld && (left < 0 || left > REMOTE_SLEEP * INT64_C(1000000)))
                        left = REMOTE_SLEEP * INT64_C(1000000);
                left = reclaim_before_sleep(left);
                time.tv_sec = left / 1000000000;
                time.tv_nsec = left % 1000000000;
                statistics_count(&statistics.sleeps);
                end = spinner(fds, count);
                slept = now();
                got = real()->ppoll(copy, count + (nfds_t)bells.count, left < 0 ? NULL : &time, mask);
                blind_end(count, places->keys);
                if (end)
                        spin_slept(&end->rx.spinner, now() - slept);
                for (int b = 0; b < bells.count; b++)
                        if (got > 0 && copy[count + (nfds_t)b].revents)
                                bell_drain(bells.of[b].arena, bells.of[b].bell);
                disarm(fds, count, &bells);
                if (got < 0)
                        return got;
                found = look(fds, count);
                if (got > 0)
                        found = both(fds, count, copy);
                if (found)
                        return found;
                if (deadline && now() >= deadline)
                        return 0;
        }
}

/* Room for calls with many descriptors: kept by the thread until it ends, and not used by a signal handler
 * while the thread does. */
enum which { ROOM_WAIT, ROOM_BLIND, ROOM_SELECT, ROOM_KEYS, ROOMS };

struct room {
        void *place;
        size_t size;
        bool used;
};

static __thread struct room rooms[ROOMS] __attribute__((tls_model("initial-exec")));
static struct {
        bool made;
        pthread_key_t key;
} ending;

static void give_all_rooms(void *unused)
{
        (void)unused;
        for (int i = 0; i < ROOMS; i++) {
                if (rooms[i].place)
                        sys_2(SYS_munmap, rooms[i].place, rooms[i].size);
                rooms[i] = (struct room){0};
        }
}

/* Before the program has keys of its own: with a small number, the C library has a place for it already. */
__attribute__((constructor)) static void hear_of_endings(void)
{
        struct real *functions = real();

        ending.made = functions->pthread_key_create && functions->pthread_setspecific &&
                      functions->pthread_key_create(&ending.key, give_all_rooms) == 0;
}

/* A thread of whose end we hear, or the one that ends with the process. */
static bool may_keep(void)
{
        return ending.made ? real()->pthread_setspecific(ending.key, rooms) == 0
                           : self() == (uint32_t)atomic_load_explicit(&process.pid, memory_order_relaxed);
}

/* Returns NULL with errno set. */
static void *take_room(enum which which, size_t size, struct room *own)
{
        struct room *room = &rooms[which];
        long got;

        *own = (struct room){0};
        if (room->used || (room->size < size && !may_keep()))
                room = own;
        room->used = true;
        if (room->size >= size)
                return room->place;
        got = sys_6(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got < 0 && got > -4096) {
                room->used = false;
                *__errno_location() = ENOMEM;
                return NULL;
        }
        if (room->place)
                sys_2(SYS_munmap, room->place, room->size);
        room->place = (void *)got;
        room->size = size;
        return room->place;
}

static void give_room(enum which which, struct room *own)
{
        if (own->place)
                sys_2(SYS_munmap, own->place, own->size);
        else
                rooms[which].used = false;
}

enum interest { INTEREST_NONE, INTEREST_BLIND, INTEREST_RING };

static enum interest interest_in(const struct pollfd *fds, nfds_t count)
{
        enum interest interest = INTEREST_NONE;
        uint64_t key;

        for (nfds_t i = 0; i < count; i++)
                switch (kind_of(fds[i].fd, &key)) {
                case KIND_RING:
                case KIND_POLLER:
                        return INTEREST_RING;
                case KIND_COUNTED:
                        interest = INTEREST_BLIND;
                        break;
                case KIND_PLAIN:
                        break;
                }
        return interest;
}

static int wait_with_room(struct pollfd *fds, nfds_t count, int64_t timeout, const sigset_t *mask)
{
        struct pollfd few[2 * FEW];
        struct one_bell few_bells[FEW];
        uint64_t few_keys[FEW];
        struct places places = {few, few_bells, few_keys};
        struct room own;
        int found;

        if (count > FEW) {
                places.copy = take_room(
                    ROOM_WAIT, count * (2 * sizeof *few + sizeof *few_bells + sizeof *few_keys), &own);
                if (!places.copy)
                        return -1;
                places.keys = (uint64_t *)(void *)(places.copy + 2 * count);
                places.bells = (struct one_bell *)(void *)(places.keys + count);
        }
        found = wait(fds, count, &places, timeout, mask);
        if (count > FEW)
                give_room(ROOM_WAIT, &own);
        return found;
}

static bool is_timespec(const struct timespec *time)
{
        return !time || (time->tv_sec >= 0 && time->tv_nsec >= 0 && time->tv_nsec < 1000000000);
}

/* The program's own call, while the connections in it that may get a ring can't. */
static int call_blind(struct pollfd *fds, nfds_t count, int ms, const struct timespec *timeout,
                      const sigset_t *mask, bool precise)
{
        uint64_t few[FEW], *keys = few;
        struct room own;
        bool blind;
        int found = 0;

        if (count > FEW)
                keys = take_room(ROOM_BLIND, count * sizeof *keys, &own);
        if (!keys)
                return -1;
        blind = blind_begin(fds, count, keys);
        if (blind)
                found = precise ? real()->ppoll(fds, count, timeout, mask) : real()->poll(fds, count, ms);
        blind_end(count, keys);
        if (count > FEW)
                give_room(ROOM_BLIND, &own);
        return blind ? found
                     : wait_with_room(fds, count, precise ? from_timespec(timeout) : from_ms(ms), mask);
}

CALL int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
        enum interest interest;

        if (!process.on || !fds || !is_timespec(timeout))
                return real()->ppoll(fds, count, timeout, mask);
        interest = interest_in(fds, count);
        if (interest == INTEREST_RING)
                return wait_with_room(fds, count, from_timespec(timeout), mask);
        if (interest == INTEREST_BLIND)
                return call_blind(fds, count, 0, timeout, mask, true);
        return real()->ppoll(fds, count, timeout, mask);
}

CALL int poll(struct pollfd *fds, nfds_t count, int timeout)
{
        enum interest interest;

        if (!process.on || !fds)
                return real()->poll(fds, count, timeout);
        interest = interest_in(fds, count);
        if (interest == INTEREST_RING)
                return wait_with_room(fds, count, from_ms(timeout), NULL);
        if (interest == INTEREST_BLIND)
                return call_blind(fds, count, timeout, NULL, NULL, false);
        return real()->poll(fds, count, timeout);
}

/* --- select() --- */

static bool in_set(const fd_set *set, int fd)
{
        return set && ((const unsigned long *)(const void *)set)[(unsigned)fd / (8 * sizeof(long))] >>
                              ((unsigned)fd % (8 * sizeof(long))) &
                          1;
}

static void put(fd_set *set, int fd)
{
        ((unsigned long *)(void *)set)[(unsigned)fd / (8 * sizeof(long))] |=
            1ul << ((unsigned)fd % (8 * sizeof(long)));
}

static void clear(fd_set *set, int size)
{
        if (set)
                memset(set, 0, ((size_t)size + 8 * sizeof(long) - 1) / (8 * sizeof(long)) * sizeof(long));
}

/* The descriptors of the sets, as poll() wants them. */
static nfds_t listed(int size, const fd_set *in, const fd_set *out, const fd_set *except, struct pollfd *fds)
{
        nfds_t count = 0;

        for (int fd = 0; fd < size; fd++) {
                short events = (in_set(in, fd) ? POLLIN | POLLRDNORM | POLLRDBAND : 0) |
                               (in_set(out, fd) ? POLLOUT | POLLWRNORM | POLLWRBAND : 0) |
                               (in_set(except, fd) ? POLLPRI : 0);

                if (events)
                        fds[count++] = (struct pollfd){.fd = fd, .events = events};
        }
        return count;
}

static int to_sets(const struct pollfd *fds, nfds_t count, int size, fd_set *in, fd_set *out, fd_set *except)
{
        int found = 0;

        for (nfds_t i = 0; i < count; i++)
                if (fds[i].revents & POLLNVAL)
                        return (int)result(-EBADF);
        clear(in, size);
        clear(out, size);
        clear(except, size);
        for (nfds_t i = 0; i < count; i++) {
                short got = fds[i].revents, wanted = fds[i].events;

                if (wanted & POLLIN && got & (POLLIN | POLLRDNORM | POLLRDBAND | POLLHUP | POLLERR)) {
                        put(in, fds[i].fd);
                        found++;
                }
                if (wanted & POLLOUT && got & (POLLOUT | POLLWRNORM | POLLWRBAND | POLLERR)) {
                        put(out, fds[i].fd);
                        found++;
                }
                if (wanted & POLLPRI && got & POLLPRI) {
                        put(except, fds[i].fd);
                        found++;
                }
        }
        return found;
}

/* How many descriptors are in the sets. */
static nfds_t marked(int size, const fd_set *in, const fd_set *out, const fd_set *except)
{
        const unsigned long *sets[] = {(const void *)in, (const void *)out, (const void *)except};
        const int width = 8 * sizeof(long);
        nfds_t count = 0;

        for (int word = 0; word * width < size; word++) {
                unsigned long all = 0;

                for (int i = 0; i < 3; i++)
                        all |= sets[i] ? sets[i][word] : 0;
                if (size - word * width < width)
                        all &= (1ul << (size - word * width)) - 1;
                for (; all; all &= all - 1)
                        count++;
        }
        return count;
}

/* What a select() needs besides its sets; on the stack, which may be small, if it isn't much. */
struct selection {
        struct pollfd *fds, few[FEW];
        uint64_t *keys, few_keys[FEW];
        struct room own[2];
        bool rooms;
        nfds_t blind; /* descriptors that blind_begin() was called for */
};

static bool select_begin(struct selection *s, nfds_t count)
{
        s->fds = s->few;
        s->keys = s->few_keys;
        s->rooms = count > FEW;
        s->blind = 0;
        if (!s->rooms)
                return true;
        s->fds = take_room(ROOM_SELECT, count * sizeof *s->fds, &s->own[0]);
        if (!s->fds)
                return false;
        s->keys = take_room(ROOM_KEYS, count * sizeof *s->keys, &s->own[1]);
        if (!s->keys)
                give_room(ROOM_SELECT, &s->own[0]);
        return s->keys;
}

static void select_end(struct selection *s)
{
        blind_end(s->blind, s->keys);
        if (!s->rooms)
                return;
        give_room(ROOM_SELECT, &s->own[0]);
        give_room(ROOM_KEYS, &s->own[1]);
}

/* True after doing the call, with its outcome in `*found`; otherwise the program's own is to be made now. */
static bool select_rings(struct selection *s, int size, fd_set *in, fd_set *out, fd_set *except,
                         int64_t timeout, const sigset_t *mask, int *found)
{
        nfds_t count = listed(size, in, out, except, s->fds);

        switch (interest_in(s->fds, count)) {
        case INTEREST_BLIND:
                s->blind = count;
                if (blind_begin(s->fds, count, s->keys))
                        return false;
                blind_end(count, s->keys);
                s->blind = 0;
                /* fall through */
        case INTEREST_RING:
                *found = wait_with_room(s->fds, count, timeout, mask);
                if (*found >= 0)
                        *found = to_sets(s->fds, count, size, in, out, except);
                return true;
        case INTEREST_NONE:
                break;
        }
        return false;
}

/* Linux leaves there what is left. */
static void leave_rest(struct timeval *timeout, uint64_t spent)
{
        int64_t s = (int64_t)(spent / 1000000000), us = (int64_t)(spent % 1000000000 / 1000);

        timeout->tv_sec -= s;
        timeout->tv_usec -= us;
        if (timeout->tv_usec < 0) {
                timeout->tv_usec += 1000000;
                timeout->tv_sec--;
        }
        if (timeout->tv_sec < 0)
                *timeout = (struct timeval){0};
}

CALL int select(int size, fd_set *in, fd_set *out, fd_set *except, struct timeval *timeout)
{
        struct timespec time = {0};
        struct selection s;
        uint64_t begin;
        int found;

        if (!process.on || size <= 0 || (timeout && (timeout->tv_sec < 0 || timeout->tv_usec < 0)))
                return real()->select(size, in, out, except, timeout);
        if (!select_begin(&s, marked(size, in, out, except)))
                return -1;
        if (timeout) {
                time.tv_sec = timeout->tv_sec;
                if (__builtin_add_overflow(time.tv_sec, timeout->tv_usec / 1000000, &time.tv_sec))
                        time.tv_sec = LONG_MAX;
                time.tv_nsec = timeout->tv_usec % 1000000 * 1000;
        }
        begin = timeout ? now() : 0;
        if (!select_rings(&s, size, in, out, except, from_timespec(timeout ? &time : NULL), NULL, &found)) {
                found = real()->select(size, in, out, except, timeout);
        } else if (timeout) {
                *timeout = (struct timeval){time.tv_sec, time.tv_nsec / 1000};
                leave_rest(timeout, now() - begin);
        }
        select_end(&s);
        return found;
}

CALL int pselect(int size, fd_set *in, fd_set *out, fd_set *except, const struct timespec *timeout,
                 const sigset_t *mask)
{
        struct selection s;
        int found;

        if (!process.on || size <= 0 || !is_timespec(timeout))
                return real()->pselect(size, in, out, except, timeout, mask);
        if (!select_begin(&s, marked(size, in, out, except)))
                return -1;
        if (!select_rings(&s, size, in, out, except, from_timespec(timeout), mask, &found))
                found = real()->pselect(size, in, out, except, timeout, mask);
        select_end(&s);
        return found;
}

CALL int __poll_chk(struct pollfd *fds, nfds_t count, int timeout, size_t room)
{
        call_check(count, room / sizeof *fds);
        return poll(fds, count, timeout);
}

CALL int __ppoll_chk(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask,
                     size_t room)
{
        call_check(count, room / sizeof *fds);
        return ppoll(fds, count, timeout, mask);
}

ALSO(poll) int __poll(struct pollfd *, nfds_t, int);
ALSO(select) int __select(int, fd_set *, fd_set *, fd_set *, struct timeval *);
