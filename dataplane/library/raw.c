#include "raw.h"

#include "bucket.h"
#include "mapping.h"
#include "sys.h"

#include <errno.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum {
        NEAR = 1000, /* ns: the kernel's quickest send on a connection with nothing in flight takes 3000 */
        PACE = 25 * 1000, /* ns for each question, which takes 500 */
        LEAST = 1000000,  /* ns after which the clock's speed can be told */
        STATE_ESTABLISHED = 1,
        STATE_CLOSE = 7,
        STATE_CLOSE_WAIT = 8,
};

#define NOT_CLEAN UINT64_MAX

__thread struct raw_last raw_last __attribute__((tls_model("initial-exec")));
_Atomic uint64_t raw_near = 24; /* for the slowest clocks, until the speed of this one is known */

static _Atomic uint64_t pace = PACE, first_ns, first_stamp;

/* Measure the frequency of clock_stamp(). */
static void learn_speed(void)
{
        static _Atomic bool known;
        uint64_t none = 0, ns, stamp, elapsed;

        if (load_relaxed(&known))
                return;
        ns = now();
        stamp = clock_stamp();
        if (atomic_compare_exchange_strong(&first_ns, &none, ns)) {
                atomic_store(&first_stamp, stamp);
                return;
        }
        elapsed = ns - none;
        if (elapsed < LEAST || !atomic_load(&first_stamp))
                return;
        stamp = (stamp - atomic_load(&first_stamp)) * 1024 / elapsed;
        atomic_store(&raw_near, stamp * NEAR / 1024);
        atomic_store(&pace, stamp * PACE / 1024);
        atomic_store(&known, true);
}

static uint64_t by_queue(int fd, const struct end *end, const struct tcp_info *info)
{
        return info->tcpi_bytes_acked + (uint64_t)sys_number(fd, SIOCOUTQ) - atomic_load(&end->active);
}

/* What the kernel was given to send since the connection began, and its state. 0 or -errno. */
static long given(int fd, const struct end *end, uint64_t *bytes, struct tcp_info *info)
{
        uint32_t size = sizeof *info;
        long status;

        memset(info, 0, sizeof *info);
        status = sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, info, &size);
        if (status < 0)
                return status;
        if (size >= offsetof(struct tcp_info, tcpi_bytes_retrans) + sizeof info->tcpi_bytes_retrans)
                *bytes = info->tcpi_bytes_sent - info->tcpi_bytes_retrans + info->tcpi_notsent_bytes;
        else /* before Linux 4.19 */
                *bytes = by_queue(fd, end, info);
        return 0;
}

bool raw_begin(int fd, struct end *end)
{
        uint64_t bytes, ours = atomic_load(&end->tx.position);
        struct tcp_info info;

        learn_speed();
        if (given(fd, end, &bytes, &info) < 0)
                return false;
        store_relaxed(&end->tx.sent, bytes);
        return bytes == ours || by_queue(fd, end, &info) == ours;
}

static void set_clean(struct end *end)
{
        struct view view = end_sends(end);
        uint64_t edge = load_relaxed(&end->tx.edge);

        store_relaxed(&end->tx.clean, edge);
        store_release(&view.ring->clean, edge);
}

/* By the program, and not by a call that we know of. */
static bool is_shut(struct end *end, unsigned state)
{
        return state != STATE_ESTABLISHED && state != STATE_CLOSE_WAIT &&
               !(atomic_load(&end->shut) & (SHUT_WRITE | SHUTTING_WRITE));
}

enum raw raw_check(int fd, struct end *end)
{
        struct tcp_info info;
        uint64_t bytes;
        long status = given(fd, end, &bytes, &info);

        if (status < 0)
                return status == -EBADF || status == -ENOTSOCK || status == -EOPNOTSUPP ||
                               status == -ENOPROTOOPT
                           ? RAW_LOST
                           : RAW_UNKNOWN;
        if (info.tcpi_state == STATE_CLOSE)
                return RAW_NONE;
        /* A retransmission that failed may have been counted in part: the other count has none of
         * them. */
        if (bytes != load_relaxed(&end->tx.sent) &&
            by_queue(fd, end, &info) != atomic_load(&end->tx.position))
                return RAW_BYPASSED;
        set_clean(end);
        if (!is_shut(end, info.tcpi_state))
                return RAW_NONE;
        atomic_fetch_or(&end->shut, SHUT_WRITE);
        return RAW_BYPASSED;
}

static bool may_ask(uint64_t stamp)
{
        return bucket_take(&raw_last.spent, stamp, load_relaxed(&pace));
}

enum raw raw_check_in_share(int fd, struct end *end, uint64_t stamp)
{
        enum raw found;

        if (!may_ask(stamp)) {
                store_relaxed(&end->tx.clean, NOT_CLEAN);
                return RAW_UNKNOWN;
        }
        learn_speed();
        found = raw_check(fd, end);
        if (found == RAW_UNKNOWN)
                store_relaxed(&end->tx.clean, NOT_CLEAN);
        return found;
}

void raw_settle_last(void)
{
        struct end *end = raw_last.end;
        uint64_t key = 0;
        enum taken taken;

        raw_last.end = NULL;
        if (end_of(raw_last.fd, &key) != end || !may_ask(clock_stamp()))
                return;
        taken = lock_take(&end->tx.lock, self());
        if (taken == LOCK_TAKEN && end_is(end, key) && load_relaxed(&end->tx.phase) == PHASE_RING &&
            !raw_is_clean(&end->tx))
                raw_check(raw_last.fd, end);
        lock_release(&end->tx.lock, taken);
}

bool raw_tcp_is_empty(int fd, struct end *end)
{
        uint64_t edge = load_relaxed(&end->rx.edge);
        char byte;
        long got;

        /* Events of another host's TCP are handled elsewhere (remote.h). */
        if (end_is_remote(end) || load_relaxed(&end->rx.clean) == edge ||
            load_relaxed(&end->rx.phase) != PHASE_RING)
                return true;
        got = sys_6(SYS_recvfrom, fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT, 0, 0);
        if (got == -EAGAIN)
                store_relaxed(&end->rx.clean, edge);
        return got == -EAGAIN || got == -EINTR;
}
