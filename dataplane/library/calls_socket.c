/* Where connections begin and end. */
#include "calls.h"

#include "clock.h"
#include "keep.h"
#include "poller.h"
#include "protocol.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"
#include "upgrade.h"

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

static void opened(int fd, struct end *end, bool active)
{
        uint32_t closed = STAGE_CLOSED;

        if (atomic_load(&end->stage) != STAGE_CLOSED)
                return;
        atomic_store_explicit(&end->active, active, memory_order_relaxed);
        atomic_store_explicit(&end->opened, now(), memory_order_relaxed);
        atomic_compare_exchange_strong(&end->stage, &closed, STAGE_CANDIDATE);
        statistics_count(&statistics.tracked);
        if (!settings.welcomed)
                router_greet();
        if (process.eager)
                router_ask(end, fd);
}

CALL int connect(int fd, const struct sockaddr *address, socklen_t size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        int outcome;

        if (!end)
                return real()->connect(fd, address, size);
        if (!address || size < sizeof address->sa_family || !is_far(address)) {
                upgrade_leave(fd, end, key, REASON_FOREIGN);
                return real()->connect(fd, address, size);
        }
        outcome = real()->connect(fd, address, size);
        if (outcome == 0 || *__errno_location() == EINPROGRESS || *__errno_location() == EINTR)
                opened(fd, end, true);
        return outcome;
}

static int accepted(int fd, const struct sockaddr *address, bool nonblocking)
{
        struct end *end;

        if (fd < 0 || !is_far(address))
                return fd;
        end = end_make(fd, nonblocking);
        if (end)
                opened(fd, end, false);
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
        /* A program may have confined itself to the one. */
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
        /* Behind a send that is under way in another thread: the kernel's FIN says that nothing more is in
         * the ring. */
        taken = lock_take(&end->tx.lock, self());
        if (how != SHUT_RD && taken == LOCK_TAKEN && end_is(end, key) &&
            atomic_load(&end->stage) == STAGE_ATTACHED)
                upgrade_check_order(fd, end);
        /* Before the kernel knows: see remote_true(). */
        if (how != SHUT_RD)
                atomic_fetch_or(&end->shut, 4u);
        outcome = real()->shutdown(fd, how);
        if (outcome != 0)
                atomic_fetch_and(&end->shut, ~4u);
        if (outcome == 0)
                atomic_fetch_or(&end->shut, how == SHUT_RD ? 1u : how == SHUT_WR ? 2u : 3u);
        /* Not only the kernel says so: see upgrade_close(). */
        if (outcome == 0 && how != SHUT_RD && taken == LOCK_TAKEN && end_is(end, key) &&
            atomic_load(&end->stage) == STAGE_ATTACHED && may_end_ring(end)) {
                upgrade_end_ring(end);
                poller_sender_changed(end);
        }
        lock_release(&end->tx.lock, taken);
        return outcome;
}

/* Options that rings can't carry. */
static bool is_unfit(int level, int name, int value)
{
        if (level == SOL_SOCKET)
                return (name == SO_RCVLOWAT && value > 1) ||
                       (value && (name == SO_ZEROCOPY || name == SO_OOBINLINE || name == SO_TIMESTAMP ||
                                  name == SO_TIMESTAMPNS || name == SO_TIMESTAMPING || name == SO_PEEK_OFF));
        return level == IPPROTO_TCP &&
               (name == TCP_ULP || name == TCP_REPAIR || name == TCP_FASTOPEN_CONNECT);
}

CALL int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        int outcome, number = 0;

        if (!end)
                return real()->setsockopt(fd, level, name, value, size);
        if (value && size >= sizeof number)
                memcpy(&number, value, sizeof number);
        if (is_unfit(level, name, number)) {
                upgrade_leave(fd, end, key, REASON_OPTION);
                return real()->setsockopt(fd, level, name, value, size);
        }
        outcome = real()->setsockopt(fd, level, name, value, size);
        if (outcome == 0)
                keep_set(fd, end, level, name);
        if (outcome == 0 && level == SOL_SOCKET && (name == SO_RCVTIMEO || name == SO_SNDTIMEO) &&
            size >= sizeof(struct timeval)) {
                struct timeval time;

                memcpy(&time, value, sizeof time);
                atomic_store(name == SO_RCVTIMEO ? &end->rx.timeout : &end->tx.timeout,
                             upgrade_timeout(&time));
        }
        return outcome;
}

CALL int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        int outcome = real()->getsockopt(fd, level, name, value, size), number;

        if (outcome == 0 && end && keep_get(end, level, name, &number))
                memcpy(value, &number, *size < sizeof number ? *size : sizeof number);
        return outcome;
}

ALSO(connect) int __connect(int, const struct sockaddr *, socklen_t);
