/* The transport `memory`: relays of one machine, or two links of one relay, over memory that both have
 * mapped. For tests and for measuring what the relay itself costs; the processor does what the device would
 * do.
 *
 * An end is a channel: slots into which the peer puts messages, and a word that says whether its owner
 * sleeps. What an address or a place names is a descriptor of the peer's process, got by pidfd_getfd(): only
 * a router that asks for this transport, as root, ever gets here.
 *
 * The `device` of R_OPEN names faults to make, separated by commas:
 *
 *      delay=US    each batch is carried out, and complete, up to so much later; in order, as RDMA has it
 *      shuffle=1   the writes of a batch, in pieces, in any order, and long before its message
 *      lose=N      one batch of about N, and all after it, get lost, after a part of its writes; the end that
 *                  sent it hears of it as of a queue pair that has tried for too long
 *      seed=N      of all this
 */
#include "link.h"
#include "mirror.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
        ENDS = 64,
        PIECE = 64 * 1024,
        PENDING = 64, /* batches that a fault keeps back */
        NOTICE = 30,  /* ms after which a lost batch is noticed */
        SHRED = 4096, /* bytes of a piece that is shuffled */
};

struct letter {
        uint32_t size;
        uint32_t unused;
        struct wire_message message;
};

/* The owner reads, the peer writes. */
struct channel {
        uint64_t cookie;
        _Alignas(64) _Atomic uint64_t tail;
        _Alignas(64) _Atomic uint64_t head;
        _Atomic uint32_t sleeps; /* w owner, r peer: seq_cst, against `tail` */
        _Alignas(64) struct letter letters[WINDOW];
};

struct piece {
        const struct mirror *mirror;
        uint32_t offset, size;
};

struct pending {
        uint64_t due;
        uint64_t number;
        bool lost;
        unsigned pieces;
        struct {
                const unsigned char *from;
                unsigned char *to;
                uint32_t size;
        } piece[BLOCKS * WRITES * (PIECE / SHRED)];
        struct letter letter;
};

struct memory_end {
        struct watch peer_dies;
        struct link *link;
        int memory; /* of our channel */
        struct channel *channel;
        struct channel *peer;
        int peer_bell;
        /* faults */
        struct pending *pending;
        unsigned first, count, building;
        uint64_t dies; /* ns; 0: it lives */
};

/* The peer's slot. */
struct reached {
        unsigned char *small, *bulk; /* its pages, its bulk area, both directions */
        size_t bulk_size;
};

static struct watch bell = {.fd = -1};
static struct memory_end *ends[ENDS];
static struct {
        uint64_t delay, lose, seed;
        bool shuffle;
} faults;

static uint64_t dice(uint64_t sides)
{
        faults.seed ^= faults.seed << 13;
        faults.seed ^= faults.seed >> 7;
        faults.seed ^= faults.seed << 17;
        return faults.seed % sides;
}

static bool makes_faults(void)
{
        return faults.delay || faults.lose || faults.shuffle;
}

static void rang(struct watch *watch, uint32_t events)
{
        uint64_t number;

        (void)events;
        count(COUNT_CALLS, 1);
        if (read(watch->fd, &number, sizeof number) < 0)
                return;
}

static int memory_open(const struct relay_open *open, uint32_t *mtu, char *text)
{
        const char *at;

        memset(&faults, 0, sizeof faults);
        faults.seed = 88172645463325252u;
        if ((at = strstr(open->device, "delay=")))
                faults.delay = strtoul(at + 6, NULL, 10) * 1000;
        if ((at = strstr(open->device, "lose=")))
                faults.lose = strtoul(at + 5, NULL, 10);
        if ((at = strstr(open->device, "seed=")))
                faults.seed += strtoul(at + 5, NULL, 10) * 2654435761u;
        faults.shuffle = strstr(open->device, "shuffle=1") != NULL;
        bell = (struct watch){.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .call = rang};
        if (bell.fd < 0 || !watch_add(&bell, EPOLLIN)) {
                snprintf(text, RELAY_TEXT, "a bell for the memory transport: %s", strerror(errno));
                return errno;
        }
        *mtu = 4096;
        return 0;
}

static void memory_close(void)
{
        watch_remove(&bell);
        close(bell.fd);
        bell.fd = -1;
}

