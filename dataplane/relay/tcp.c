/* The transport `tcp`: TCP connections between two relays, which their routers have made and
 * authenticated. A link has one socket per lane: some for messages, which so do not wait for bulk,
 * and some for bulk, which may take several paths of a network. A loss delays the connections of
 * one lane only.
 *
 * A batch is a record (tcp_socket.h). All records of a turn and socket leave with one call; bytes
 * go from the ring into the kernel, and from there into the peer's ring, unless they are encrypted.
 * A batch is complete when the kernel has copied it. Its bytes stay in the ring until the peer's
 * process has taken them, so a link that is lost and made again loses none.
 *
 * When a socket takes no more, the connections of its lane stay in the lane's queue, and their
 * bytes in their rings: a link needs no more memory than its stages and circles (tcp_send.c). A
 * socket takes no more when the kernel has little that it has not sent (TCP_NOTSENT_LOWAT in the
 * kernel's ip-sysctl.rst). So the order in which processes send is chosen late, and a process with
 * little to send waits for no more than that of one with much.
 *
 * Sockets are in epoll once and edge-triggered, so a turn makes no call for a socket about which
 * nothing was announced.
 */
#include "mirror.h"
#include "tcp_receive.h"
#include "tcp_send.h"
#include "transports.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
        SILENT = 7000, /* ms without an acknowledgement, after which a link is lost */
        QUIET = 5,     /* seconds without a byte, after which a peer is asked whether it lives */
        QUESTIONS = 2, /* seconds between further questions */
        MOST_QUESTIONS = 3,
};

static uint32_t encryption;

static int tcp_open(const struct relay_open *request, uint32_t *mtu, char *text)
{
        /* Without the machine's configuration: it may load engines from anywhere. */
        if (!OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG, NULL))
                return relay_refuse(text, EIO, "libcrypto cannot be used");
        encryption = request->encryption;
        *mtu = 0;
        return 0;
}

static void tcp_close(void)
{
}

/* --- channels --- */

static int tcp_create_channel(struct link *link, struct wire_address *address, char *text)
{
        struct tcp_channel *channel = relay_memory(sizeof *channel, "memory for a link");

        channel->link = link;
        link->channel = channel;
        for (unsigned i = 0; i < LANES; i++) {
                struct tcp_socket *s = &channel->sockets[i];

                s->watch.fd = -1;
                s->channel = channel;
                s->lane = i;
                list_init(&s->out.node);
                list_init(&s->in.node);
        }
        if (getrandom(channel->key, sizeof channel->key, 0) != (ssize_t)sizeof channel->key)
                return relay_refuse(text, EIO, "a random key: %s", strerror(errno));
        memcpy(address->to.tcp.key, channel->key, sizeof channel->key);
        address->to.tcp.sockets = LANES;
        address->to.tcp.encryption = (uint16_t)encryption;
        return 0;
}

static void tcp_destroy_channel(struct link *link)
{
        struct tcp_channel *channel = link->channel;

        for (unsigned i = 0; i < LANES; i++) {
                struct tcp_socket *s = &channel->sockets[i];

                tcp_send_end(s);
                tcp_receive_end(s);
                watch_remove(&s->watch);
                if (s->watch.fd >= 0)
                        close(s->watch.fd);
        }
        explicit_bzero(channel, sizeof *channel);
        free(channel);
}

static void tcp_add_socket(struct link *link, uint32_t index, int fd)
{
        struct tcp_channel *channel = link->channel;

        if (index < LANES && channel->sockets[index].watch.fd < 0)
                channel->sockets[index].watch.fd = fd;
        else
                close(fd);
}

