/* Calls that open, shut down and configure connections. */
#include "calls.h"

#include "attach.h"
#include "clock.h"
#include "cork.h"
#include "emulate.h"
#include "ends.h"
#include "fallback.h"
#include "flow.h"
#include "identity.h"
#include "keep.h"
#include "poller.h"
#include "protocol.h"
#include "ready.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"
#include "sys.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/time.h>

CALL int socket(int domain, int type, int protocol)
{
        int fd = real()->socket(domain, type, protocol);

        if (fd >= 0 && (domain == AF_INET || domain == AF_INET6) &&
            (type & ~(SOCK_CLOEXEC | SOCK_NONBLOCK)) == SOCK_STREAM &&
            (protocol == 0 || protocol == IPPROTO_TCP))
                end_make(fd, type & SOCK_NONBLOCK);
        return fd;
}

static bool is_far(const struct sockaddr *address)
{
        if (process.loopback)
                return true;
        if (address->sa_family == AF_INET) {
                uint32_t ip = ntohl(((const struct sockaddr_in *)(const void *)address)->sin_addr.s_addr);

                return ip != INADDR_ANY && ip >> 24 != 127;
        }
        if (address->sa_family == AF_INET6) {
                const struct in6_addr *ip = &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr;

                return !IN6_IS_ADDR_UNSPECIFIED(ip) && !IN6_IS_ADDR_LOOPBACK(ip) &&
                       !(IN6_IS_ADDR_V4MAPPED(ip) && ip->s6_addr[12] == 127);
        }
        return false;
}

static void opened(struct end *end, bool active)
{
        if (atomic_load(&end->stage) != STAGE_CLOSED)
                return;
        store_relaxed(&end->active, active);
        store_relaxed(&end->opened, now());
        stage_become(end, STAGE_CLOSED, STAGE_CANDIDATE);
        statistics_count(&statistics.tracked);
        if (!settings.welcomed)
                router_connect();
}

CALL int connect(int fd, const struct sockaddr *address, socklen_t size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        int outcome;

        if (!end)
                return real()->connect(fd, address, size);
        if (!address || size < sizeof address->sa_family || !is_far(address)) {
                fall_back(fd, end, key, REASON_FOREIGN);
                return real()->connect(fd, address, size);
        }
        outcome = real()->connect(fd, address, size);
        if (outcome == 0 || *__errno_location() == EINPROGRESS || *__errno_location() == EINTR)
                opened(end, true);
        return outcome;
}

static int accepted(int fd, const struct sockaddr *address, bool nonblocking)
{
        struct end *end;

        if (fd < 0 || !is_far(address))
                return fd;
        end = end_make(fd, nonblocking);
        if (end)
                opened(end, false);
        return fd;
}

CALL int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
        struct sockaddr_storage room;
        struct sockaddr *peer = (struct sockaddr *)&room;
        socklen_t peer_size = sizeof room;
        int got;

        if (!process.on)
                return real()->accept4(fd, address, size, flags);
        room.ss_family = AF_UNSPEC;
        if (address && size && *size >= sizeof(struct sockaddr_in6)) {
                got = real()->accept4(fd, address, size, flags);
                return accepted(got, address, flags & SOCK_NONBLOCK);
        }
        got = real()->accept4(fd, peer, &peer_size, flags);
        if (got >= 0 && address && size) {
                memcpy(address, peer, *size < peer_size ? *size : peer_size);
                *size = peer_size;
        }
        return accepted(got, peer, flags & SOCK_NONBLOCK);
}

CALL int accept(int fd, struct sockaddr *address, socklen_t *size)
{
        /* A program with a seccomp filter may be allowed only this one. */
        if (!process.on)
                return real()->accept(fd, address, size);
        return accept4(fd, address, size, 0);
}

