#include "bells.h"

#include "clock.h"
#include "own.h"
#include "protocol.h"
#include "router.h"
#include "rung.h"
#include "sys.h"

#include <errno.h>
#include <sys/socket.h>

enum {
        SPARE_BELLS = 2,       /* that may be kept of an arena's other side, and two for each connection */
        FETCHES = 32,          /* at once, for an arena */
        FETCH_PAUSE = 16,      /* ms, for each more */
        ORDERS = SLOTS,        /* bells on order, of an arena */
        ORDER_PATIENCE = 1000, /* ms */
        RINGS = 2048,          /* bytes: more than an honest peer sends to a bell until it is drained */
};

/* asm-generic/socket.h, since Linux 6.16. */
#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif

/* Bells are drained into this; nothing reads it. */
static char rings[RINGS];
/* One of our bells accepts descriptors. */
static _Atomic bool unguarded;

static uint64_t bit(int number)
{
        return UINT64_C(1) << (number % 64);
}

/* Of a bell of this side (rung.h). */
static _Atomic uint32_t *rung_of(const struct mapping *mapping, uint32_t side, int bell)
{
        return &arena_header(mapping)->rung[side % SIDES][bell];
}

static uint32_t our_side(uint32_t arena)
{
        return load_relaxed(&family->arenas[arena].side);
}

static void forget_lost(_Atomic int32_t *bells)
{
        for (int i = 0; i < BELLS; i++) {
                int32_t word = atomic_load(&bells[i]);

                if (word > 0 && !is_own_descriptor(word - 1))
                        atomic_compare_exchange_strong(&bells[i], &word, 0);
        }
}

void bells_lost(void)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id)) {
                        forget_lost(mappings[i].bells);
                        forget_lost(mappings[i].peers);
                }
}

/* Peek at a bell's bytes. POISONED: there is a descriptor in it. */
enum { POISONED = -4097 };
static long peek(int fd)
{
        struct iovec vec = {.iov_base = rings, .iov_len = sizeof rings};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};
        long got = sys_3(SYS_recvmsg, fd, &header, MSG_PEEK | MSG_DONTWAIT);

        /* There is no room for a descriptor in the header, so it would be cut off. */
        return got >= 0 && header.msg_flags & MSG_CTRUNC ? POISONED : got;
}

/* Drain a bell, as far as one read goes. */
static long read_rings(int fd)
{
        long size = RINGS;

        if (load_relaxed(&unguarded)) {
                size = peek(fd);
                /* No byte more than the peek found: a descriptor may be behind it by now. */
                if (size <= 0)
                        return size;
        }
        return sys_6(SYS_recvfrom, fd, rings, size, MSG_DONTWAIT, 0, 0);
}

/* Is it certain that the last close() of this receiving end doesn't wait? A shared one isn't
 * changed. */
static bool is_safe_to_close(int fd, bool shared)
{
        long got = RINGS;

        if (!atomic_load(&unguarded))
                return true;
        if (shared)
                return peek(fd) != POISONED;
        sys_2(SYS_shutdown, fd, SHUT_RDWR);
        /* A socket's queue has room for some hundred KiB. */
        for (int i = 0; i < 1024 && (got = peek(fd)) > 0; i++)
                sys_6(SYS_recvfrom, fd, rings, got, MSG_DONTWAIT, 0, 0);
        return got <= 0 && got != POISONED;
}

/* A bell that can't be closed stays open: the exit of the process closes it without waiting. */
static void close_receiving(int fd, bool shared)
{
        if (is_safe_to_close(fd, shared))
                close_own(fd);
}

void bell_discard(int fd)
{
        long got = atomic_load(&unguarded) ? peek(fd) : 0;

        if (got != POISONED)
                sys_1(SYS_close, fd);
}

void bells_close(struct mapping *mapping, bool shared)
{
        for (int i = 0; i < BELLS; i++) {
                int32_t fd = atomic_exchange(&mapping->bells[i], 0);

                if (fd > 0)
                        close_receiving(fd - 1, shared);
        }
        for (int i = 0; i < BELL_WORDS; i++)
                atomic_store(&mapping->idle[i], 0);
        atomic_store(&mapping->ordered, 0);
}

void bells_close_peers(struct mapping *mapping)
{
        for (int i = 0; i < BELLS; i++) {
                int32_t fd = atomic_exchange(&mapping->peers[i], 0);

                if (fd > 0)
                        close_own(fd - 1);
        }
        atomic_store(&mapping->kept, 0);
}

