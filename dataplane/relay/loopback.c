/* The transport `loopback`: relays of one machine, or two links of one relay, over memory that both
 * have mapped. For tests, and for measuring what the relay itself costs. The processor does what a
 * device would do.
 *
 * A channel is an inbox here, into which the peer puts messages, and a mapping of the peer's inbox.
 * Writes are copied at once, so a batch is complete when it is sent. Addresses and places name
 * descriptors of the peer's process, which the relay duplicates by pidfd_getfd(); that needs root.
 * The relay that is shipped does not contain it.
 */
#include "lent_files.h"
#include "link.h"
#include "mirror.h"
#include "transports.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
        CHANNELS = 64,
        PIECE = 64 * 1024,
};

struct letter {
        uint32_t size;
        uint32_t unused;
        struct wire_message message;
};

/* The owner reads it, the peer writes it. */
struct inbox {
        uint64_t cookie;
        _Alignas(64) _Atomic uint64_t tail; /* messages that the peer has put */
        _Alignas(64) _Atomic uint64_t head; /* messages that the owner has taken */
        _Atomic uint32_t sleeps;            /* w owner, r peer: seq_cst, against `tail` */
        _Alignas(64) struct letter letters[WINDOW];
};

struct channel {
        struct watch peer_dies;
        struct link *link;
        int memory; /* of our inbox */
        struct inbox *inbox;
        struct inbox *peer;
        int peer_bell;
};

/* Mappings of the peer's slot. */
struct target {
        unsigned char *small, *bulk; /* its two pages; its bulk areas, of both directions */
        size_t bulk_size;
};

static struct watch bell = {.fd = -1};
static struct channel *channels[CHANNELS];

static void on_bell(struct watch *watch, UNUSED uint32_t events)
{
        uint64_t number;

        count(COUNT_CALLS, 1);
        if (read(watch->fd, &number, sizeof number) < 0)
                return;
}

static int loopback_open(UNUSED const struct relay_open *request, uint32_t *mtu, char *text)
{
        bell = (struct watch){.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .call = on_bell};
        if (bell.fd < 0 || !watch_add(&bell, EPOLLIN))
                return relay_refuse(text, errno, "a bell for the loopback transport: %s", strerror(errno));
        *mtu = 4096;
        return 0;
}

static void loopback_close(void)
{
        lent_files_deregister(&loopback_transport);
        watch_remove(&bell);
        close(bell.fd);
        bell.fd = -1;
}

static int make_inbox(struct channel *channel)
{
        void *got;

        channel->memory = memfd_create("freeflow-link", MFD_CLOEXEC);
        if (channel->memory < 0 || ftruncate(channel->memory, sizeof *channel->inbox) < 0)
                return errno;
        got = mmap(NULL, sizeof *channel->inbox, PROT_READ | PROT_WRITE, MAP_SHARED, channel->memory, 0);
        if (got == MAP_FAILED)
                return errno;
        channel->inbox = got;
        channel->inbox->cookie = relay_random();
        return 0;
}

static int loopback_create_channel(struct link *link, struct wire_address *address, char *text)
{
        struct channel *channel = calloc(1, sizeof *channel);
        int index = 0, error;

        while (index < CHANNELS && channels[index])
                index++;
        if (!channel || index == CHANNELS) {
                free(channel);
                return relay_refuse(text, ENOSPC, "no more than %d links", CHANNELS);
        }
        channel->link = link;
        channel->peer_bell = channel->peer_dies.fd = -1;
        channels[index] = channel;
        link->channel = channel;
        error = make_inbox(channel);
        if (error)
                return relay_refuse(text, error, "memory for a channel: %s", strerror(error));
        address->to.loopback.process = getpid();
        address->to.loopback.channel = channel->memory;
        address->to.loopback.bell = bell.fd;
        address->to.loopback.cookie = channel->inbox->cookie;
        return 0;
}

/* Duplicates a descriptor of another process, or of this one. */
static int duplicate(int process, int fd)
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

static bool poll_channel(struct channel *channel);

/* The peer's messages from before its death have arrived and count, as with a device. */
static void on_death(struct watch *watch, UNUSED uint32_t events)
{
        struct channel *channel = OF(watch, struct channel, peer_dies);
        struct link *link = channel->link;

        while (link->channel == channel && link->state == LINK_UP && poll_channel(channel))
                continue;
        if (link->channel == channel)
                link_down(link, ECONNRESET, "the peer's relay is gone");
}

