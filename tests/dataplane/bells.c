/* Bells between threads: the library's bells.c and the relay's arenas.c, without a router.
 *
 *      bells library|relay|process early|late|once ROUNDS SEED
 *
 * In each round two threads publish something in four slots and wake whoever waits for it, and a
 * waiter sleeps until it has found all of it. It looks only where `dirty` tells it to, as an epoll
 * instance and the relay do; what nobody rings for is never found.
 *
 *      library    the waiter is an epoll instance of the library, the others are library threads
 *      relay      the waiter is the relay
 *      process    the relay wakes an epoll instance of the library
 *
 * late: the sending end of the waiter's bell comes at some moment of the round, and the router is
 * of no help: what is requested of it is lost.
 *
 * once: without threads. A waiter that does not look is rung once for all slots, and anew when it
 * has looked.
 *
 * A sleep that nobody ends is a wake-up that was lost: the exit code is 1.
 */
#include "../../dataplane/library/bells.h"
#include "../../dataplane/library/sys.h"
#define now relay_now /* both programs have a clock.h */
#include "../../dataplane/relay/arenas.h"
#undef now

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
        USED = 4,           /* slots */
        RINGERS = 2,        /* threads */
        BELL = 0,           /* the relay has no other */
        LOST = 20 * 1000,   /* ms that no sleep lasts */
        ROUNDS_UNREAD = 10, /* of at most five bytes */
        ARENA = 1,          /* id */
        RING = 64 * 1024,
        SENDER = 0, /* the ringers' mapping */
        WAITER = 1, /* the waiter's */
};

/* What bells.c needs of the library. */
struct family *family;
struct process process;
struct mapping *_Atomic mappings;
__thread uint32_t thread_id __attribute__((tls_model("initial-exec")));

static struct arena *arena;
static unsigned char *memory;
static int memory_fd, hears, rings; /* the bell's ends */
static int epoll;
static uint32_t waiting_side;
static bool late, by_relay;
static uint32_t rounds;
static uint64_t seed;
static _Atomic uint32_t begun, done[RINGERS + 1];
static struct shared *shared;
static bool active[USED];

static _Noreturn void fail(const char *what)
{
        fprintf(stderr, "bells: %s in round %u, seed %llu: %s\n", what, begun, (unsigned long long)seed,
                strerror(errno));
        _exit(1);
}

uint32_t thread_find_id(void)
{
        static _Atomic uint32_t last;

        return thread_id = atomic_fetch_add(&last, 1) + 1;
}

enum taken lock_wait(struct lock *lock, uint32_t me)
{
        uint32_t free = 0;

        while (!atomic_compare_exchange_weak(&lock->word, &free, me)) {
                free = 0;
                sched_yield();
        }
        return LOCK_TAKEN;
}

void lock_wake(struct lock *lock)
{
        (void)lock;
}

struct mapping *mapping_find(uint64_t id, uint32_t side)
{
        return id != ARENA ? NULL : side == waiting_side ? &mappings[WAITER] : &mappings[SENDER];
}

int own_descriptor(int fd)
{
        return fd;
}

bool is_own_descriptor(int fd)
{
        return fd >= 0;
}

void own_lost(void)
{
        fail("a descriptor is lost");
}

void close_own(int fd)
{
        close(fd);
}

void fd_set_word(int fd, uint64_t word)
{
        (void)fd;
        (void)word;
}

void router_receive(void)
{
}

bool router_bell(uint16_t kind, uint64_t id, uint64_t token, uint32_t side, uint32_t bell)
{
        (void)kind;
        (void)id;
        (void)token;
        (void)side;
        (void)bell;
        return false;
}

/* --- rounds --- */

static uint64_t any(uint64_t *state, uint64_t below)
{
        *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        return (*state >> 33) % below;
}

static void pause_for(uint64_t turns)
{
        while (turns--)
                relax();
}