void bell_keep(struct mapping *mapping, uint32_t bell, int *fd)
{
        int ours;

        if (*fd < 0 || bell >= BELLS || atomic_load(&mapping->bells[bell]))
                return;
        /* An older kernel has no such option, and lets descriptors through. */
        if (sys_option(*fd, SOL_SOCKET, SO_PASSRIGHTS))
                atomic_store(&unguarded, true);
        ours = own_descriptor(*fd);
        *fd = -1;
        if (ours < 0)
                return;
        atomic_store(&mapping->bells[bell], ours + 1);
        rung_start(rung_of(mapping, our_side(mapping_number(mapping)), (int)bell));
        bell_return(mapping_number(mapping), (int)bell);
}

int bell_descriptor(uint32_t arena, int bell)
{
        return atomic_load(&mapping_of(arena)->bells[bell]) - 1;
}

bool bell_is_ordered(uint32_t arena)
{
        struct mapping *mapping = mapping_of(arena);

        return atomic_load(&mapping->ordered) && !atomic_load(&mapping->unreachable) &&
               ticks() - atomic_load(&mapping->ordered_at) <= ORDER_PATIENCE;
}

/* Request one more bell; it comes with the router's next messages. */
static void order_bell(uint32_t arena)
{
        struct arena_record *record = &family->arenas[arena];
        struct mapping *mapping = mapping_of(arena);
        uint32_t bell, next;

        if (!bell_is_ordered(arena))
                atomic_store(&mapping->ordered, 0);
        if (atomic_load(&mapping->ordered) >= ORDERS || atomic_load(&record->bells) >= BELLS)
                return;
        bell = atomic_fetch_add(&record->bells, 1);
        next = bell + 1;
        if (bell < BELLS && router_bell(BELL, atomic_load(&record->id), atomic_load(&record->token),
                                        atomic_load(&record->side), bell)) {
                atomic_store(&mapping->ordered_at, ticks());
                atomic_fetch_add(&mapping->ordered, 1);
        } else {
                /* The number is used again, unless another thread has taken the next one. */
                atomic_compare_exchange_strong(&record->bells, &next, bell);
        }
}

static int idle_bell(struct mapping *mapping)
{
        for (int word = 0; word < BELL_WORDS; word++) {
                uint64_t idle = load_relaxed(&mapping->idle[word]);

                while (idle) {
                        int bell = word * 64 + __builtin_ctzll(idle);

                        if (!atomic_compare_exchange_weak_explicit(&mapping->idle[word], &idle,
                                                                   idle & (idle - 1), memory_order_acquire,
                                                                   memory_order_relaxed))
                                continue;
                        /* A bell that has been lost isn't used again. */
                        if (load_relaxed(&mapping->bells[bell]))
                                return bell;
                        idle &= idle - 1;
                }
        }
        return -1;
}

void bell_received(uint64_t id, uint32_t side, uint32_t bell, int *fd)
{
        enum taken taken = lock_take(&family->arenas_lock, self());
        struct mapping *mapping = taken == LOCK_NESTED ? NULL : mapping_find(id, side);

        if (mapping && atomic_load(&mapping->ordered))
                atomic_fetch_sub(&mapping->ordered, 1);
        if (mapping && *fd < 0)
                /* There is none: threads that wait for this arena poll from now on. */
                atomic_store(&mapping->unreachable, true);
        else if (mapping)
                bell_keep(mapping, bell, fd);
        lock_release(&family->arenas_lock, taken);
}

/* The relay is gone and can't say so: our connections through it are broken. */
static void break_connections(struct mapping *mapping)
{
        uint32_t arena = mapping_number(mapping);
        uint64_t queue_pairs = atomic_load(&family->arenas[arena].queue_pairs);

        for (uint32_t slot = 0; slot < SLOTS; slot++)
                for (uint32_t d = 0;
                     d < SIDES && (atomic_load(&mapping->slots[slot]) || queue_pairs & bit((int)slot)); d++)
                        store_release(&arena_view(arena, slot, d).ring->broken, 1);
}

/* A waiter has no bell: break the connections of a remote arena whose relay has been unreachable
 * for longer than the grace time. */