static int loopback_connect_channel(struct link *link, const struct wire_address *address, char *text)
{
        struct channel *channel = link->channel;
        int inbox = duplicate(address->to.loopback.process, address->to.loopback.channel);
        void *got = MAP_FAILED;

        channel->peer_bell = duplicate(address->to.loopback.process, address->to.loopback.bell);
        if (inbox >= 0 && lseek(inbox, 0, SEEK_END) == (off_t)sizeof *channel->peer)
                got = mmap(NULL, sizeof *channel->peer, PROT_READ | PROT_WRITE, MAP_SHARED, inbox, 0);
        if (inbox >= 0)
                close(inbox);
        if (got != MAP_FAILED)
                channel->peer = got;
        if (got == MAP_FAILED || channel->peer_bell < 0 ||
            channel->peer->cookie != address->to.loopback.cookie)
                return relay_refuse(text, ENOENT, "there is no such channel");
        if (address->to.loopback.process != getpid()) {
                channel->peer_dies.call = on_death;
                channel->peer_dies.fd = (int)syscall(SYS_pidfd_open, address->to.loopback.process, 0);
                if (channel->peer_dies.fd < 0 || !watch_add(&channel->peer_dies, EPOLLIN))
                        return relay_refuse(text, ECONNRESET, "the peer's relay is gone");
        }
        return 0;
}

static void loopback_destroy_channel(struct link *link)
{
        struct channel *channel = link->channel;

        for (int i = 0; i < CHANNELS; i++)
                if (channels[i] == channel)
                        channels[i] = NULL;
        watch_remove(&channel->peer_dies);
        if (channel->peer_dies.fd >= 0)
                close(channel->peer_dies.fd);
        if (channel->peer_bell >= 0)
                close(channel->peer_bell);
        if (channel->peer)
                munmap(channel->peer, sizeof *channel->peer);
        if (channel->inbox)
                munmap(channel->inbox, sizeof *channel->inbox);
        if (channel->memory >= 0)
                close(channel->memory);
        free(channel);
}

static int loopback_register_rings(struct mirror *m, struct wire_place *place, UNUSED char *text)
{
        place->to.loopback.process = getpid();
        place->to.loopback.arena = m->shared->memory;
        place->to.loopback.slot = m->slot;
        m->registration = m;
        return 0;
}

static void loopback_deregister(struct mirror *m)
{
        m->registration = NULL;
}

static int loopback_attach(struct mirror *m, const struct wire_place *place, char *text)
{
        struct target *target = relay_memory(sizeof *target, "memory for a connection");
        uint32_t slot = place->to.loopback.slot;
        int arena = duplicate(place->to.loopback.process, place->to.loopback.arena);
        void *small = MAP_FAILED, *bulk = MAP_FAILED;

        target->bulk_size = (size_t)SIDES * m->size;
        if (arena >= 0 && slot < SLOTS && lseek(arena, 0, SEEK_END) == (off_t)arena_size(m->size)) {
                small = mmap(NULL, SIDES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, arena,
                             SLOT_OFFSET + (off_t)slot * SIDES * PAGE);
                bulk = mmap(NULL, target->bulk_size, PROT_READ | PROT_WRITE, MAP_SHARED, arena,
                            BULK_OFFSET + (off_t)slot * (off_t)target->bulk_size);
        }
        if (arena >= 0)
                close(arena);
        if (small == MAP_FAILED || bulk == MAP_FAILED) {
                if (small != MAP_FAILED)
                        munmap(small, SIDES * PAGE);
                free(target);
                return relay_refuse(text, ENOENT, "there is no such arena");
        }
        target->small = small;
        target->bulk = bulk;
        m->target = target;
        return 0;
}

static void loopback_detach(struct mirror *m)
{
        struct target *target = m->target;

        munmap(target->small, SIDES * PAGE);
        munmap(target->bulk, target->bulk_size);
        free(target);
        m->target = NULL;
}

static const unsigned char *from_of(const struct mirror *m, uint32_t offset)
{
        return (offset < SMALL_SIZE ? (const unsigned char *)m->out + RING_HEADER : m->out_bulk) + offset;
}

static unsigned char *to_of(const struct mirror *m, uint32_t offset)
{
        const struct target *target = m->target;

        return (offset < SMALL_SIZE ? target->small + PAGE + RING_HEADER : target->bulk + m->size) + offset;
}

/* A file that the peer has lent. */
struct reached_file {
        unsigned char *base;
        uint64_t size;
};

static int loopback_register_file(struct lent_file *file, UNUSED char *text)
{
        file->registration = file;
        count(COUNT_REGISTERED, file->size);
        return 0;
}

static void loopback_deregister_file(struct lent_file *file)
{
        relay.counters[COUNT_REGISTERED] -= file->size;
}

static void loopback_place_file(const struct lent_file *file, uint64_t *address, uint64_t *key)
{
        *address = (uint64_t)getpid();
        *key = (uint64_t)file->memory;
}

static void *loopback_reach(uint64_t address, uint64_t key, uint64_t size)
{
        struct reached_file *reached = relay_memory(sizeof *reached, "memory for a file of a peer");
        int memory = duplicate((int)address, (int)key);
        void *got = MAP_FAILED;

        if (memory >= 0 && size > LENT_FILE_HEADER && lseek(memory, 0, SEEK_END) == (off_t)size)
                got = mmap(NULL, size - LENT_FILE_HEADER, PROT_READ | PROT_WRITE, MAP_SHARED, memory,
                           LENT_FILE_HEADER);
        if (memory >= 0)
                close(memory);
        if (got == MAP_FAILED) {
                free(reached);
                return NULL;
        }
        *reached = (struct reached_file){.base = got, .size = size - LENT_FILE_HEADER};
        return reached;
}