static void announce(_Atomic uint32_t *word, uint32_t value)
{
        atomic_store(word, value);
        sys_3(SYS_futex, word, FUTEX_WAKE, INT32_MAX);
}

static void await(_Atomic uint32_t *word, uint32_t value)
{
        uint32_t seen;

        for (unsigned tries = 0; (seen = atomic_load(word)) < value; tries++)
                if (tries < 500)
                        relax();
                else
                        sys_4(SYS_futex, word, FUTEX_WAIT, seen, NULL);
}

/* What the waiter waits for: slots of the direction that it receives. */
static struct ring *ring_of(uint32_t slot)
{
        return arena_view(WAITER, slot, 1 - waiting_side).ring;
}

static bool has_come(uint32_t slot)
{
        return atomic_load_explicit(&ring_of(slot)->tail, memory_order_acquire) == begun;
}

static void publish(uint32_t slot, uint32_t round)
{
        struct end *end = &family->ends[slot];
        struct ring *ring = ring_of(slot);

        atomic_store_explicit(&ring->tail, round, memory_order_release);
        if (by_relay)
                arena_wake(shared, &ring->receivers, slot);
        else
                wake(&ring->receivers, end);
}

static void *ringer(void *number)
{
        uint32_t self_number = (uint32_t)(uintptr_t)number;
        uint64_t dice = seed + self_number;

        for (uint32_t round = 1; round <= rounds; round++) {
                await(&begun, round);
                for (uint32_t slot = self_number; slot < USED; slot += RINGERS) {
                        pause_for(any(&dice, 100));
                        publish(slot, round);
                }
                announce(&done[self_number], round);
        }
        return NULL;
}

static int another_ringing_end(void)
{
        int fd = fcntl(rings, F_DUPFD_CLOEXEC, 0);

        if (fd < 0)
                fail("no descriptor");
        return fd;
}

static void deliver(void)
{
        int fd = another_ringing_end();

        if (by_relay) {
                arena_set_bell(shared, BELL, fd);
                return;
        }
        bell_ringer_received(ARENA, waiting_side, BELL, &fd);
        if (fd >= 0)
                fail("the bell was not kept");
}

/* As bells_close_peers(); the waiter is told. */
static void take_away(void)
{
        bells_close_peers(&mappings[SENDER]);
        atomic_store(&arena->sides[waiting_side].known[0], 0);
        atomic_store(&mappings[SENDER].fetches, 0);
}

static void *courier(void *unused)
{
        uint64_t dice = seed + 77;

        for (uint32_t round = 1; round <= rounds; round++) {
                await(&begun, round);
                pause_for(any(&dice, 200));
                deliver();
                announce(&done[RINGERS], round);
        }
        return unused;
}

/* The relay's thread, in place of the ringers and the courier. */
static void *relay_thread(void *unused)
{
        uint64_t dice = seed + 78;

        for (uint32_t round = 1; round <= rounds; round++) {
                uint64_t when = late ? any(&dice, USED + 1) : USED + 1;

                await(&begun, round);
                for (uint32_t slot = 0; slot <= USED; slot++) {
                        if (slot == when)
                                deliver();
                        if (slot < USED) {
                                pause_for(any(&dice, 100));
                                publish(slot, round);
                        }
                        if (any(&dice, 3) == 0)
                                arenas_ring();
                }
                arenas_ring();
                for (int i = 0; i <= RINGERS; i++)
                        announce(&done[i], round);
        }
        return unused;
}

static void next_round(void)
{
        if (late && by_relay && begun) {
                /* The relay drops the bell when a ring fails; here as if one had failed. */
                close(shared->bells[BELL]);
                shared->bells[BELL] = -1;
                atomic_store(&arena->sides[waiting_side].known[0], 0);
        } else if (late) {
                take_away();
        }
        announce(&begun, begun + 1);
}

static void end_round(void)
{
        for (int i = 0; i < RINGERS + late; i++)
                await(&done[i], begun);
}

