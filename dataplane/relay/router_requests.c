#include "router_requests.h"

#include "answers.h"
#include "arenas.h"
#include "lent_files.h"
#include "link.h"
#include "mirror_end.h"
#include "stream.h"
#include "transports.h"
#include "usage.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
        DESCRIPTORS = 2, /* in one message, at most */
        MESSAGES = 32,   /* in a row */
};

static void refuse_version(void)
{
        struct relay_opened opened = {0};

        opened.error = relay_refuse(opened.text, EPROTO, "the router has another version than its relay");
        answer(&opened, sizeof opened, R_OPENED);
}

static void do_open(const void *data, UNUSED int *descriptors)
{
        struct relay_open open;
        struct relay_opened opened = {0};

        memcpy(&open, data, sizeof open);
        open.device[sizeof open.device - 1] = 0;
        if (open.version != RELAY_VERSION) {
                refuse_version();
                return;
        }
        opened.error = transports_open(&open, &opened.mtu, opened.text);
        relay_set_spin(transports_spin(), transports_yield());
        answer(&opened, sizeof opened, R_OPENED);
}

static void do_link(const void *data, UNUSED int *descriptors)
{
        const struct relay_number *message = data;
        const struct transport *transport = transport_opened(message->state);
        struct relay_offer offer = {.number = message->number};
        struct wire_address address = {0};
        struct link *link = link_find(message->number);

        if (!transport) {
                offer.error = relay_refuse(offer.text, ENODEV, "no device is open");
        } else {
                if (!link)
                        link = link_add(message->number);
                offer.error = link_prepare(link, transport, &address, offer.text);
                offer.size = offer.error ? 0 : sizeof address;
                memcpy(offer.words, &address, offer.size);
        }
        answer(&offer, sizeof offer, R_LINKED);
        /* It may contain a key. */
        explicit_bzero(&address, sizeof address);
        explicit_bzero(&offer, sizeof offer);
}

static void do_socket(const void *data, int *descriptors)
{
        const struct relay_number *message = data;

        if (descriptors[0] < 0)
                return;
        if (link_add_socket(link_find(message->number), message->state, descriptors[0]))
                descriptors[0] = -1;
}

static void do_connect(const void *data, UNUSED int *descriptors)
{
        const struct relay_accept *message = data;
        struct link *link = link_find(message->number);
        struct wire_address address;
        char text[RELAY_TEXT] = "no such link, or the peer's address has another size";
        int error = EINVAL;

        if (link && message->size == sizeof address) {
                memcpy(&address, message->words, sizeof address);
                text[0] = 0;
                error = link_connect(link, &address, text);
        }
        if (error != EINPROGRESS)
                answer_outcome(R_CONNECTED, message->number, error, text);
        /* It may contain a key. */
        explicit_bzero(&address, sizeof address);
}

static void do_unlink(const void *data, UNUSED int *descriptors)
{
        struct link *link = link_find(((const struct relay_number *)data)->number);

        if (link)
                link_remove(link);
}

static void do_expire(const void *data, UNUSED int *descriptors)
{
        const struct relay_expire *message = data;
        struct link *link = link_find(message->link);

        if (link)
                link_expire(link, message->user, message->count);
}

static void do_stream(const void *data, UNUSED int *descriptors)
{
        struct link *link = link_find(((const struct relay_number *)data)->number);

        if (link)
                link_use_stream(link, &stream_transport);
}

static void do_arena(const void *data, int *descriptors)
{
        const struct relay_arena *message = data;
        char text[RELAY_TEXT];

        if (arena_find(message->arena))
                relay_die("the router's arena", EEXIST);
        /* The kernel drops them if the relay may open no more descriptors. Slots in the arena are
         * refused then. */
        if (descriptors[0] < 0 || descriptors[1] < 0) {
                fprintf(stderr, "freeflow-relay: an arena came without its descriptors\n");
                return;
        }
        if (!arena_add(message->arena, message->owner, message->value, descriptors[0], descriptors[1], text))
                fprintf(stderr, "freeflow-relay: %s\n", text);
        descriptors[0] = descriptors[1] = -1;
}

static void do_bell(const void *data, int *descriptors)
{
        const struct relay_arena *message = data;
        struct shared *shared = arena_find(message->arena);

        if (!shared || descriptors[0] < 0)
                return;
        arena_set_bell(shared, message->value, descriptors[0]);
        descriptors[0] = -1;
}

