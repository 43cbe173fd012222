#include "closing.h"

#include "fallback.h"
#include "poller.h"
#include "ready.h"
#include "sys.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* Is this an attached end that no other process holds? Then the kernel will send a reset at its
 * close if there are unread bytes in its ring. */
static bool closes_here(int fd, struct end *end, uint64_t key)
{
        struct linger at_once = {.l_onoff = 1, .l_linger = 0};

        if (!end_is(end, key) || atomic_load(&end->stage) != STAGE_ATTACHED)
                return false;
        if (end_held_elsewhere(end))
                end_forget_dead(end);
        if (end_held_elsewhere(end))
                return false;
        if (ready_bytes(end) && !ready_end(end))
                sys_5(SYS_setsockopt, fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        return true;
}

/* Is there anything that makes close() more than a FIN? */
static bool closes_specially(int fd, struct end *end)
{
        struct linger linger = {0};
        uint32_t size = sizeof linger;

        sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_LINGER, &linger, &size);
        return linger.l_onoff || sys_number(fd, SIOCINQ) || ready_bytes(end);
}

void close_ring(int fd, struct end *end, uint64_t key)
{
        enum taken taken;

        if (!end_is(end, key) || atomic_load(&process.local[end_number(end)]) != 1 ||
            !closes_here(fd, end, key))
                return;
        taken = lock_take(&end->tx.lock, self());
        if (taken == LOCK_TAKEN && end_is(end, key))
                fallback_check_order(fd, end);
        if (taken == LOCK_TAKEN && end_is(end, key) && fallback_may_end_ring(end)) {
                /* A peer that is busy with other rings checks the kernel rarely. What this program
                 * sends next on another connection must not arrive before this end: first the FIN,
                 * then the ring's end, which tells of it. */
                if (!closes_specially(fd, end))
                        sys_2(SYS_shutdown, fd, SHUT_WR);
                fallback_end_ring(end);
        }
        lock_release(&end->tx.lock, taken);
}

void close_at_exit(int fd, struct end *end, uint64_t key)
{
        enum taken taken;

        if (!closes_here(fd, end, key))
                return;
        taken = lock_take(&end->tx.lock, self());
        if (taken == LOCK_TAKEN && end_is(end, key) && fallback_may_end_ring(end)) {
                fallback_end_ring(end);
                if (fallback_await_start(end))
                        poller_sender_changed(end);
                else
                        reset_broken(fd, end, false);
        }
        lock_release(&end->tx.lock, taken);
}