/* --- waiters --- */

static void find_dirty(uint64_t dirty)
{
        for (uint32_t slot = 0; slot < USED; slot++)
                active[slot] |= dirty >> slot & 1;
}

static uint32_t drained; /* in this round */

/* An epoll instance of the library: poller_arm.c, poller_harvest.c. */
static void wait_as_process(uint32_t seen)
{
        struct epoll_event event;

        for (uint32_t slot = 0; slot < USED; slot++)
                active[slot] = true;
        for (;;) {
                bool known = true, all = true;

                for (uint32_t slot = 0; slot < USED; slot++) {
                        if (seen >> slot & 1)
                                continue;
                        if (active[slot]) {
                                wait_begin(&ring_of(slot)->receivers, BELL);
                                if (has_come(slot))
                                        seen |= UINT32_C(1) << slot;
                                /* As late as wait.c checks this. */
                                known = bell_is_known(WAITER, waiting_side, BELL) && known;
                                active[slot] = !known;
                        }
                        all = all && seen >> slot & 1;
                }
                if (all)
                        return;
                switch (epoll_wait(epoll, &event, 1, known ? LOST : 0)) {
                case 0:
                        if (known)
                                fail("a wake-up was lost");
                        break;
                case 1:
                        /* As bell_rang(): drain the bell before it can be full. */
                        if (begun - drained > ROUNDS_UNREAD) {
                                bell_drain(WAITER, BELL);
                                drained = begun;
                        }
                        bell_look(WAITER, BELL);
                        find_dirty(atomic_exchange(&arena->sides[waiting_side].dirty[BELL], 0));
                }
        }
}

static void woken(struct mirror *mirror)
{
        active[(uintptr_t)mirror - 1] = true;
}

/* The relay: mirror_scan.c, main.c. */
static void wait_as_relay(uint32_t seen)
{
        for (uint32_t slot = 0; slot < USED; slot++)
                active[slot] = true;
        for (;;) {
                bool all = true;

                for (uint32_t slot = 0; slot < USED; slot++) {
                        struct waiters *waiters = &ring_of(slot)->receivers;

                        if (active[slot] && !(seen >> slot & 1)) {
                                atomic_fetch_or_explicit(&waiters->bells[0], 1, memory_order_relaxed);
                                atomic_store_explicit(&waiters->any, 1, memory_order_relaxed);
                                atomic_thread_fence(memory_order_seq_cst);
                                if (has_come(slot))
                                        seen |= UINT32_C(1) << slot;
                                arena_becomes_idle(shared);
                        }
                        active[slot] = false;
                        all = all && seen >> slot & 1;
                }
                if (all)
                        return;
                if (arenas_need_polls()) {
                        watches_poll(0);
                        arenas_poll();
                } else if (!watches_poll(LOST)) {
                        fail("a wake-up was lost");
                }
        }
}

/* Returns how many bytes the bell has. */
static long publish_all(uint32_t round)
{
        char bytes[USED + 1];
        long got;

        for (uint32_t slot = 0; slot < USED; slot++) {
                wait_begin(&ring_of(slot)->receivers, BELL);
                publish(slot, round);
        }
        if (by_relay)
                arenas_ring();
        got = recv(hears, bytes, sizeof bytes, MSG_DONTWAIT | MSG_PEEK);
        return got < 0 && errno == EAGAIN ? 0 : got;
}

static void test_once(bool relay_waits)
{
        /* The relay rings a bell when it receives it. */
        if (!relay_waits)
                bell_drain(WAITER, BELL);
        for (uint32_t round = 1; round <= rounds; round++) {
                uint64_t *dirty = (uint64_t *)&arena->sides[waiting_side].dirty[BELL];

                if (publish_all(round) != 1 || publish_all(round) != 1)
                        fail("a bell has not been rung once");
                if (*dirty != (1 << USED) - 1)
                        fail("not all slots are dirty");
                if (relay_waits)
                        watches_poll(0);
                else
                        bell_drain(WAITER, BELL);
                for (uint32_t slot = 0; slot < USED && relay_waits; slot++)
                        if (!active[slot])
                                fail("the relay has not looked at all slots");
        }
}