static void do_share(const void *data, UNUSED int *descriptors)
{
        const struct relay_arena *message = data;
        struct shared *shared = arena_find(message->arena);

        if (shared)
                arena_set_share(shared, message->value);
}

static void do_discard(const void *data, UNUSED int *descriptors)
{
        struct shared *shared = arena_find(((const struct relay_arena *)data)->arena);

        if (!shared)
                return;
        for (uint32_t i = 0; i < SLOTS; i++)
                if (shared->mirrors[i] && mirror_is_read(shared->mirrors[i]))
                        link_down(shared->mirrors[i]->link, ECANCELED, "memory that is being sent goes away");
        mirrors_abandon(shared);
        arena_remove(shared);
}

static void do_slot(const void *data, UNUSED int *descriptors)
{
        const struct relay_slot *message = data;
        struct relay_offer offer = {.number = message->connection};
        struct wire_place place = {0};
        struct shared *shared = arena_find(message->arena);
        struct link *link = link_find(message->link);

        if (!shared || !link || !link->named || message->slot >= SLOTS || shared->mirrors[message->slot] ||
            mirror_find(message->connection)) {
                offer.error = relay_refuse(offer.text, EINVAL, "%s",
                                           !link          ? "no such link"
                                           : !link->named ? "no device is open"
                                           : !shared      ? "no such arena"
                                                          : "the slot or the number is in use");
        } else {
                mirror_add(message, link, shared, &place, &offer.error, offer.text);
                offer.size = offer.error ? 0 : sizeof place;
                memcpy(offer.words, &place, offer.size);
        }
        answer(&offer, sizeof offer, R_PLACED);
}

static void do_pair(const void *data, UNUSED int *descriptors)
{
        const struct relay_accept *message = data;
        struct mirror *mirror = mirror_find(message->number);
        struct wire_place place;
        char text[RELAY_TEXT] = "no such connection, or the peer's place has another size";
        int error = EINVAL;

        if (mirror && message->size == sizeof place) {
                memcpy(&place, message->words, sizeof place);
                text[0] = 0;
                error = mirror_pair(mirror, message->peer, &place, text);
        }
        answer_outcome(R_PAIRED, message->number, error, text);
}

static void do_close(const void *data, UNUSED int *descriptors)
{
        uint32_t number = ((const struct relay_number *)data)->number;
        struct mirror *mirror = mirror_find(number);

        if (mirror)
                mirror_close(mirror);
        else
                answer_number(R_FINISHED, number, RELAY_BROKEN);
}

static void do_leave(const void *data, UNUSED int *descriptors)
{
        struct mirror *mirror = mirror_find(((const struct relay_number *)data)->number);

        if (mirror)
                mirror_leave(mirror);
}

static void do_drop(const void *data, UNUSED int *descriptors)
{
        const struct relay_number *message = data;
        struct mirror *mirror = mirror_find(message->number);

        if (mirror)
                mirror_drop(mirror, message->state == RELAY_BROKEN);
        else
                answer_number(R_DROPPED, message->number, 0);
}

static void do_file(const void *data, int *descriptors)
{
        /* The kernel drops it if the relay may open no more: there are no moves then. */
        if (descriptors[0] < 0)
                return;
        lent_file_add(data, descriptors[0]);
        descriptors[0] = -1;
}

static void do_file_end(const void *data, UNUSED int *descriptors)
{
        lent_file_end(((const struct relay_file *)data)->file);
}

static void do_count(UNUSED const void *data, UNUSED int *descriptors)
{
        struct relay_counts counts = {0};

        memcpy(counts.counters, relay.counters, sizeof counts.counters);
        answer(&counts, sizeof counts, R_COUNTS);
        usage_report();
}

/* The peer has given up the channel of this link and uses frames, so we do the same. */
static void do_frame(const void *data, size_t size)
{
        const struct relay_frame *frame = data;
        struct link *link = link_find(frame->link);

        count(COUNT_FRAMES_IN, 1);
        if (!link)
                return;
        link_use_stream(link, &stream_transport);
        stream_receive(link, frame->data, size - sizeof *frame);
}