static int make_channel(struct memory_end *end)
{
        void *got;

        end->memory = memfd_create("freeflow-link", MFD_CLOEXEC);
        if (end->memory < 0 || ftruncate(end->memory, sizeof *end->channel) < 0)
                return errno;
        got = mmap(NULL, sizeof *end->channel, PROT_READ | PROT_WRITE, MAP_SHARED, end->memory, 0);
        if (got == MAP_FAILED)
                return errno;
        end->channel = got;
        end->channel->cookie = relay_random();
        return 0;
}

static int memory_make(struct link *link, struct wire_address *address, char *text)
{
        struct memory_end *end = calloc(1, sizeof *end);
        int place = 0, error;

        while (place < ENDS && ends[place])
                place++;
        if (!end || place == ENDS) {
                free(end);
                snprintf(text, RELAY_TEXT, "no more than %d links", ENDS);
                return ENOSPC;
        }
        end->link = link;
        end->peer_bell = end->peer_dies.fd = -1;
        if (makes_faults() && !(end->pending = calloc(PENDING, sizeof *end->pending)))
                relay_die("memory for faults", ENOMEM);
        ends[place] = end;
        link->end = end;
        error = make_channel(end);
        if (error) {
                snprintf(text, RELAY_TEXT, "a channel: %s", strerror(error));
                return error;
        }
        address->to.memory.process = getpid();
        address->to.memory.channel = end->memory;
        address->to.memory.bell = bell.fd;
        address->to.memory.cookie = end->channel->cookie;
        return 0;
}

/* A descriptor of another process, or of this one. */
static int take(int process, int fd)
{
        long pidfd, got;

        if (process == getpid())
                return fcntl(fd, F_DUPFD_CLOEXEC, 0);
        pidfd = syscall(SYS_pidfd_open, process, 0);
        if (pidfd < 0)
                return -1;
        got = syscall(SYS_pidfd_getfd, pidfd, fd, 0);
        close((int)pidfd);
        return (int)got;
}

static bool poll_end(struct memory_end *end);

/* What it said before it died has arrived, as a device's completions have. */
static void on_death(struct watch *watch, uint32_t events)
{
        struct memory_end *end = OF(watch, struct memory_end, peer_dies);
        struct link *link = end->link;

        (void)events;
        while (link->end == end && link->state == LINK_UP && poll_end(end))
                continue;
        if (link->end == end)
                link_down(link, ECONNRESET, "the peer's relay is gone");
}

static int memory_connect(struct link *link, const struct wire_address *address, char *text)
{
        struct memory_end *end = link->end;
        int channel = take(address->to.memory.process, address->to.memory.channel);
        void *got = MAP_FAILED;

        end->peer_bell = take(address->to.memory.process, address->to.memory.bell);
        if (channel >= 0 && lseek(channel, 0, SEEK_END) == (off_t)sizeof *end->peer)
                got = mmap(NULL, sizeof *end->peer, PROT_READ | PROT_WRITE, MAP_SHARED, channel, 0);
        if (channel >= 0)
                close(channel);
        if (got != MAP_FAILED)
                end->peer = got;
        if (got == MAP_FAILED || end->peer_bell < 0 || end->peer->cookie != address->to.memory.cookie) {
                snprintf(text, RELAY_TEXT, "there is no such channel");
                return ENOENT;
        }
        if (address->to.memory.process != getpid()) {
                end->peer_dies.call = on_death;
                end->peer_dies.fd = (int)syscall(SYS_pidfd_open, address->to.memory.process, 0);
                if (end->peer_dies.fd < 0 || !watch_add(&end->peer_dies, EPOLLIN)) {
                        snprintf(text, RELAY_TEXT, "the peer's relay is gone");
                        return ECONNRESET;
                }
        }
        return 0;
}

static void memory_unmake(struct link *link)
{
        struct memory_end *end = link->end;

        for (int i = 0; i < ENDS; i++)
                if (ends[i] == end)
                        ends[i] = NULL;
        watch_remove(&end->peer_dies);
        if (end->peer_dies.fd >= 0)
                close(end->peer_dies.fd);
        if (end->peer_bell >= 0)
                close(end->peer_bell);
        if (end->peer)
                munmap(end->peer, sizeof *end->peer);
        if (end->channel)
                munmap(end->channel, sizeof *end->channel);
        if (end->memory >= 0)
                close(end->memory);
        free(end->pending);
        free(end);
}

