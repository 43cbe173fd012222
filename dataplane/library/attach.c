#include "attach.h"

#include "arena.h"
#include "backoff.h"
#include "ends.h"
#include "flow.h"
#include "keep.h"
#include "poller.h"
#include "protocol.h"
#include "requests.h"
#include "router.h"
#include "settings.h"
#include "sys.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>

/* By number: the names depend on the headers. */
enum { TCP_REPAIR_OF = 19, TCP_ULP_OF = 31, TCP_INQ_OF = 36, TCP_TX_DELAY_OF = 37 };

static uint64_t moved(struct end *end)
{
        return load_relaxed(&end->rx.position) + load_relaxed(&end->tx.position) -
               load_relaxed(&end->counted_from);
}

/* The rule: enough operations, of some age, with enough bytes; or bulk. Short connections never get
 * here. */
static bool is_worth_it(struct end *end, uint64_t bytes)
{
        uint32_t operations = load_relaxed(&end->operations);

        if (bytes + moved(end) >= settings.bulk && operations > 1)
                return true;
        if (operations < (uint64_t)settings.operations << family_restraint() || moved(end) < settings.bytes)
                return false;
        return !settings.age || now() - load_relaxed(&end->opened) >= settings.age * UINT64_C(1000);
}

/* --- is a ring the same as this socket? --- */

/* Options that rings can't carry, as far as the kernel says which are set, and what it says when
 * they aren't. See calls_socket.c. */
static bool is_fit(int fd)
{
        static const struct {
                int level, name, unset;
        } unfit[] = {
            {SOL_SOCKET, SO_ZEROCOPY, 0},      {SOL_SOCKET, SO_OOBINLINE, 0},
            {SOL_SOCKET, SO_TIMESTAMP, 0},     {SOL_SOCKET, SO_TIMESTAMPNS, 0},
            {SOL_SOCKET, SO_TIMESTAMPING, 0},  {SOL_SOCKET, SO_RCVLOWAT, 1},
            {SOL_SOCKET, SO_PEEK_OFF, -1},     {SOL_SOCKET, SO_MAX_PACING_RATE, -1},
            {IPPROTO_TCP, TCP_REPAIR_OF, 0},   {IPPROTO_TCP, TCP_INQ_OF, 0},
            {IPPROTO_TCP, TCP_TX_DELAY_OF, 0},
        };
        uint32_t size = 0;
        char protocol[16] = "";

        for (size_t i = 0; i < sizeof unfit / sizeof *unfit; i++) {
                int value = unfit[i].unset;

                size = sizeof value;
                if (sys_5(SYS_getsockopt, fd, unfit[i].level, unfit[i].name, &value, &size) == 0 &&
                    value != unfit[i].unset)
                        return false;
        }
        size = sizeof protocol;
        if (sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_ULP_OF, protocol, &size) == 0 && size)
                return false;
        /* The number of a filter's instructions. An error means that it has some that aren't shown.
         */
        size = 0;
        return sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_GET_FILTER, 0, &size) == 0 && !size;
}

/* Read the socket's mode and time-outs: it may have been made, or inherited, without us. False:
 * rings can't carry it. */
static bool refresh(int fd, struct end *end)
{
        struct timeval time[2] = {{0}, {0}};
        const int names[2] = {SO_RCVTIMEO, SO_SNDTIMEO};
        struct flow *flows[2] = {&end->rx, &end->tx};
        long flags = sys_2(SYS_fcntl, fd, F_GETFL);
        uint32_t size;

        if (flags < 0 || flags & O_ASYNC || sys_option(fd, SOL_SOCKET, SO_PROTOCOL) != IPPROTO_TCP)
                return false;
        atomic_store(&end->nonblocking, (flags & O_NONBLOCK) != 0);
        for (int i = 0; i < 2; i++) {
                size = sizeof time[i];
                if (sys_5(SYS_getsockopt, fd, SOL_SOCKET, names[i], &time[i], &size) < 0)
                        return false;
                atomic_store(&flows[i]->timeout, attach_timeout(&time[i]));
        }
        return is_fit(fd);
}

uint32_t attach_timeout(const struct timeval *time)
{
        /* The kernel takes such times for none at all, or nearly: it has fewer clock ticks than
         * there are ms.
         */
        if (time->tv_sec < 0 || time->tv_sec > UINT32_MAX / 1000)
                return time->tv_sec < 0 ? 1 : 0;
        return (uint32_t)((uint64_t)time->tv_sec * 1000 + ((uint64_t)time->tv_usec + 999) / 1000);
}

/* --- has every byte gone through the library? --- */

/* The bytes that went over TCP since the connection began: those that the kernel was given, and
 * those that it has given out. */
static enum verdict count(int fd, const struct end *end, uint64_t *sent, uint64_t *received)
{
        struct tcp_info before, after;
        uint32_t size = sizeof before;
        int queued, unread;