static void break_if_unreachable(struct mapping *mapping)
{
        /* ms: a relay whose router has gone takes 2 s to bring all that is under way to its end. */
        enum { GRACE = 4000 };
        uint32_t since = load_relaxed(&mapping->unreachable_since);

        /* Set to an odd moment, it may be the next one. */
        if (since && (int32_t)(ticks() - since) > GRACE)
                break_connections(mapping);
}

int bell_take(uint32_t arena, bool more)
{
        struct mapping *mapping = mapping_of(arena);
        int bell;

        if (load_relaxed(&mapping->unreachable)) {
                break_if_unreachable(mapping);
                return -1;
        }
        bell = idle_bell(mapping);
        if (bell >= 0)
                return bell;
        if (more || !bell_is_ordered(arena))
                order_bell(arena);
        router_receive();
        return idle_bell(mapping);
}

void bell_return(uint32_t arena, int bell)
{
        if (load_relaxed(&mapping_of(arena)->bells[bell]))
                atomic_fetch_or_explicit(&mapping_of(arena)->idle[bell / 64], bit(bell),
                                         memory_order_release);
}

bool bell_is_known(uint32_t arena, uint32_t side, int bell)
{
        struct side *ours = &arena_header(mapping_of(arena))->sides[side];

        return load_relaxed(&ours->known[bell / 64]) & bit(bell);
}

void bell_look(uint32_t arena, int bell)
{
        rung_look(rung_of(mapping_of(arena), our_side(arena), bell));
}

bool bell_drain(uint32_t arena, int bell)
{
        struct mapping *mapping = mapping_of(arena);
        int32_t word = atomic_load(&mapping->bells[bell]);
        uint32_t never = 0;
        long got;

        if (word <= 0)
                return true;
        got = read_rings(word - 1);
        bell_look(arena, bell);
        if (got == -EBADF || got == -ENOTSOCK) {
                own_lost();
                /* The number may be a file of the program's now. The next wait gets a new bell. */
                if (atomic_compare_exchange_strong(&mapping->bells[bell], &word, 0))
                        fd_set_word(word - 1, 0);
                return true;
        }
        if (got != POISONED && got != 0 && got < RINGS)
                return true;
        /* More than an honest peer sends, or a descriptor: the bell isn't used any more. The same
         * at its end, when nobody has the sending end and nobody will ring. Threads that wait for
         * this arena poll. */
        atomic_store(&mapping->unreachable, true);
        if (!got && atomic_load(&mapping->remote)) {
                /* If the relay had the sending end, the relay is gone; otherwise only the router
                 * is. */
                if (bell_is_known(arena, 0, bell))
                        break_connections(mapping);
                else
                        atomic_compare_exchange_strong(&mapping->unreachable_since, &never, ticks() | 1);
        }
        if (atomic_compare_exchange_strong(&mapping->bells[bell], &word, 0))
                close_receiving(word - 1, false);
        return false;
}

enum ringing { RUNG, FULL, CLOSED };

/* A bell that is full rings already. CLOSED: nobody has the receiving end any more. */
static enum ringing ring_once(int fd)
{
        long sent = sys_6(SYS_sendto, fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0);

        if (sent == -EBADF || sent == -ENOTSOCK) {
                own_lost();
                fd_set_word(fd, 0);
        }
        return sent >= 0 ? RUNG : sent == -EAGAIN ? FULL : CLOSED;
}

void bell_ringer_received(uint64_t id, uint32_t side, uint32_t bell, int *fd)
{
        enum taken taken = lock_take(&family->arenas_lock, self());
        struct mapping *mapping = taken == LOCK_NESTED || side >= SIDES ? NULL : mapping_find(id, 1 - side);

        /* No more than an honest process waits with: the router rings the others. */
        if (mapping && *fd >= 0 && bell < BELLS && !atomic_load(&mapping->peers[bell]) &&
            atomic_load(&mapping->kept) < SPARE_BELLS + 2 * atomic_load(&mapping->attached)) {
                struct side *theirs = &arena_header(mapping)->sides[side];
                int32_t none = 0;
                int ours = own_descriptor(*fd);

                *fd = -1;
                if (ours >= 0 && atomic_compare_exchange_strong(&mapping->peers[bell], &none, ours + 1)) {
                        atomic_fetch_add(&mapping->kept, 1);
                        atomic_fetch_or(&theirs->known[bell / 64], bit((int)bell));
                        /* A thread that did not find the bell may have rung nobody. Pairs with
                         * ring_bells(): either that thread sees the bell, or we see its `dirty`. */
                        if (atomic_load(&theirs->dirty[bell]))
                                ring_once(ours);
                } else if (ours >= 0) {
                        close_own(ours);
                }
        }
        lock_release(&family->arenas_lock, taken);
}