static int memory_lend(struct mirror *m, struct wire_place *place, char *text)
{
        (void)text;
        place->to.memory.process = getpid();
        place->to.memory.arena = m->shared->memory;
        place->to.memory.slot = m->slot;
        m->lent = m;
        return 0;
}

static void memory_take_back(struct mirror *m)
{
        m->lent = NULL;
}

static int memory_reach(struct mirror *m, const struct wire_place *place, char *text)
{
        struct reached *reached = calloc(1, sizeof *reached);
        uint32_t slot = place->to.memory.slot;
        int arena = take(place->to.memory.process, place->to.memory.arena);
        void *small = MAP_FAILED, *bulk = MAP_FAILED;

        if (!reached)
                relay_die("memory for a place", ENOMEM);
        reached->bulk_size = (size_t)SIDES * m->size;
        if (arena >= 0 && slot < SLOTS && lseek(arena, 0, SEEK_END) == (off_t)arena_size(m->size)) {
                small = mmap(NULL, SIDES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, arena,
                             SLOT_OFFSET + (off_t)slot * SIDES * PAGE);
                bulk = mmap(NULL, reached->bulk_size, PROT_READ | PROT_WRITE, MAP_SHARED, arena,
                            BULK_OFFSET + (off_t)slot * (off_t)reached->bulk_size);
        }
        if (arena >= 0)
                close(arena);
        if (small == MAP_FAILED || bulk == MAP_FAILED) {
                if (small != MAP_FAILED)
                        munmap(small, SIDES * PAGE);
                free(reached);
                snprintf(text, RELAY_TEXT, "there is no such arena");
                return ENOENT;
        }
        reached->small = small;
        reached->bulk = bulk;
        m->reached = reached;
        return 0;
}

static void memory_forget(struct mirror *m)
{
        struct reached *reached = m->reached;

        munmap(reached->small, SIDES * PAGE);
        munmap(reached->bulk, reached->bulk_size);
        free(reached);
        m->reached = NULL;
}

static const unsigned char *from_of(const struct mirror *m, uint32_t offset)
{
        return (offset < SMALL_SIZE ? (const unsigned char *)m->out + RING_HEADER : m->out_bulk) + offset;
}

static unsigned char *to_of(const struct mirror *m, uint32_t offset)
{
        const struct reached *reached = m->reached;

        return (offset < SMALL_SIZE ? reached->small + PAGE + RING_HEADER : reached->bulk + m->size) + offset;
}

static bool memory_room(struct link *link, unsigned writes)
{
        const struct memory_end *end = link->end;

        (void)writes;
        return !end->pending || end->count < PENDING;
}

static struct pending *building(struct memory_end *end)
{
        return &end->pending[(end->first + end->count) % PENDING];
}

static void memory_write(struct link *link, struct mirror *m, uint32_t offset, uint32_t size)
{
        struct memory_end *end = link->end;

        if (!end->pending) {
                memcpy(to_of(m, offset), from_of(m, offset), size);
                count(COUNT_COPIED, size);
                return;
        }
        for (uint32_t at = 0; at < size; at += SHRED) {
                struct pending *p = building(end);
                unsigned number = end->building++;

                p->piece[number].from = from_of(m, offset + at);
                p->piece[number].to = to_of(m, offset + at);
                p->piece[number].size = size - at < SHRED ? size - at : SHRED;
        }
}

static void put_letter(struct memory_end *end, const struct letter *letter)
{
        struct channel *peer = end->peer;
        uint64_t tail = atomic_load_explicit(&peer->tail, memory_order_relaxed);
        struct letter *place = &peer->letters[tail % WINDOW];

        place->size = letter->size;
        memcpy(&place->message, &letter->message, letter->size);
        atomic_store_explicit(&peer->tail, tail + 1, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&peer->sleeps, memory_order_relaxed)) {
                uint64_t one = 1;

                atomic_store_explicit(&peer->sleeps, 0, memory_order_relaxed);
                count(COUNT_CALLS, 1);
                if (write(end->peer_bell, &one, sizeof one) < 0)
                        return;
        }
}

