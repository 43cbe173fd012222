#include "arenas.h"

#include "../library/rung.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
        BUCKETS = 1024,
        SIDE = 1,
        PEER = 0,
        BELL_BYTES = 2048, /* more than an honest process puts into a bell before it is emptied */
        HAS_DESCRIPTOR = -2,
        PERIOD = 20 * 1000 * 1000, /* ns, from the time at which it begins to work for an arena */
        WHOLE = 1000,
};

/* asm-generic/socket.h, since Linux 6.16. */
#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif

static struct node buckets[BUCKETS];
static struct node polled = LIST(polled);
static struct node due = LIST(due);
static uint64_t resume_at;
static void (*wake)(struct mirror *mirror);

void arenas_start(void (*woken)(struct mirror *mirror))
{
        wake = woken;
        for (int i = 0; i < BUCKETS; i++)
                list_init(&buckets[i]);
}

static struct node *bucket_of(uint64_t id)
{
        return &buckets[id % BUCKETS];
}

struct shared *arena_find(uint64_t id)
{
        struct node *bucket = bucket_of(id);

        EACH(node, bucket) {
                struct shared *shared = OF(node, struct shared, same);

                if (shared->id == id)
                        return shared;
        }
        return NULL;
}

static struct arena *header_of(const struct shared *shared)
{
        return (struct arena *)(void *)shared->base;
}

/* Wakes the connections in whose slots the process has done something. True: there were some. */
static bool take_dirty(struct shared *shared)
{
        struct arena *header = header_of(shared);
        uint64_t dirty;
        bool any = false;

        /* First: whoever rings from now on sends a byte, which nobody has taken. */
        rung_look(&header->rung[SIDE][0]);
        dirty = atomic_exchange_explicit(&header->sides[SIDE].dirty[0], 0, memory_order_seq_cst);

        if (dirty)
                usage_add(&shared->usage, USAGE_SLOTS_IN, (uint64_t)__builtin_popcountll(dirty));
        for (; dirty; dirty &= dirty - 1) {
                struct mirror *mirror = shared->mirrors[__builtin_ctzll(dirty)];

                if (mirror)
                        wake(mirror);
                any = any || mirror;
        }
        return any;
}

/* Reads a bell without taking anything out. HAS_DESCRIPTOR: a process has sent a descriptor to it.
 */
static ssize_t peek(int fd, char *rings)
{
        struct iovec vec = {.iov_base = rings, .iov_len = BELL_BYTES};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};
        ssize_t got = recvmsg(fd, &header, MSG_PEEK | MSG_DONTWAIT);

        /* The header has no room for a descriptor, so the kernel would truncate it. */
        return got >= 0 && header.msg_flags & MSG_CTRUNC ? HAS_DESCRIPTOR : got;
}

/* Empties a bell, as far as one read goes, and never receives a descriptor: closing one, or a
 * socket that holds one, can block for as long as its sender likes. */
static ssize_t empty_bell(const struct shared *shared, int fd)
{
        char rings[BELL_BYTES];
        ssize_t size = BELL_BYTES;

        if (!shared->guarded) {
                size = peek(fd, rings);
                count(COUNT_CALLS, 1);
                /* Not a byte more than was seen: the next one may carry a descriptor by now. */
                if (size <= 0)
                        return size;
        }
        count(COUNT_CALLS, 1);
        return recv(fd, rings, (size_t)size, MSG_DONTWAIT);
}

static void on_bell(struct watch *watch, UNUSED uint32_t events)
{
        struct shared *shared = OF(watch, struct shared, bell);
        ssize_t got = empty_bell(shared, watch->fd);

        usage_add(&shared->usage, USAGE_BELLS_IN, 1);
        if (!got || got == HAS_DESCRIPTOR || got == BELL_BYTES ||
            (got < 0 && errno != EAGAIN && errno != EINTR)) {
                /* No process has the sending end any more, or one that has it does what no honest
                 * one does. This bell is not used again; the arena is polled from now on. */
                watch_remove(watch);
                watch->call = NULL;
                arena_becomes_idle(shared);
        }
        take_dirty(shared);
}

