#include "arenas.h"

#include "mirror.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUCKETS = 1024, SIDE = 1, PEER = 0 };

static struct node buckets[BUCKETS];
static struct node deaf = LIST(deaf);

void arenas_start(void)
{
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

        EACH(node, bucket)
        {
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

/* Slots in which the process has done something. */
static bool hear(struct shared *shared)
{
        uint64_t dirty =
            atomic_exchange_explicit(&header_of(shared)->sides[SIDE].dirty[0], 0, memory_order_seq_cst);
        bool any = false;

        for (; dirty; dirty &= dirty - 1) {
                struct mirror *mirror = shared->mirrors[__builtin_ctzll(dirty)];

                if (mirror)
                        mirror_wake(mirror);
                any = any || mirror;
        }
        return any;
}

static void rung(struct watch *watch, uint32_t events)
{
        struct shared *shared = OF(watch, struct shared, bell);
        char bytes[64];
        ssize_t got;

        (void)events;
        do {
                got = recv(watch->fd, bytes, sizeof bytes, MSG_DONTWAIT);
                count(COUNT_CALLS, 1);
        } while (got == (ssize_t)sizeof bytes);
        if (!got || (got < 0 && errno != EAGAIN && errno != EINTR)) {
                /* Nobody has the other end any more. Who gets one later rings nothing: looked at now and
                 * then. */
                watch_remove(watch);
                watch->call = NULL;
                arena_waits(shared);
        }
        hear(shared);
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
                snprintf(text, RELAY_TEXT, "the arena isn't a sealed one with rings of %u bytes", ring);
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

struct shared *arena_take(uint64_t id, uint32_t size_of_ring, int memory, int bell, char *text)
{
        struct shared *shared = calloc(1, sizeof *shared);

        if (!shared)
                relay_die("memory for an arena", ENOMEM);
        *shared = (struct shared){
            .bell = {.fd = bell, .call = rung},
            .id = id,
            .memory = memory,
            .size_of_ring = size_of_ring,
        };
        list_init(&shared->same);
        list_init(&shared->deaf);
        for (int i = 0; i < BELLS; i++)
                shared->bells[i] = -1;
        if (!map(shared, text) || !watch_add(&shared->bell, EPOLLIN)) {
                arena_discard(shared);
                return NULL;
        }
        list_add(bucket_of(id), &shared->same);
        return shared;
}

/* A bell that is full rings already. */
static bool ring_once(int fd)
{
        ssize_t sent = send(fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);

        count(COUNT_CALLS, 1);
        return sent >= 0 || errno == EAGAIN;
}

static void know(struct shared *shared, uint32_t index, bool yes)
{
        _Atomic uint64_t *word = &header_of(shared)->sides[PEER].known[index / 64];
        uint64_t bit = UINT64_C(1) << (index % 64);

        if (yes)
                atomic_fetch_or(word, bit);
        else
                atomic_fetch_and(word, ~bit);
}

static void forget_bell(struct shared *shared, uint32_t index)
{
        if (shared->bells[index] < 0)
                return;
        know(shared, index, false);
        close(shared->bells[index]);
        shared->bells[index] = -1;
}

void arena_bell(struct shared *shared, uint32_t index, int bell)
{
        if (index >= BELLS) {
                close(bell);
                return;
        }
        forget_bell(shared, index);
        shared->bells[index] = bell;
        know(shared, index, true);
        /* It may have been wanted before it was there. */
        ring_once(bell);
}

void arena_discard(struct shared *shared)
{
        for (uint32_t i = 0; i < SLOTS; i++)
                if (shared->mirrors[i])
                        mirror_abandon(shared->mirrors[i]);
        watch_remove(&shared->bell);
        if (shared->bell.fd >= 0)
                close(shared->bell.fd);
        for (uint32_t i = 0; i < BELLS; i++)
                if (shared->bells[i] >= 0)
                        close(shared->bells[i]);
        if (shared->base)
                munmap(shared->base, shared->size);
        close(shared->memory);
        list_remove(&shared->same);
        list_remove(&shared->deaf);
        free(shared);
}

void arena_ring_bells(struct shared *shared, struct waiters *waiters, uint32_t slot)
{
        struct side *theirs = &header_of(shared)->sides[PEER];

        atomic_exchange_explicit(&waiters->any, 0, memory_order_acq_rel);
        for (uint32_t word = 0; word < BELL_WORDS; word++) {
                uint64_t sleeping = atomic_load_explicit(&waiters->bells[word], memory_order_relaxed);

                if (sleeping)
                        sleeping = atomic_exchange_explicit(&waiters->bells[word], 0, memory_order_acq_rel);
                for (; sleeping; sleeping &= sleeping - 1) {
                        uint32_t bell = word * 64 + (uint32_t)__builtin_ctzll(sleeping);

                        atomic_fetch_or_explicit(&theirs->dirty[bell], UINT64_C(1) << slot,
                                                 memory_order_seq_cst);
                        /* Without one: the router sends it soon, or the waiter is gone; who waits with a bell
                         * that isn't known looks now and then. */
                        if (shared->bells[bell] < 0)
                                continue;
                        if (ring_once(shared->bells[bell]))
                                count(COUNT_BELLS, 1);
                        else
                                forget_bell(shared, bell);
                }
        }
}

static bool is_known(const struct shared *shared)
{
        return shared->bell.call &&
               atomic_load_explicit(&header_of(shared)->sides[SIDE].known[0], memory_order_relaxed) & 1;
}

void arena_waits(struct shared *shared)
{
        if (!is_known(shared))
                list_add(&deaf, &shared->deaf);
}

bool arenas_deaf(void)
{
        return list_holds(&deaf);
}

bool arenas_listen(void)
{
        bool any = false;

        EACH(node, &deaf)
        {
                struct shared *shared = OF(node, struct shared, deaf);

                if (is_known(shared))
                        list_remove(node);
                any = hear(shared) || any;
        }
        return any;
}