static void on_event(struct watch *watch, uint32_t events)
{
        struct tcp_socket *s = OF(watch, struct tcp_socket, watch);

        if (events & EPOLLOUT)
                tcp_send_ready(s);
        if (events & ~(uint32_t)EPOLLOUT)
                tcp_receive_ready(s, events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
}

/* A peer whose host is gone is noticed soon, whether bytes wait for it or not. */
static bool set_options(int fd, int unsent)
{
        const struct {
                int level, name, value;
        } options[] = {
            {IPPROTO_TCP, TCP_NODELAY, 1},
            {IPPROTO_TCP, TCP_USER_TIMEOUT, SILENT},
            {SOL_SOCKET, SO_KEEPALIVE, 1},
            {IPPROTO_TCP, TCP_KEEPIDLE, QUIET},
            {IPPROTO_TCP, TCP_KEEPINTVL, QUESTIONS},
            {IPPROTO_TCP, TCP_KEEPCNT, MOST_QUESTIONS},
            {IPPROTO_TCP, TCP_NOTSENT_LOWAT, unsent},
        };
        int flags = fcntl(fd, F_GETFL);

        for (size_t i = 0; i < sizeof options / sizeof *options; i++)
                if (setsockopt(fd, options[i].level, options[i].name, &options[i].value,
                               sizeof options[i].value))
                        return false;
        return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

/* What is encrypted on a lane, if both relays' choices are this strict. */
static bool encrypts(uint32_t strictest, unsigned lane)
{
        return strictest >= RELAY_ENCRYPT_ALL ||
               (strictest == RELAY_ENCRYPT_MESSAGES && lane < TCP_MESSAGE_LANES);
}

static int start_socket(struct tcp_socket *s, const struct wire_address *address, char *text)
{
        bool sealed = encrypts(
            encryption > address->to.tcp.encryption ? encryption : address->to.tcp.encryption, s->lane);
        int error = tcp_send_start(s, address->to.tcp.key, sealed);

        if (!error)
                error = tcp_receive_start(s, sealed);
        if (error)
                return relay_refuse(text, error, "starting a socket's encryption: %s", strerror(error));
        s->watch.call = on_event;
        s->out.most = s->lane < TCP_MESSAGE_LANES ? TCP_UNSENT_MESSAGES : TCP_UNSENT;
        if (!set_options(s->watch.fd, (int)s->out.most) ||
            !watch_add(&s->watch, EPOLLIN | EPOLLOUT | EPOLLRDHUP | (uint32_t)EPOLLET))
                return relay_refuse(text, errno, "a socket to the peer's relay: %s", strerror(errno));
        return 0;
}

static int tcp_connect_channel(struct link *link, const struct wire_address *address, char *text)
{
        struct tcp_channel *channel = link->channel;
        int error = 0;

        if (address->to.tcp.sockets != LANES)
                return relay_refuse(text, EPROTO, "the peer's relay uses %u sockets, not %u",
                                    address->to.tcp.sockets, LANES);
        for (unsigned i = 0; i < LANES; i++)
                if (channel->sockets[i].watch.fd < 0)
                        return relay_refuse(text, ENOTCONN, "socket %u of the link is missing", i);
        for (unsigned i = 0; i < LANES && !error; i++)
                error = channel->sockets[i].in.stage ? EALREADY
                                                     : start_socket(&channel->sockets[i], address, text);
        /* The link is not up: it must hear nothing. */
        for (unsigned i = 0; i < LANES && error; i++)
                watch_remove(&channel->sockets[i].watch);
        return error;
}

/* --- rings --- */

/* Nothing is registered: the relay itself writes where a record says. */
static int tcp_register_rings(struct mirror *m, UNUSED struct wire_place *place, UNUSED char *text)
{
        m->registration = m;
        return 0;
}

static void tcp_deregister(struct mirror *m)
{
        m->registration = NULL;
}

static int tcp_attach(struct mirror *m, UNUSED const struct wire_place *place, UNUSED char *text)
{
        m->target = m;
        return 0;
}

static void tcp_detach(struct mirror *m)
{
        m->target = NULL;
}

/* --- the loop --- */

static bool tcp_arm(void)
{
        return tcp_is_read() && tcp_is_flushed();
}

static uint64_t tcp_acknowledged(struct link *link, unsigned lane, bool *all)
{
        const struct tcp_channel *channel = link->channel;
        const struct tcp_socket *s = &channel->sockets[lane];
        int left = 0;

        count(COUNT_CALLS, 1);
        if (ioctl(s->watch.fd, SIOCOUTQ, &left))
                left = 0;
        *all = !left && !s->out.queued;
        return s->out.given - (uint64_t)left;
}

const struct transport tcp_transport = {
    .kind = RELAY_TCP,
    .window = WINDOW,
    .piece = TCP_PIECE,
    .lanes = LANES,
    .message_lanes = TCP_MESSAGE_LANES,
    .open = tcp_open,
    .close = tcp_close,
    .create_channel = tcp_create_channel,
    .add_socket = tcp_add_socket,
    .connect_channel = tcp_connect_channel,
    .destroy_channel = tcp_destroy_channel,
    .register_rings = tcp_register_rings,
    .deregister = tcp_deregister,
    .attach = tcp_attach,
    .detach = tcp_detach,
    .has_room = tcp_has_room,
    .write = tcp_write,
    .send = tcp_send,
    .flush = tcp_flush,
    .acknowledged = tcp_acknowledged,
    .poll = tcp_poll,
    .arm = tcp_arm,
};