static bool map(struct shared *shared, char *text)
{
        const int wanted = F_SEAL_SHRINK | F_SEAL_GROW;
        int seals = fcntl(shared->memory, F_GET_SEALS);
        off_t size = lseek(shared->memory, 0, SEEK_END);
        uint32_t ring = shared->size_of_ring;
        void *got;

        if (ring < REMOTE_RING_LEAST || ring > REMOTE_RING_MOST || ring & (ring - 1) || seals < 0 ||
            (seals & wanted) != wanted || size != (off_t)arena_size(ring)) {
                snprintf(text, RELAY_TEXT, "the arena is not a sealed memfd with rings of %u bytes", ring);
                return false;
        }
        shared->size = (size_t)size;
        got = mmap(NULL, shared->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, shared->memory, 0);
        if (got == MAP_FAILED) {
                snprintf(text, RELAY_TEXT, "mapping an arena: %s", strerror(errno));
                return false;
        }
        madvise(got, shared->size, MADV_DONTDUMP);
        shared->base = got;
        return true;
}

static bool refuses_descriptors(int fd)
{
        int takes = 1;
        socklen_t size = sizeof takes;

        return getsockopt(fd, SOL_SOCKET, SO_PASSRIGHTS, &takes, &size) == 0 && !takes;
}

/* A bell that cannot be closed without blocking stays open until the relay ends. */
static void close_bell(const struct shared *shared)
{
        char rings[BELL_BYTES];
        ssize_t got = 0;

        if (!shared->guarded) {
                shutdown(shared->bell.fd, SHUT_RDWR);
                /* Bounded: a socket's queue holds some hundred KiB. */
                for (int i = 0; i < 1024 && (got = peek(shared->bell.fd, rings)) > 0; i++)
                        if (recv(shared->bell.fd, rings, (size_t)got, MSG_DONTWAIT) < 0)
                                break;
        }
        if (got != HAS_DESCRIPTOR && got <= 0)
                close(shared->bell.fd);
}

struct shared *arena_add(uint64_t id, uint64_t owner, uint32_t size_of_ring, int memory, int bell, char *text)
{
        struct shared *shared = relay_memory(sizeof *shared, "memory for an arena");

        *shared = (struct shared){
            .bell = {.fd = bell, .call = on_bell},
            .id = id,
            .owner = owner,
            .memory = memory,
            .size_of_ring = size_of_ring,
        };
        list_init(&shared->same);
        list_init(&shared->polled);
        list_init(&shared->due);
        usage_start(&shared->usage, id, 0);
        shared->guarded = refuses_descriptors(bell);
        for (int i = 0; i < BELLS; i++)
                shared->bells[i] = -1;
        if (!map(shared, text) || !watch_add(&shared->bell, EPOLLIN)) {
                arena_remove(shared);
                return NULL;
        }
        rung_start(&header_of(shared)->rung[SIDE][0]);
        list_add(bucket_of(id), &shared->same);
        return shared;
}

enum ringing { RUNG, FULL, CLOSED };

/* A full bell rings already. CLOSED: no process has the receiving end. */
static enum ringing ring_once(int fd)
{
        ssize_t sent = send(fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);

        count(COUNT_CALLS, 1);
        return sent >= 0 ? RUNG : errno == EAGAIN ? FULL : CLOSED;
}

static void set_known(struct shared *shared, uint32_t index, bool known)
{
        _Atomic uint64_t *word = &header_of(shared)->sides[PEER].known[index / 64];
        uint64_t bit = UINT64_C(1) << (index % 64);

        if (known)
                atomic_fetch_or(word, bit);
        else
                atomic_fetch_and(word, ~bit);
}

static void forget_bell(struct shared *shared, uint32_t index)
{
        if (shared->bells[index] < 0)
                return;
        set_known(shared, index, false);
        close(shared->bells[index]);
        shared->bells[index] = -1;
}

void arena_set_bell(struct shared *shared, uint32_t index, int bell)
{
        if (index >= BELLS) {
                close(bell);
                return;
        }
        forget_bell(shared, index);
        shared->bells[index] = bell;
        set_known(shared, index, true);
        /* A ring for it may have been due before it was known. */
        ring_once(bell);
}