        memset(&before, 0, sizeof before);
        memset(&after, 0, sizeof after);
        if (sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &before, &size) < 0 ||
            size < offsetof(struct tcp_info, tcpi_bytes_received) + sizeof before.tcpi_bytes_received)
                return RAW;
        queued = sys_number(fd, SIOCOUTQ);
        unread = sys_number(fd, SIOCINQ);
        size = sizeof after;
        sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &after, &size);
        /* Established: in other states the queues count the FIN too, and there is nothing to gain.
         */
        if (after.tcpi_state != 1 || before.tcpi_bytes_acked != after.tcpi_bytes_acked ||
            before.tcpi_bytes_received != after.tcpi_bytes_received)
                return UNSURE;
        *sent = after.tcpi_bytes_acked + (uint64_t)queued - atomic_load(&end->active);
        *received = after.tcpi_bytes_received - (uint64_t)unread;
        return EXACT;
}

enum verdict attach_compare(int fd, const struct end *end)
{
        uint64_t sent, received;
        enum verdict verdict;

        if (atomic_load(&end->rx.kernel) || atomic_load(&end->tx.kernel))
                return UNSURE;
        verdict = count(fd, end, &sent, &received);
        if (verdict == EXACT &&
            (sent != atomic_load(&end->tx.position) || received != atomic_load(&end->rx.position)))
                return RAW;
        return verdict;
}

/* Under both locks. */
static void judge(int fd, struct end *end)
{
        uint32_t reason = REASON_RAW;
        enum verdict verdict = attach_compare(fd, end);

        if (verdict == EXACT && !refresh(fd, end)) {
                verdict = RAW;
                reason = REASON_OPTION;
        }
        if (verdict == EXACT) {
                keep_begin(fd, end);
                /* How long it waited for this stay in a ring says nothing about the next. */
                atomic_store(&end->due, 0);
                /* A signal handler may have refused it meanwhile. */
                if (!stage_become(end, STAGE_GRANTED, STAGE_ATTACHED))
                        keep_end(fd, end);
        } else if (verdict == RAW) {
                atomic_store(&end->reason, reason);
                if (stage_become(end, STAGE_GRANTED, STAGE_REFUSED))
                        arena_release(end);
        }
}

static void attach(int fd, struct end *end, uint64_t key)
{
        unsigned nested = end_lock(end);

        if (!nested && end_is(end, key) && atomic_load(&end->stage) == STAGE_GRANTED)
                judge(fd, end);
        end_release(end, nested);
}

static void request(int fd, struct end *end, uint64_t bytes, uint32_t operations)
{
        /* A process that makes itself a daemon leaves a parent behind that has ended without a
         * word. */
        if (end_held_elsewhere(end) && operations % 64 == 0)
                end_forget_dead(end);
        if (!settings.welcomed)
                request_poll(end);
        else if (!settings.enabled && !settings.off)
                request_watch();
        if (settings.enabled && backoff_is_over(end) && is_worth_it(end, bytes) && !end_held_elsewhere(end)) {
                request_upgrade(end, fd);
                store_relaxed(&end->requested_at, now());
        }
}

bool attach_step(int fd, struct end *end, uint64_t key, uint64_t bytes)
{
        uint32_t operations = load_relaxed(&end->operations) + 1;

        store_relaxed(&end->operations, operations);
        switch (load_relaxed(&end->stage)) {
        case STAGE_CANDIDATE:
                request(fd, end, bytes, operations);
                break;
        case STAGE_REQUESTED:
                if (load_relaxed(&end->epoch) != router_epoch())
                        stage_become(end, STAGE_REQUESTED, STAGE_CANDIDATE);
                else
                        request_poll(end);
                if (atomic_load(&end->stage) == STAGE_GRANTED)
                        attach(fd, end, key);
                break;
        case STAGE_GRANTED:
                attach(fd, end, key);
                break;
        case STAGE_REFUSED:
                poller_leave(fd, key);
                end_leave(fd, end, key, atomic_load(&end->reason));
                return false;
        default:
                break;
        }
        return true;
}

void attach_refuse(struct end *end, uint64_t key, uint32_t reason)
{
        unsigned nested = end_lock(end);

        /* A thread that takes an answer is soon done with it. */
        for (int i = 0; i < 100 && end_is(end, key); i++) {
                uint32_t stage = atomic_load(&end->stage);

                if (stage == STAGE_ANSWERING) {
                        sys_sleep(1000 * 1000);
                } else if (stage != STAGE_CANDIDATE && stage != STAGE_REQUESTED && stage != STAGE_GRANTED) {
                        break;
                } else if (stage_become(end, stage, STAGE_REFUSED)) {
                        atomic_store(&end->reason, reason);
                        if (stage == STAGE_GRANTED)
                                arena_release(end);
                        break;
                }
        }
        end_release(end, nested);
}
