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

enum {
        BUCKETS = 1024,
        SIDE = 1,
        PEER = 0,
        RINGS = 2048, /* bytes: more than honest rings put into a bell until it is emptied */
        POISONED = -2,
};

/* asm-generic/socket.h, since Linux 6.16. */
#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif

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

/* Look into a bell without taking anything out. POISONED: there is a descriptor in it. */
static ssize_t peek(int fd, char *rings)
{
        struct iovec vec = {.iov_base = rings, .iov_len = RINGS};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};
        ssize_t got = recvmsg(fd, &header, MSG_PEEK | MSG_DONTWAIT);

        /* There is no room for a descriptor in the header, so it would be cut off. */
        return got >= 0 && header.msg_flags & MSG_CTRUNC ? POISONED : got;
}

/* Empty a bell, as far as one read goes. Whoever takes a descriptor out of it, or closes it with one in it,
 * may wait in close() for as long as the sender likes. */
static ssize_t read_rings(const struct shared *shared, int fd)
{
        char rings[RINGS];
        ssize_t size = RINGS;

        if (!shared->guarded) {
                size = peek(fd, rings);
                count(COUNT_CALLS, 1);
                /* No byte more than was seen: behind it there may be a descriptor by now. */
                if (size <= 0)
                        return size;
        }
        count(COUNT_CALLS, 1);
        return recv(fd, rings, (size_t)size, MSG_DONTWAIT);
}

static void rung(struct watch *watch, uint32_t events)
{
        struct shared *shared = OF(watch, struct shared, bell);
        ssize_t got = read_rings(shared, watch->fd);

        (void)events;
        if (!got || got == POISONED || got == RINGS || (got < 0 && errno != EAGAIN && errno != EINTR)) {
                /* Nobody has the other end any more, or who has it puts in what no honest process does. Who
                 * gets one later rings nothing: looked at now and then. */
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

static bool refuses_descriptors(int fd)
{
        int takes = 1;
        socklen_t size = sizeof takes;

        return getsockopt(fd, SOL_SOCKET, SO_PASSRIGHTS, &takes, &size) == 0 && !takes;
}

/* One that can't be closed without waiting stays open, until the relay ends. */
static void close_bell(const struct shared *shared)
{
        char rings[RINGS];
        ssize_t got = 0;

        if (!shared->guarded) {
                shutdown(shared->bell.fd, SHUT_RDWR);
                /* A socket's queue has room for some hundred KiB. */
                for (int i = 0; i < 1024 && (got = peek(shared->bell.fd, rings)) > 0; i++)
                        if (recv(shared->bell.fd, rings, (size_t)got, MSG_DONTWAIT) < 0)
                                break;
        }
        if (got != POISONED && got <= 0)
                close(shared->bell.fd);
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
        shared->guarded = refuses_descriptors(bell);
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
                close_bell(shared);
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