CALL int shutdown(int fd, int how)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        enum taken taken;
        int outcome;

        if (!end)
                return real()->shutdown(fd, how);
        /* The lock waits for a send in progress in another thread: the kernel's FIN says that
         * nothing more is in the ring. */
        taken = lock_take(&end->tx.lock, self());
        if (how != SHUT_RD && taken == LOCK_TAKEN && end_is(end, key) &&
            atomic_load(&end->stage) == STAGE_ATTACHED)
                fallback_check_order(fd, end);
        /* Before the kernel shuts it down: see remote_visible(). */
        if (how != SHUT_RD)
                atomic_fetch_or(&end->shut, SHUTTING_WRITE);
        outcome = real()->shutdown(fd, how);
        if (outcome != 0)
                atomic_fetch_and(&end->shut, ~(uint32_t)SHUTTING_WRITE);
        if (outcome == 0)
                atomic_fetch_or(&end->shut, how == SHUT_RD   ? SHUT_READ
                                            : how == SHUT_WR ? SHUT_WRITE
                                                             : SHUT_READ | SHUT_WRITE);
        /* The ring's end says so as well: see close_ring(). */
        if (outcome == 0 && how != SHUT_RD && taken == LOCK_TAKEN && end_is(end, key) &&
            atomic_load(&end->stage) == STAGE_ATTACHED && fallback_may_end_ring(end)) {
                fallback_end_ring(end);
                poller_sender_changed(end);
        }
        lock_release(&end->tx.lock, taken);
        return outcome;
}

/* Can a connection in a ring have an option? */
enum fit {
        FIT,     /* yes: it is about packets, listeners or buffers, and a ring has none, or its own */
        UNFIT,   /* no: a ring can't do what it means */
        UNKNOWN, /* as UNFIT, if the kernel accepts it */
};

#define BIT(name) (UINT64_C(1) << (name))
/* By number, since the names depend on the headers. Options that aren't listed are unknown: one of
 * a later kernel may change what a read returns, and TCP is right whatever it does. */
enum {
        RECENT_RCVTIMEO = 66, /* as SO_RCVTIMEO, on machines with two sizes of time */
        RECENT_SNDTIMEO = 67,
        RECENT_TIMESTAMP = 63,
        RECENT_TIMESTAMPING = 65,
        PACING_RATE = 47,
        ATTACH_BPF = 50,
        TX_TIME = 61,
        PEEK_OFF = 42,
        ZERO_COPY = 60,
        INQ = 36,               /* of TCP */
        ZERO_COPY_RECEIVE = 35, /* of TCP: a getsockopt() that receives */
        IP_POLICY = 16,         /* IP_IPSEC_POLICY, IP_XFRM_POLICY: 16, 17; of IPv6 34, 35 */
        IP6_POLICY = 34,
};

static const uint64_t fit_of_socket[2] = {
    /* DEBUG, REUSEADDR, DONTROUTE, BROADCAST, SNDBUF, RCVBUF, KEEPALIVE, NO_CHECK, PRIORITY,
     * LINGER, BSDCOMPAT, REUSEPORT, PASSCRED, SNDLOWAT, BINDTODEVICE, DETACH_FILTER, SNDBUFFORCE,
     * RCVBUFFORCE */
    BIT(1) | BIT(2) | BIT(5) | BIT(6) | BIT(7) | BIT(8) | BIT(9) | BIT(11) | BIT(12) | BIT(13) | BIT(14) |
        BIT(15) | BIT(16) | BIT(19) | BIT(25) | BIT(27) | BIT(32) | BIT(33) |
        /* PASSSEC, MARK, RXQ_OVFL, WIFI_STATUS, NOFCS, LOCK_FILTER, SELECT_ERR_QUEUE, BUSY_POLL,
         * INCOMING_CPU, ATTACH_REUSEPORT_CBPF, ATTACH_REUSEPORT_EBPF, CNX_ADVICE, BINDTOIFINDEX */
        BIT(34) | BIT(36) | BIT(40) | BIT(41) | BIT(43) | BIT(44) | BIT(45) | BIT(46) | BIT(49) | BIT(51) |
        BIT(52) | BIT(53) | BIT(62),
    /* DETACH_REUSEPORT_BPF, PREFER_BUSY_POLL, BUSY_POLL_BUDGET, RESERVE_MEM, TXREHASH, RCVMARK,
     * RCVPRIORITY
     */
    BIT(68 - 64) | BIT(69 - 64) | BIT(70 - 64) | BIT(73 - 64) | BIT(74 - 64) | BIT(75 - 64) | BIT(82 - 64),
};