static const struct {
        size_t size;
        void (*call)(const void *data, int *descriptors);
} kinds[] = {
    [R_OPEN] = {sizeof(struct relay_open), do_open},
    [R_LINK] = {sizeof(struct relay_number), do_link},
    [R_SOCKET] = {sizeof(struct relay_number), do_socket},
    [R_CONNECT] = {sizeof(struct relay_accept), do_connect},
    [R_UNLINK] = {sizeof(struct relay_number), do_unlink},
    [R_ARENA] = {sizeof(struct relay_arena), do_arena},
    [R_BELL] = {sizeof(struct relay_arena), do_bell},
    [R_SHARE] = {sizeof(struct relay_arena), do_share},
    [R_DISCARD] = {sizeof(struct relay_arena), do_discard},
    [R_SLOT] = {sizeof(struct relay_slot), do_slot},
    [R_PAIR] = {sizeof(struct relay_accept), do_pair},
    [R_CLOSE] = {sizeof(struct relay_number), do_close},
    [R_LEAVE] = {sizeof(struct relay_number), do_leave},
    [R_DROP] = {sizeof(struct relay_number), do_drop},
    [R_STREAM] = {sizeof(struct relay_number), do_stream},
    [R_FILE] = {sizeof(struct relay_file), do_file},
    [R_FILE_END] = {sizeof(struct relay_file), do_file_end},
    [R_EXPIRE] = {sizeof(struct relay_expire), do_expire},
    [R_COUNT] = {sizeof(struct relay_number), do_count},
};

static void dispatch(const void *data, size_t size, int *descriptors)
{
        const struct relay_message *message = data;

        if (size < sizeof *message || message->size != size)
                relay_die("the router's message", EPROTO);
        if (message->kind == R_FRAME && size >= sizeof(struct relay_frame)) {
                do_frame(data, size);
                return;
        }
        if (message->kind == R_OPEN && size != sizeof(struct relay_open)) {
                /* Its size is part of the version. */
                refuse_version();
                return;
        }
        if (message->kind >= sizeof kinds / sizeof *kinds || !kinds[message->kind].call ||
            kinds[message->kind].size != size)
                relay_die("the router's message", EPROTO);
        kinds[message->kind].call(data, descriptors);
}

static void take_descriptors(struct msghdr *header, int *descriptors)
{
        int count_of = 0;

        for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
                size_t size = part->cmsg_len - CMSG_LEN(0);

                if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
                        continue;
                for (size_t at = 0; at + sizeof(int) <= size; at += sizeof(int)) {
                        int fd;

                        memcpy(&fd, CMSG_DATA(part) + at, sizeof fd);
                        if (count_of < DESCRIPTORS)
                                descriptors[count_of++] = fd;
                        else
                                close(fd);
                }
        }
}

/* False: there is nothing more to read now. */
static bool read_one(int router)
{
        static _Alignas(uint64_t) uint8_t data[UINT16_MAX + 1];
        union {
                struct cmsghdr header;
                char space[CMSG_SPACE(DESCRIPTORS * sizeof(int))];
        } control;
        struct iovec vec = {.iov_base = data, .iov_len = sizeof data};
        struct msghdr header = {
            .msg_iov = &vec,
            .msg_iovlen = 1,
            .msg_control = &control,
            .msg_controllen = sizeof control,
        };
        int descriptors[DESCRIPTORS] = {-1, -1};
        ssize_t got = recvmsg(router, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

        count(COUNT_CALLS, 1);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
                return false;
        if (got <= 0) {
                answers_close();
                relay_stop();
                return false;
        }
        take_descriptors(&header, descriptors);
        dispatch(data, (size_t)got, descriptors);
        /* An address may contain a key. */
        if (((const struct relay_message *)(const void *)data)->kind == R_CONNECT)
                explicit_bzero(data, (size_t)got);
        for (int i = 0; i < DESCRIPTORS; i++)
                if (descriptors[i] >= 0)
                        close(descriptors[i]);
        return true;
}

static void readable(struct watch *watch, uint32_t events)
{
        if (events & EPOLLOUT)
                answers_flush();
        for (int i = 0; i < MESSAGES && events & ~(uint32_t)EPOLLOUT && read_one(watch->fd); i++)
                ;
}

void router_requests_start(void)
{
        answers_start(readable);
}