static void ring(struct shared *shared, uint32_t index)
{
        _Atomic uint32_t *rung = &header_of(shared)->rung[PEER][index];
        enum ringing outcome;
        uint32_t seen;

        /* Unknown bell: it is rung when the router sends it, or the waiter is gone. Until it is
         * known, the waiter polls. */
        if (shared->bells[index] < 0 || rung_seen(rung, &seen))
                return;
        outcome = ring_once(shared->bells[index]);
        if (outcome == RUNG) {
                rung_sent(rung, seen);
                count(COUNT_BELLS, 1);
                usage_add(&shared->usage, USAGE_BELLS_OUT, 1);
        } else if (outcome == CLOSED) {
                forget_bell(shared, index);
        }
}

static void ring_due(struct shared *shared)
{
        list_remove(&shared->due);
        for (uint32_t word = 0; word < BELL_WORDS; word++)
                for (; shared->due_bells[word]; shared->due_bells[word] &= shared->due_bells[word] - 1)
                        ring(shared, word * 64 + (uint32_t)__builtin_ctzll(shared->due_bells[word]));
}

void arena_set_share(struct shared *shared, uint32_t share)
{
        shared->share = share < WHOLE ? share : 0;
        shared->works_until = shared->rests_until = 0;
}

bool arena_rests(struct shared *shared)
{
        uint64_t present = shared->share ? now() : 0;

        if (present < shared->works_until || !shared->share)
                return false;
        if (present < shared->rests_until) {
                if (!resume_at || shared->rests_until < resume_at)
                        resume_at = shared->rests_until;
                return true;
        }
        shared->works_until = present + (uint64_t)shared->share * (PERIOD / WHOLE);
        shared->rests_until = present + PERIOD;
        return false;
}

uint64_t arenas_resume_at(uint64_t present)
{
        uint64_t time = resume_at;

        /* After it, a turn finds again who still rests. */
        if (present >= time)
                resume_at = 0;
        return time;
}

void arena_remove(struct shared *shared)
{
        ring_due(shared);
        watch_remove(&shared->bell);
        if (shared->bell.fd >= 0)
                close_bell(shared);
        for (uint32_t i = 0; i < BELLS; i++)
                if (shared->bells[i] >= 0)
                        close(shared->bells[i]);
        if (shared->base)
                munmap(shared->base, shared->size);
        close(shared->memory);
        list_remove(&shared->same);
        list_remove(&shared->polled);
        usage_end(&shared->usage);
        free(shared);
}

void arena_ring_bells(struct shared *shared, struct waiters *waiters, uint32_t slot)
{
        struct side *theirs = &header_of(shared)->sides[PEER];

        atomic_exchange_explicit(&waiters->any, 0, memory_order_acq_rel);
        for (uint32_t word = 0; word < BELL_WORDS; word++) {
                uint64_t sleeping = atomic_load_explicit(&waiters->bells[word], memory_order_relaxed);

                if (!sleeping)
                        continue;
                sleeping = atomic_exchange_explicit(&waiters->bells[word], 0, memory_order_acq_rel);
                shared->due_bells[word] |= sleeping;
                list_add(&due, &shared->due);
                usage_add(&shared->usage, USAGE_SLOTS_OUT, (uint64_t)__builtin_popcountll(sleeping));
                for (; sleeping; sleeping &= sleeping - 1)
                        atomic_fetch_or_explicit(&theirs->dirty[word * 64 + __builtin_ctzll(sleeping)],
                                                 UINT64_C(1) << slot, memory_order_seq_cst);
        }
}

void arenas_ring(void)
{
        EACH(node, &due)
                ring_due(OF(node, struct shared, due));
}

/* Can the process ring the relay's bell? */
static bool is_known(const struct shared *shared)
{
        return shared->bell.call &&
               atomic_load_explicit(&header_of(shared)->sides[SIDE].known[0], memory_order_relaxed) & 1;
}

void arena_becomes_idle(struct shared *shared)
{
        if (!is_known(shared))
                list_add(&polled, &shared->polled);
}

bool arenas_need_polls(void)
{
        return list_holds(&polled);
}

bool arenas_poll(void)
{
        bool any = false;

        EACH(node, &polled) {
                struct shared *shared = OF(node, struct shared, polled);

                if (is_known(shared))
                        list_remove(node);
                any = take_dirty(shared) || any;
        }
        return any;
}