/* NODELAY, MAXSEG, CORK, KEEPIDLE, KEEPINTVL, KEEPCNT, SYNCNT, LINGER2, DEFER_ACCEPT, WINDOW_CLAMP,
 * QUICKACK, CONGESTION, THIN_LINEAR_TIMEOUTS, THIN_DUPACK, USER_TIMEOUT, FASTOPEN, NOTSENT_LOWAT,
 * SAVE_SYN, FASTOPEN_KEY, FASTOPEN_NO_COOKIE, RTO_MAX_MS, RTO_MIN_US, DELACK_MAX_US */
static const uint64_t fit_of_tcp = BIT(1) | BIT(2) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(7) | BIT(8) |
                                   BIT(9) | BIT(10) | BIT(12) | BIT(13) | BIT(16) | BIT(17) | BIT(18) |
                                   BIT(23) | BIT(25) | BIT(27) | BIT(33) | BIT(34) | BIT(44) | BIT(45) |
                                   BIT(46);

static enum fit fit(int level, int name, int value)
{
        if (level == SOL_SOCKET) {
                switch (name) {
                case SO_RCVLOWAT:
                        return value < 0 || value > 1 ? UNFIT : FIT;
                case PEEK_OFF:
                        return value >= 0 ? UNFIT : FIT;
                case SO_OOBINLINE:
                case SO_TIMESTAMP:
                case SO_TIMESTAMPNS:
                case SO_TIMESTAMPING:
                case RECENT_TIMESTAMP:
                case RECENT_TIMESTAMP + 1:
                case RECENT_TIMESTAMPING:
                case ZERO_COPY:
                        return value ? UNFIT : FIT;
                case SO_RCVTIMEO:
                case SO_SNDTIMEO:
                case RECENT_RCVTIMEO:
                case RECENT_SNDTIMEO:
                        return FIT;
                case SO_ATTACH_FILTER:
                case ATTACH_BPF:
                case PACING_RATE:
                case TX_TIME:
                        return UNFIT;
                default:
                        return name >= 0 && name < 128 && fit_of_socket[name / 64] & BIT(name % 64) ? FIT
                                                                                                    : UNKNOWN;
                }
        }
        /* About packets, except the policies that encrypt those of one socket. */
        if (level == IPPROTO_IP)
                return name == IP_POLICY || name == IP_POLICY + 1 ? UNFIT : FIT;
        if (level == IPPROTO_IPV6)
                return name == IP6_POLICY || name == IP6_POLICY + 1 ? UNFIT : FIT;
        if (level != IPPROTO_TCP)
                return UNKNOWN;
        if (name == INQ)
                return value ? UNFIT : FIT;
        if (name == TCP_ULP || name == TCP_REPAIR || name == TCP_FASTOPEN_CONNECT)
                return UNFIT;
        return name >= 0 && name < 64 && fit_of_tcp & BIT(name) ? FIT : UNKNOWN;
}

/* A negative time-out: the kernel has it, but getsockopt() doesn't return it. */
static bool is_past(int level, int name, const void *value, socklen_t size)
{
        struct timeval time;

        if (level != SOL_SOCKET || size < sizeof time ||
            (name != SO_RCVTIMEO && name != SO_SNDTIMEO && name != RECENT_RCVTIMEO &&
             name != RECENT_SNDTIMEO))
                return false;
        memcpy(&time, value, sizeof time);
        return time.tv_sec < 0;
}

/* The library's part of an option that the kernel has accepted. `rest`: there are bytes left in a
 * ring that has ended, which come before the kernel's. */
