/* The transport of relays that are built for tests: `loopback` with faults on purpose. It keeps
 * batches back and hands them to the real transport later, in pieces, or not at all.
 *
 * The `device` of R_OPEN names the faults, separated by commas; without any it only passes
 * everything on:
 *
 *      delay=US    each batch is carried out, and complete, up to this much later; batches stay in
 *                  order, as with RDMA
 *      shuffle=1   the writes of a batch, cut into pieces, are carried out in any order and long
 *                  before the message of the batch
 *      lose=N      about one batch in N, and all after it, is lost after a part of its writes; its
 *                  sender is told so as by a queue pair that has retried for too long
 *      seed=N      of the random numbers
 */
#include "../../dataplane/relay/lent_files.h"
#include "../../dataplane/relay/link.h"
#include "../../dataplane/relay/mirror.h"
#include "../../dataplane/relay/transports.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
        CHANNELS = 64,
        PENDING = 64, /* batches that are kept back, per channel */
        NOTICE = 30,  /* ms after which its sender learns that a batch is lost */
        PIECE = 4096, /* bytes of a write that is carried out by itself */
        /* pieces of a batch, at most */
        PIECES = BLOCKS * WRITES * (64 * 1024 / PIECE),
};

struct piece {
        struct mirror *mirror;
        uint32_t offset, size;
};

struct batch {
        uint64_t due;
        uint64_t number;
        bool lost;
        unsigned count;
        struct piece pieces[PIECES];
        uint32_t size;
        struct wire_message message;
};

/* The batches of a link's channel that are kept back. */
struct kept {
        struct link *link; /* NULL: free */
        struct batch *batches;
        unsigned first, count, building;
        uint64_t dies; /* ns; 0: no batch is lost yet */
};

static const struct transport *const real = &loopback_transport;
static struct kept channels[CHANNELS];
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

static uint64_t option(const char *device, const char *name)
{
        const char *at = strstr(device, name);

        return at ? strtoul(at + strlen(name), NULL, 10) : 0;
}

static int faulty_open(const struct relay_open *request, uint32_t *mtu, char *text)
{
        faults.delay = option(request->device, "delay=") * 1000;
        faults.lose = option(request->device, "lose=");
        faults.seed = 88172645463325252u + option(request->device, "seed=") * 2654435761u;
        faults.shuffle = option(request->device, "shuffle=") != 0;
        return real->open(request, mtu, text);
}

static void faulty_close(void)
{
        lent_files_deregister(&faulty_transport);
        real->close();
}

/* NULL: the link has no faults. */
static struct kept *kept_of(const struct link *link)
{
        for (int i = 0; i < CHANNELS; i++)
                if (channels[i].link == link)
                        return &channels[i];
        return NULL;
}

static int faulty_create_channel(struct link *link, struct wire_address *address, char *text)
{
        int error = real->create_channel(link, address, text);
        struct kept *kept = kept_of(NULL);

        if (error || !(faults.delay || faults.lose || faults.shuffle))
                return error;
        *kept = (struct kept){.link = link, .batches = calloc(PENDING, sizeof *kept->batches)};
        if (!kept->batches)
                relay_die("memory for faults", ENOMEM);
        return 0;
}

static int faulty_connect_channel(struct link *link, const struct wire_address *address, char *text)
{
        return real->connect_channel(link, address, text);
}

static void faulty_destroy_channel(struct link *link)
{
        struct kept *kept = kept_of(link);

        if (kept) {
                free(kept->batches);
                *kept = (struct kept){0};
        }
        real->destroy_channel(link);
}

static int faulty_register_rings(struct mirror *mirror, struct wire_place *place, char *text)
{
        return real->register_rings(mirror, place, text);
}

static void faulty_deregister(struct mirror *mirror)
{
        real->deregister(mirror);
}

static int faulty_attach(struct mirror *mirror, const struct wire_place *place, char *text)
{
        return real->attach(mirror, place, text);
}

static void faulty_detach(struct mirror *mirror)
{
        real->detach(mirror);
}

static bool faulty_has_room(struct link *link, unsigned lane, unsigned writes)
{
        const struct kept *kept = kept_of(link);

        return real->has_room(link, lane, writes) && (!kept || kept->count < PENDING);
}

static struct batch *batch_at(struct kept *kept, unsigned index)
{
        return &kept->batches[(kept->first + index) % PENDING];
}

static void faulty_write(struct link *link, struct mirror *mirror, uint32_t offset, uint32_t size)
{
        struct kept *kept = kept_of(link);

        if (!kept) {
                real->write(link, mirror, offset, size);
                return;
        }
        for (uint32_t at = 0; at < size; at += PIECE) {
                struct piece *piece = &batch_at(kept, kept->count)->pieces[kept->building++];

                piece->mirror = mirror;
                piece->offset = offset + at;
                piece->size = size - at < PIECE ? size - at : PIECE;
        }
}