/* A peer that names bells which don't exist makes us send to the router in vain: so often at most,
 * and we never wait for it. */
static bool may_fetch(struct mapping *mapping)
{
        uint32_t time = ticks();
        uint32_t over = (time - load_relaxed(&mapping->fetched_at)) / FETCH_PAUSE;
        uint32_t fetches = load_relaxed(&mapping->fetches);

        if (over || !fetches) {
                fetches = fetches > over ? fetches - over : 0;
                store_relaxed(&mapping->fetched_at, time);
        }
        if (fetches < FETCHES)
                store_relaxed(&mapping->fetches, fetches + 1);
        else
                store_relaxed(&mapping->fetches, fetches);
        return fetches < FETCHES;
}

/* The sending end of a bell of the other side; -1: we have none, and the router rings it. */
static int peer_bell(uint32_t arena, uint32_t side, int bell)
{
        struct mapping *mapping = mapping_of(arena);
        struct arena_record *record = &family->arenas[arena];
        /* Pairs with bell_ringer_received(). */
        int32_t known = atomic_load(&mapping->peers[bell]);

        if (known > 0)
                return known - 1;
        if (!may_fetch(mapping))
                return -1;
        router_receive();
        known = load_acquire(&mapping->peers[bell]);
        if (known > 0)
                return known - 1;
        router_bell(FETCH, atomic_load(&record->id), atomic_load(&record->token), 1 - side, (uint32_t)bell);
        return -1;
}

static void forget_peer_bell(uint32_t arena, uint32_t side, int bell, int fd)
{
        struct mapping *mapping = mapping_of(arena);
        int32_t known = fd + 1;

        atomic_fetch_and(&arena_header(mapping)->sides[1 - side].known[bell / 64], ~bit(bell));
        if (atomic_compare_exchange_strong(&mapping->peers[bell], &known, 0)) {
                if (is_own_descriptor(fd))
                        close_own(fd);
                atomic_fetch_sub(&mapping->kept, 1);
        }
}

/* Ring a bell of the other side, unless it has been rung since its waiter looked. `dirty` is set.
 */
static void ring_bell(uint32_t arena, uint32_t side, int bell)
{
        struct mapping *mapping = mapping_of(arena);
        _Atomic uint32_t *rung = rung_of(mapping, 1 - side, bell);
        enum ringing outcome;
        uint32_t seen;
        int fd;

        if (rung_seen(rung, &seen))
                return;
        fd = peer_bell(arena, side, bell);
        if (fd < 0)
                return;
        outcome = ring_once(fd);
        if (outcome == RUNG)
                rung_sent(rung, seen);
        if (outcome != CLOSED)
                return;
        /* The other side has released the arena and got it again, with new bells under the old
         * numbers. */
        forget_peer_bell(arena, side, bell, fd);
        if (atomic_load(&mapping->remote))
                break_connections(mapping);
        else if ((fd = peer_bell(arena, side, bell)) >= 0)
                ring_once(fd);
}

void ring_bells(struct waiters *waiters, const struct place *place)
{
        uint32_t arena = load_relaxed(&place->arena);
        uint32_t side = load_relaxed(&place->side);
        uint32_t slot = load_relaxed(&place->slot);
        struct side *theirs = &arena_header(mapping_of(arena))->sides[1 - side];

        atomic_exchange_explicit(&waiters->any, 0, memory_order_acq_rel);
        for (int word = 0; word < BELL_WORDS; word++) {
                uint64_t sleeping = load_relaxed(&waiters->bells[word]);

                if (sleeping)
                        sleeping = atomic_exchange_explicit(&waiters->bells[word], 0, memory_order_acq_rel);
                for (; sleeping; sleeping &= sleeping - 1) {
                        int bell = word * 64 + __builtin_ctzll(sleeping);

                        /* First: the waiter looks at it after a ring, and the router may ring
                         * before the request for a bell returns. */
                        atomic_fetch_or_explicit(&theirs->dirty[bell], UINT64_C(1) << slot,
                                                 memory_order_seq_cst);
                        ring_bell(arena, side, bell);
                }
        }
}