/* --- start --- */

static void map(void)
{
        enum { WHOLE = BULK_OFFSET + SLOTS * SIDES * RING };
        int pair[2];

        memory_fd = memfd_create("bells", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (memory_fd < 0 || ftruncate(memory_fd, WHOLE) ||
            fcntl(memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) ||
            socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair))
                fail("no memory");
        memory = mmap(NULL, WHOLE, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
        arena = (struct arena *)(void *)memory;
        hears = pair[0];
        rings = pair[1];
        family = mmap(NULL, sizeof *family, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mappings = calloc(2, sizeof *mappings);
        if (memory == MAP_FAILED || family == MAP_FAILED || !mappings)
                fail("no memory");
        for (uint32_t i = 0; i < 2; i++) {
                mappings[i].base = memory;
                mappings[i].shift = 16;
                mappings[i].id = ARENA;
                mappings[i].attached = USED;
                family->arenas[i].id = ARENA;
                family->arenas[i].side = i == WAITER ? waiting_side : 1 - waiting_side;
        }
        family->next_arena = 2;
        for (uint32_t slot = 0; slot < USED; slot++) {
                family->ends[slot].place.arena = SENDER;
                family->ends[slot].place.side = 1 - waiting_side;
                family->ends[slot].place.slot = slot;
        }
}

static void listen_as_process(void)
{
        struct epoll_event event = {.events = EPOLLIN | EPOLLET};
        int fd = hears;

        epoll = epoll_create1(EPOLL_CLOEXEC);
        bell_keep(&mappings[WAITER], BELL, &fd);
        if (bell_take(WAITER, false) != BELL || epoll_ctl(epoll, EPOLL_CTL_ADD, hears, &event))
                fail("no bell");
}

static void listen_as_relay(bool waits)
{
        char text[RELAY_TEXT];
        int pair[2], bell = hears;

        context_start();
        arenas_start(woken);
        if (!waits && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair))
                bell = pair[0];
        shared = arena_add(ARENA, 0, RING, fcntl(memory_fd, F_DUPFD_CLOEXEC, 0), bell, text);
        if (!shared)
                fail("no arena");
        for (uintptr_t slot = 0; slot < USED; slot++)
                shared->mirrors[slot] = (struct mirror *)(slot + 1);
}

int main(int count, char **arguments)
{
        pthread_t threads[RINGERS + 1];
        int started = 0;
        bool relay_waits;

        if (count != 5)
                return 2;
        relay_waits = !strcmp(arguments[1], "relay");
        by_relay = !strcmp(arguments[1], "process");
        late = !strcmp(arguments[2], "late");
        rounds = (uint32_t)strtoul(arguments[3], NULL, 10);
        seed = strtoull(arguments[4], NULL, 10);
        waiting_side = by_relay ? 0 : 1;
        map();
        if (relay_waits || by_relay)
                listen_as_relay(relay_waits);
        if (!relay_waits)
                listen_as_process();
        if (!late)
                deliver();
        if (!strcmp(arguments[2], "once")) {
                test_once(relay_waits);
                return 0;
        }
        for (uintptr_t i = 0; i < RINGERS && !by_relay; i++)
                pthread_create(&threads[started++], NULL, ringer, (void *)i);
        if (by_relay || late)
                pthread_create(&threads[started++], NULL, by_relay ? relay_thread : courier, NULL);
        while (begun < rounds) {
                next_round();
                if (relay_waits)
                        wait_as_relay(0);
                else
                        wait_as_process(0);
                end_round();
        }
        for (int i = 0; i < started; i++)
                pthread_join(threads[i], NULL);
        return 0;
}