static void note(int fd, struct end *end, int level, int name, const void *value, socklen_t size, int number,
                 bool rest)
{
        struct view view;
        uint32_t length = sizeof number;

        if (level == IPPROTO_TCP && name == INQ)
                atomic_store(&end->inq, rest && number);
        if (level != SOL_SOCKET)
                return;
        if (name == SO_RCVLOWAT) {
                int64_t left = 0;

                if (rest) {
                        view = end_receives(end);
                        left = ring_ready(&end->rx, &view);
                        /* The kernel may have limited it. */
                        sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_RCVLOWAT, &number, &length);
                }
                rest = rest && number > 1 && left > 0 && fallback_sender_stopped(end);
                atomic_store(&end->low, rest ? (uint32_t)number : 0);
                if (rest)
                        emulate_low_water(fd, (uint32_t)number, left);
        }
        if (name == PEEK_OFF)
                atomic_store(&end->peeked, rest && number >= 0 ? (uint32_t)number + 1 : 0);
        if ((name == SO_RCVTIMEO || name == SO_SNDTIMEO || name == RECENT_RCVTIMEO ||
             name == RECENT_SNDTIMEO) &&
            size >= sizeof(struct timeval)) {
                struct timeval time;

                memcpy(&time, value, sizeof time);
                atomic_store(name == SO_RCVTIMEO || name == RECENT_RCVTIMEO ? &end->rx.timeout
                                                                            : &end->tx.timeout,
                             attach_timeout(&time));
        }
}

CALL int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        int outcome, number = 0;
        enum fit fits;

        if (!end)
                return real()->setsockopt(fd, level, name, value, size);
        if (value && size >= sizeof number)
                memcpy(&number, value, sizeof number);
        if (cork_keeps(end, level, name) && value && size == sizeof number) {
                if (!cork_clears(end, name, number) && !identity_holds(fd, end)) {
                        identity_lost(fd);
                        return setsockopt(fd, level, name, value, size);
                }
                if (cork_set(end, level, name, number))
                        return 0;
        }
        fits = fit(level, name, number);
        if (fits == FIT && value && is_past(level, name, value, size))
                fits = UNFIT;
        if (fits == UNFIT) {
                fall_back(fd, end, key, REASON_OPTION);
                /* What is left in a ring can't be decrypted there: the error of a kernel without
                 * such a module. */
                if (level == IPPROTO_TCP && name == TCP_ULP && end_has_rest(end))
                        return (int)result(-ENOENT);
        }
        outcome = real()->setsockopt(fd, level, name, value, size);
        if (outcome != 0)
                return outcome;
        keep_set(fd, end, level, name);
        cork_set(end, level, name, number);
        if (fits == UNKNOWN)
                fall_back(fd, end, key, REASON_OPTION);
        if (end_is(end, key) && end_of(fd, &key) == end)
                note(fd, end, level, name, value, size, number, fits == UNFIT && end_has_rest(end));
        return outcome;
}

/* A few options concern a ring, or what is left in it, and one receives bytes. */
CALL int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        uint32_t low = end ? atomic_load(&end->low) : 0, peeked = end ? atomic_load(&end->peeked) : 0;
        int outcome, number;

        if (end && level == IPPROTO_TCP && name == ZERO_COPY_RECEIVE) {
                fall_back(fd, end, key, REASON_OPTION);
                /* The kernel would receive its own bytes: those of the ring have to be read before.
                 */
                if (end_has_rest(end))
                        return (int)result(-EINVAL);
        }
        outcome = real()->getsockopt(fd, level, name, value, size);
        if (outcome != 0 || !end)
                return outcome;
        if (level == SOL_SOCKET && name == SO_RCVLOWAT && low)
                number = (int)low;
        else if (level == SOL_SOCKET && name == PEEK_OFF && peeked)
                number = (int)peeked - 1;
        else if (!keep_get(end, level, name, &number) &&
                 !(cork_get(end, level, name, &number) && identity_holds(fd, end)))
                return outcome;
        memcpy(value, &number, *size < sizeof number ? *size : sizeof number);
        return outcome;
}

ALSO(connect) int __connect(int, const struct sockaddr *, socklen_t);