static int faulty_register_file(struct lent_file *file, char *text)
{
        return real->register_file(file, text);
}

static void faulty_deregister_file(struct lent_file *file)
{
        real->deregister_file(file);
}

static void faulty_place_file(const struct lent_file *file, uint64_t *address, uint64_t *key)
{
        real->place_file(file, address, key);
}

static void *faulty_reach(uint64_t address, uint64_t key, uint64_t size)
{
        return real->reach(address, key, size);
}

static void faulty_unreach(void *reached)
{
        real->unreach(reached);
}

/* Bytes may arrive at once, long before their message. */
static void faulty_move(struct link *link, const struct lent_file *from, uint64_t from_offset, void *to,
                        uint64_t to_offset, uint32_t size)
{
        real->move(link, from, from_offset, to, to_offset, size);
}

static void shuffle(struct batch *batch)
{
        for (unsigned i = batch->count; i > 1; i--) {
                unsigned other = (unsigned)dice(i);
                struct piece piece = batch->pieces[i - 1];

                batch->pieces[i - 1] = batch->pieces[other];
                batch->pieces[other] = piece;
        }
}

static void faulty_send(struct link *link, unsigned lane, const void *message, uint32_t size, uint64_t number,
                        bool soon)
{
        struct kept *kept = kept_of(link);
        struct batch *batch;

        if (!kept) {
                real->send(link, lane, message, size, number, soon);
                return;
        }
        batch = batch_at(kept, kept->count);
        batch->due = now() + (faults.delay ? dice(faults.delay) : 0);
        batch->number = number;
        batch->size = size;
        memcpy(&batch->message, message, size);
        batch->count = kept->building;
        batch->lost = kept->dies || (faults.lose && !dice(faults.lose));
        if (faults.shuffle)
                shuffle(batch);
        if (batch->lost && !kept->dies) {
                kept->dies = now() + NOTICE * UINT64_C(1000000);
                batch->count = batch->count ? (unsigned)dice(batch->count) : 0;
        }
        kept->building = 0;
        kept->count++;
}

/* Bytes of a batch arrive at any moment before its message. */
static void carry_out(struct link *link, struct batch *batch, unsigned most)
{
        while (batch->count && most--) {
                const struct piece *piece = &batch->pieces[--batch->count];

                real->write(link, piece->mirror, piece->offset, piece->size);
        }
}

/* True: a batch was carried out, or the link is lost. */
static bool run(struct kept *kept)
{
        struct link *link = kept->link;
        uint64_t present = now();
        bool any = false;

        while (kept->count) {
                struct batch *batch = batch_at(kept, 0);

                if (batch->lost) {
                        carry_out(link, batch, batch->count);
                        break;
                }
                carry_out(link, batch, 1);
                if (present < batch->due)
                        break;
                carry_out(link, batch, batch->count);
                kept->first = (kept->first + 1) % PENDING;
                kept->count--;
                any = true;
                real->send(link, 0, &batch->message, batch->size, batch->number, true);
        }
        if (kept->dies && present >= kept->dies) {
                link_down(link, ETIMEDOUT, "the peer does not answer (a fault on purpose)");
                return true;
        }
        return any;
}

static bool faulty_poll(void)
{
        bool any = real->poll();

        for (int i = 0; i < CHANNELS; i++)
                if (channels[i].link && channels[i].link->state == LINK_UP)
                        any = run(&channels[i]) || any;
        return any;
}

static bool faulty_arm(void)
{
        bool nothing = real->arm();

        for (int i = 0; i < CHANNELS; i++)
                if (channels[i].link && channels[i].link->state == LINK_UP &&
                    (channels[i].count || channels[i].dies))
                        nothing = false;
        return nothing;
}

const struct transport faulty_transport = {
    .kind = RELAY_LOOPBACK,
    .window = WINDOW,
    .piece = 64 * 1024,
    .lanes = 1,
    .message_lanes = 1,
    .open = faulty_open,
    .close = faulty_close,
    .create_channel = faulty_create_channel,
    .connect_channel = faulty_connect_channel,
    .destroy_channel = faulty_destroy_channel,
    .register_rings = faulty_register_rings,
    .deregister = faulty_deregister,
    .attach = faulty_attach,
    .detach = faulty_detach,
    .has_room = faulty_has_room,
    .write = faulty_write,
    .register_file = faulty_register_file,
    .deregister_file = faulty_deregister_file,
    .place_file = faulty_place_file,
    .reach = faulty_reach,
    .unreach = faulty_unreach,
    .move = faulty_move,
    .send = faulty_send,
    .poll = faulty_poll,
    .arm = faulty_arm,
};