static void loopback_unreach(void *reached)
{
        struct reached_file *file = reached;

        munmap(file->base, file->size);
        free(file);
}

static void loopback_move(UNUSED struct link *link, const struct lent_file *from, uint64_t from_offset,
                          void *to, uint64_t to_offset, uint32_t size)
{
        const struct reached_file *reached = to;

        unsigned char *place = reached->base + (to_offset - LENT_FILE_HEADER);

        /* The last byte comes last, as from a device. */
        memcpy(place, from->base + from_offset, size - 1);
        atomic_thread_fence(memory_order_release);
        place[size - 1] = from->base[from_offset + size - 1];
        count(COUNT_COPIED, size);
}

/* A channel has WINDOW letters, and the relay sends no more than are granted. */
static bool loopback_has_room(UNUSED struct link *link, UNUSED unsigned lane, UNUSED unsigned writes)
{
        return true;
}

static void loopback_write(UNUSED struct link *link, struct mirror *m, uint32_t offset, uint32_t size)
{
        memcpy(to_of(m, offset), from_of(m, offset), size);
        count(COUNT_COPIED, size);
}

static void loopback_send(struct link *link, UNUSED unsigned lane, const void *message, uint32_t size,
                          uint64_t number, UNUSED bool soon)
{
        struct channel *channel = link->channel;
        struct inbox *peer = channel->peer;
        uint64_t tail = atomic_load_explicit(&peer->tail, memory_order_relaxed);
        struct letter *letter = &peer->letters[tail % WINDOW];

        count(COUNT_POSTS, 1);
        letter->size = size;
        memcpy(&letter->message, message, size);
        atomic_store_explicit(&peer->tail, tail + 1, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&peer->sleeps, memory_order_relaxed)) {
                uint64_t one = 1;

                atomic_store_explicit(&peer->sleeps, 0, memory_order_relaxed);
                count(COUNT_CALLS, 1);
                /* It fails only while the counter is full: then the peer is woken already. */
                (void)!write(channel->peer_bell, &one, sizeof one);
        }
        link_completed(link, 0, number);
}

static bool poll_channel(struct channel *channel)
{
        struct inbox *inbox = channel->inbox;
        struct link *link = channel->link;
        uint64_t head, tail;

        head = atomic_load_explicit(&inbox->head, memory_order_relaxed);
        tail = atomic_load_explicit(&inbox->tail, memory_order_acquire);
        if (head == tail)
                return false;
        if (tail - head > WINDOW) {
                link_down(link, EPROTO, "the peer has sent more messages than were granted");
                return true;
        }
        for (; head != tail && link->channel == channel; head++) {
                struct letter letter;

                memcpy(&letter, &inbox->letters[head % WINDOW], sizeof letter);
                count(COUNT_COMPLETIONS, 1);
                atomic_store_explicit(&inbox->head, head + 1, memory_order_relaxed);
                link_receive(link, 0, &letter.message, letter.size);
        }
        return true;
}

static bool loopback_poll(void)
{
        bool any = false;

        count(COUNT_POLLS, 1);
        for (int i = 0; i < CHANNELS; i++) {
                struct channel *channel = channels[i];

                if (!channel || channel->link->state != LINK_UP)
                        continue;
                any = poll_channel(channel) || any;
        }
        return any;
}

static bool loopback_arm(void)
{
        bool nothing = true;

        for (int i = 0; i < CHANNELS; i++)
                if (channels[i] && channels[i]->link->state == LINK_UP)
                        atomic_store_explicit(&channels[i]->inbox->sleeps, 1, memory_order_relaxed);
        /* Pairs with loopback_send(): either it sees `sleeps`, or we see its letter. */
        atomic_thread_fence(memory_order_seq_cst);
        for (int i = 0; i < CHANNELS; i++)
                if (channels[i] && channels[i]->link->state == LINK_UP &&
                    atomic_load_explicit(&channels[i]->inbox->tail, memory_order_relaxed) !=
                        atomic_load_explicit(&channels[i]->inbox->head, memory_order_relaxed))
                        nothing = false;
        return nothing;
}

const struct transport loopback_transport = {
    .kind = RELAY_LOOPBACK,
    .window = WINDOW,
    .piece = PIECE,
    .lanes = 1,
    .message_lanes = 1,
    .open = loopback_open,
    .close = loopback_close,
    .create_channel = loopback_create_channel,
    .connect_channel = loopback_connect_channel,
    .destroy_channel = loopback_destroy_channel,
    .register_rings = loopback_register_rings,
    .deregister = loopback_deregister,
    .attach = loopback_attach,
    .detach = loopback_detach,
    .has_room = loopback_has_room,
    .write = loopback_write,
    .register_file = loopback_register_file,
    .deregister_file = loopback_deregister_file,
    .place_file = loopback_place_file,
    .reach = loopback_reach,
    .unreach = loopback_unreach,
    .move = loopback_move,
    .send = loopback_send,
    .poll = loopback_poll,
    .arm = loopback_arm,
};