static void memory_send(struct link *link, const void *message, uint32_t size, uint64_t number, bool soon)
{
        struct memory_end *end = link->end;
        struct letter letter = {.size = size};
        struct pending *p;

        (void)soon;
        memcpy(&letter.message, message, size);
        count(COUNT_POSTS, 1);
        if (!end->pending) {
                put_letter(end, &letter);
                link_completed(link, number);
                return;
        }
        p = building(end);
        p->due = now() + (faults.delay ? dice(faults.delay) : 0);
        p->number = number;
        p->letter = letter;
        p->pieces = end->building;
        p->lost = end->dies || (faults.lose && !dice(faults.lose));
        if (faults.shuffle)
                for (unsigned i = p->pieces; i > 1; i--) {
                        unsigned other = (unsigned)dice(i);
                        typeof(p->piece[0]) kept = p->piece[i - 1];

                        p->piece[i - 1] = p->piece[other];
                        p->piece[other] = kept;
                }
        if (p->lost && !end->dies) {
                end->dies = now() + NOTICE * UINT64_C(1000000);
                p->pieces = p->pieces ? (unsigned)dice(p->pieces) : 0;
        }
        end->building = 0;
        end->count++;
}

/* Bytes get there at any moment before their message. */
static void carry(struct pending *p, unsigned most)
{
        while (p->pieces && most--) {
                p->pieces--;
                memcpy(p->piece[p->pieces].to, p->piece[p->pieces].from, p->piece[p->pieces].size);
                count(COUNT_COPIED, p->piece[p->pieces].size);
        }
}

static bool run_faults(struct memory_end *end)
{
        uint64_t present = now();
        bool any = false;

        while (end->count) {
                struct pending *p = &end->pending[end->first];

                if (p->lost) {
                        carry(p, p->pieces);
                        break;
                }
                carry(p, 1);
                if (present < p->due)
                        break;
                carry(p, p->pieces);
                put_letter(end, &p->letter);
                end->first = (end->first + 1) % PENDING;
                end->count--;
                any = true;
                link_completed(end->link, p->number);
        }
        if (end->dies && present >= end->dies) {
                link_down(end->link, ETIMEDOUT, "the peer doesn't answer (a fault on purpose)");
                return true;
        }
        return any;
}

static bool poll_end(struct memory_end *end)
{
        struct channel *channel = end->channel;
        struct link *link = end->link;
        uint64_t head, tail;

        head = atomic_load_explicit(&channel->head, memory_order_relaxed);
        tail = atomic_load_explicit(&channel->tail, memory_order_acquire);
        if (head == tail)
                return false;
        if (tail - head > WINDOW) {
                link_down(link, EPROTO, "the peer has put more than there is room for");
                return true;
        }
        for (; head != tail && link->end == end; head++) {
                struct letter letter;

                memcpy(&letter, &channel->letters[head % WINDOW], sizeof letter);
                count(COUNT_COMPLETIONS, 1);
                atomic_store_explicit(&channel->head, head + 1, memory_order_relaxed);
                link_message(link, &letter.message, letter.size);
        }
        return true;
}

static bool memory_poll(void)
{
        bool any = false;

        count(COUNT_POLLS, 1);
        for (int i = 0; i < ENDS; i++) {
                struct memory_end *end = ends[i];

                if (!end || end->link->state != LINK_UP)
                        continue;
                any = poll_end(end) || any;
                if (ends[i] == end && end->pending)
                        any = run_faults(end) || any;
        }
        return any;
}

static bool memory_arm(void)
{
        bool nothing = true;

        for (int i = 0; i < ENDS; i++)
                if (ends[i] && ends[i]->link->state == LINK_UP)
                        atomic_store_explicit(&ends[i]->channel->sleeps, 1, memory_order_relaxed);
        /* Pairs with put_letter(): either it sees `sleeps`, or we see its letter. */
        atomic_thread_fence(memory_order_seq_cst);
        for (int i = 0; i < ENDS; i++)
                if (ends[i] && ends[i]->link->state == LINK_UP &&
                    (ends[i]->count || ends[i]->dies ||
                     atomic_load_explicit(&ends[i]->channel->tail, memory_order_relaxed) !=
                         atomic_load_explicit(&ends[i]->channel->head, memory_order_relaxed)))
                        nothing = false;
        return nothing;
}

const struct transport memory_transport = {
    .kind = RELAY_MEMORY,
    .window = WINDOW,
    .piece = PIECE,
    .open = memory_open,
    .close = memory_close,
    .make = memory_make,
    .connect = memory_connect,
    .unmake = memory_unmake,
    .lend = memory_lend,
    .take_back = memory_take_back,
    .reach = memory_reach,
    .forget = memory_forget,
    .room = memory_room,
    .write = memory_write,
    .send = memory_send,
    .poll = memory_poll,
    .arm = memory_arm,
};
