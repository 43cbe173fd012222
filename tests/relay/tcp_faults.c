/* The calls of the transport `tcp` in relays that are built for tests, with faults on purpose.
 *
 * The `device` of R_OPEN names the faults, separated by commas; without any the calls do what they
 * do in the relay that is shipped:
 *
 *      short=N     about one call in N moves only a byte
 *      again=N     about one call in N moves nothing: EAGAIN
 *      reset=N     about one call in N fails as if the peer had reset the connection
 *      seed=N      of the random numbers
 */
#include "../../dataplane/relay/context.h"
#include "../../dataplane/relay/tcp_calls.h"
#include "../../dataplane/relay/tcp_receive.h"
#include "../../dataplane/relay/tcp_send.h"
#include "../../dataplane/relay/transports.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { SOCKETS = 1024 };

static const struct transport *const real = &tcp_transport;
static struct {
        uint64_t often_short, often_again, often_reset, seed;
} faults;
/* Sockets about which the kernel will announce nothing, since it was not asked. By descriptor. */
static bool deprived_of_sending[SOCKETS], deprived_of_receiving[SOCKETS];
static struct tcp_channel *channels[SOCKETS];

static bool happens(uint64_t often)
{
        faults.seed ^= faults.seed << 13;
        faults.seed ^= faults.seed >> 7;
        faults.seed ^= faults.seed << 17;
        return often && !(faults.seed % often);
}

static uint64_t option(const char *device, const char *name)
{
        const char *at = strstr(device, name);

        return at ? strtoul(at + strlen(name), NULL, 10) : 0;
}

/* True: the call fails, or moves less than was asked for. */
static bool fault(int fd, bool *deprived, struct msghdr *header, struct iovec *one, bool *fails)
{
        *fails = true;
        if (happens(faults.often_reset)) {
                errno = ECONNRESET;
                return true;
        }
        if (happens(faults.often_again)) {
                deprived[fd] = true;
                errno = EAGAIN;
                return true;
        }
        *fails = false;
        if (!happens(faults.often_short) || !header->msg_iovlen)
                return false;
        *one = (struct iovec){header->msg_iov->iov_base, header->msg_iov->iov_len ? 1 : 0};
        header->msg_iov = one;
        header->msg_iovlen = 1;
        deprived[fd] = true;
        return true;
}

ssize_t tcp_sendmsg(int fd, const struct msghdr *header)
{
        struct msghdr copy = *header;
        struct iovec one;
        bool fails;

        if (fault(fd, deprived_of_sending, &copy, &one, &fails) && fails)
                return -1;
        return sendmsg(fd, &copy, MSG_DONTWAIT | MSG_NOSIGNAL);
}

ssize_t tcp_recvmsg(int fd, struct msghdr *header)
{
        struct msghdr copy = *header;
        struct iovec one;
        bool fails;

        if (fault(fd, deprived_of_receiving, &copy, &one, &fails) && fails)
                return -1;
        return recvmsg(fd, &copy, MSG_DONTWAIT);
}

static int faulty_open(const struct relay_open *request, uint32_t *mtu, char *text)
{
        faults.often_short = option(request->device, "short=");
        faults.often_again = option(request->device, "again=");
        faults.often_reset = option(request->device, "reset=");
        faults.seed = 88172645463325252u + option(request->device, "seed=") * 2654435761u;
        return real->open(request, mtu, text);
}

static int faulty_create_channel(struct link *link, struct wire_address *address, char *text)
{
        int error = real->create_channel(link, address, text);

        for (int i = 0; i < SOCKETS; i++)
                if (!channels[i]) {
                        channels[i] = link->channel;
                        break;
                }
        return error;
}

static void faulty_destroy_channel(struct link *link)
{
        for (int i = 0; i < SOCKETS; i++)
                if (channels[i] == link->channel)
                        channels[i] = NULL;
        real->destroy_channel(link);
}

/* What the kernel would have announced. */
static bool announce(void)
{
        bool any = false;

        for (int i = 0; i < SOCKETS * LANES; i++) {
                struct tcp_channel *channel = channels[i / LANES];
                struct tcp_socket *s = channel ? &channel->sockets[i % LANES] : NULL;

                if (!s || s->watch.fd < 0 || !s->in.stage)
                        continue;
                if (deprived_of_sending[s->watch.fd])
                        tcp_send_ready(s);
                if (deprived_of_receiving[s->watch.fd])
                        tcp_receive_ready(s, false);
                any = any || deprived_of_sending[s->watch.fd] || deprived_of_receiving[s->watch.fd];
                deprived_of_sending[s->watch.fd] = deprived_of_receiving[s->watch.fd] = false;
        }
        return any;
}

static bool faulty_poll(void)
{
        bool any = announce();

        return real->poll() || any;
}

static bool faulty_arm(void)
{
        return !announce() && real->arm();
}

struct transport faulty_tcp_transport;

/* The rest is as in the transport itself. */
__attribute__((constructor)) static void make_transport(void)
{
        faulty_tcp_transport = tcp_transport;
        faulty_tcp_transport.open = faulty_open;
        faulty_tcp_transport.create_channel = faulty_create_channel;
        faulty_tcp_transport.destroy_channel = faulty_destroy_channel;
        faulty_tcp_transport.poll = faulty_poll;
        faulty_tcp_transport.arm = faulty_arm;
}
