#include "upgrade.h"

#include "arena.h"
#include "calls.h"
#include "clock.h"
#include "inherit.h"
#include "keep.h"
#include "poller.h"
#include "protocol.h"
#include "pump.h"
#include "raw.h"
#include "ready.h"
#include "remote.h"
#include "retire.h"
#include "router.h"
#include "settings.h"
#include "sparse.h"
#include "statistics.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/membarrier.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>

enum { TCP_REPAIR_OF = 19, TCP_ULP_OF = 31, TCP_INQ_OF = 36, TCP_TX_DELAY_OF = 37 };

static uint64_t moved(struct end *end)
{
        return atomic_load_explicit(&end->rx.position, memory_order_relaxed) +
               atomic_load_explicit(&end->tx.position, memory_order_relaxed);
}

/* The rule: enough operations, of some age, with enough bytes; or bulk. Short connections never get here. */
static bool is_worth_it(struct end *end, uint64_t bytes)
{
        uint32_t operations = atomic_load_explicit(&end->operations, memory_order_relaxed);

        if (process.eager)
                return true;
        if (bytes + moved(end) >= settings.bulk && operations > 1)
                return true;
        if (operations < (uint64_t)settings.operations << family_restraint() || moved(end) < settings.bytes)
                return false;
        return !settings.age || now() - atomic_load_explicit(&end->opened, memory_order_relaxed) >=
                                    settings.age * UINT64_C(1000);
}

/* Options that rings can't carry, as far as the kernel says which are set, and what it says when they aren't.
 * By number: the names depend on the headers. See calls_socket.c. */
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
        /* The number of a filter's instructions; an error: it has some that aren't shown. */
        size = 0;
        return sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_GET_FILTER, 0, &size) == 0 && !size;
}

/* What the socket is like now: it may have been made, or inherited, without us. False: rings can't carry it.
 */
static bool refresh(int fd, struct end *end)
{
        struct timeval time[2] = {{0}, {0}};
        const int names[2] = {SO_RCVTIMEO, SO_SNDTIMEO};
        struct flow *flows[2] = {&end->rx, &end->tx};
        int value = 0;
        uint32_t size = sizeof value;
        long flags = sys_2(SYS_fcntl, fd, F_GETFL);

        if (flags < 0 || flags & O_ASYNC ||
            sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_PROTOCOL, &value, &size) < 0 || value != IPPROTO_TCP)
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
        /* What the kernel takes for no end at all, or nearly: its clock's ticks are fewer than there are ms.
         */
        if (time->tv_sec < 0 || time->tv_sec > UINT32_MAX / 1000)
                return time->tv_sec < 0 ? 1 : 0;
        return (uint32_t)((uint64_t)time->tv_sec * 1000 + ((uint64_t)time->tv_usec + 999) / 1000);
}

/* Has every byte gone through us? While other calls are in the kernel the figures aren't exact, and wait. */
enum verdict { EXACT, UNSURE, RAW };

static enum verdict compare(int fd, struct end *end)
{
        struct tcp_info before, after;
        uint32_t size = sizeof before;
        int queued = 0, unread = 0;
        uint64_t sent, received;

        if (atomic_load(&end->rx.kernel) || atomic_load(&end->tx.kernel))
                return UNSURE;
        memset(&before, 0, sizeof before);
        memset(&after, 0, sizeof after);
        if (sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &before, &size) < 0 ||
            size < offsetof(struct tcp_info, tcpi_bytes_received) + sizeof before.tcpi_bytes_received)
                return RAW;
        sys_3(SYS_ioctl, fd, SIOCOUTQ, &queued);
        sys_3(SYS_ioctl, fd, SIOCINQ, &unread);
        size = sizeof after;
        sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &after, &size);
        /* Established: in other states the queues count the FIN too, and there is nothing to gain. */
        if (after.tcpi_state != 1 || before.tcpi_bytes_acked != after.tcpi_bytes_acked ||
            before.tcpi_bytes_received != after.tcpi_bytes_received)
                return UNSURE;
        sent = after.tcpi_bytes_acked + (uint64_t)queued - atomic_load(&end->active);
        received = after.tcpi_bytes_received - (uint64_t)unread;
        if (sent != atomic_load(&end->tx.position) || received != atomic_load(&end->rx.position))
                return RAW;
        return EXACT;
}

static void attach(int fd, struct end *end, uint64_t key)
{
        uint32_t reason = REASON_RAW;
        enum taken rx, tx;
        enum verdict verdict;

        rx = lock_take(&end->rx.lock, self());
        tx = lock_take(&end->tx.lock, self());
        verdict = rx == LOCK_NESTED || tx == LOCK_NESTED || !end_is(end, key) ||
                          atomic_load(&end->stage) != STAGE_GRANTED
                      ? UNSURE
                      : compare(fd, end);
        if (verdict == EXACT && !refresh(fd, end)) {
                verdict = RAW;
                reason = REASON_OPTION;
        }
        if (verdict == EXACT) {
                keep_begin(fd, end);
                atomic_store(&end->stage, STAGE_ATTACHED);
        } else if (verdict == RAW) {
                atomic_store(&end->reason, reason);
                atomic_store(&end->stage, STAGE_REFUSED);
                arena_release(end);
        }
        lock_release(&end->tx.lock, tx);
        lock_release(&end->rx.lock, rx);
}

bool attach_step(int fd, struct end *end, uint64_t key, uint64_t bytes)
{
        uint32_t operations = atomic_load_explicit(&end->operations, memory_order_relaxed) + 1,
                 asked = STAGE_REQUESTED;

        atomic_store_explicit(&end->operations, operations, memory_order_relaxed);
        retire_now_if_due();
        switch (atomic_load_explicit(&end->stage, memory_order_relaxed)) {
        case STAGE_CANDIDATE:
                /* Who makes himself a daemon leaves a parent behind that has ended without a word. */
                if (end_held_elsewhere(end) && operations % 64 == 0)
                        end_forget_dead(end);
                if (!settings.welcomed)
                        router_poll(end);
                if (settings.enabled && is_worth_it(end, bytes) && !end_held_elsewhere(end)) {
                        router_request(end, fd);
                        atomic_store_explicit(&end->asked, now(), memory_order_relaxed);
                }
                if (!process.eager || atomic_load(&end->stage) != STAGE_REQUESTED)
                        break;
                /* fall through */
        case STAGE_REQUESTED:
                if (atomic_load_explicit(&end->epoch, memory_order_relaxed) != router_epoch())
                        atomic_compare_exchange_strong(&end->stage, &asked, STAGE_CANDIDATE);
                else
                        router_poll(end);
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

/* Bytes went past us: the peer is to go back to TCP too. */
static void past(struct end *end)
{
        uint32_t phase = atomic_load(&end->rx.phase);
        struct view view = end_receives(end);

        statistics_count(&statistics.past);
        if (view_remote(&view) && (phase == PHASE_READY || phase == PHASE_RING))
                remote_request_fallback(end);
        else if (!view_remote(&view))
                atomic_store(&view.ring->leave, LEAVE_RAW);
        router_note(end, REASON_RAW);
}

void upgrade_receiver(struct end *end)
{
        struct view view = end_receives(end);

        if (atomic_load_explicit(&end->rx.kernel, memory_order_acquire) || end_held_elsewhere(end) ||
            ready_broken(end))
                return;
        /* Pairs with blind_begin(): either it sees the phase, or we see its call. */
        atomic_store(&end->rx.phase, PHASE_READY);
        /* Those who wait in epoll must see the ring before the sender may use it; and the phase with it, or
         * they would take it for one that has ended. */
        if (atomic_load(&end->rx.kernel) || !poller_attach(end)) {
                atomic_store(&end->rx.phase, PHASE_TCP);
                poller_sender_changed(end);
                return;
        }
        atomic_store_explicit(&view.ring->ready, 1, memory_order_release);
        if (view_remote(&view))
                wake(&view.ring->senders, end);
        statistics_count(&statistics.receivers);
}

void upgrade_sender(int fd, struct end *end)
{
        struct view view = end_sends(end);

        if (atomic_load_explicit(&end->tx.kernel, memory_order_acquire) || end_held_elsewhere(end) ||
            !atomic_load_explicit(&view.ring->ready, memory_order_acquire) ||
            atomic_load_explicit(&view.ring->leave, memory_order_relaxed) ||
            atomic_load_explicit(&end->shut, memory_order_relaxed) & 2 || ready_broken(end))
                return;
        if (!raw_begin(fd, end)) {
                /* Since the counters were compared. */
                past(end);
                atomic_store_explicit(&end->tx.phase, PHASE_OVER, memory_order_relaxed);
                return;
        }
        atomic_store_explicit(&end->tx.phase, PHASE_RING, memory_order_relaxed);
        if (!view_remote(&view))
                upgrade_start(end, &view);
        poller_sender_changed(end);
        statistics_count(&statistics.senders);
}

void upgrade_start(struct end *end, const struct view *view)
{
        atomic_store_explicit(&view->ring->start, atomic_load(&end->tx.position) + 1, memory_order_release);
}

bool fallback_may_end_ring(struct end *end)
{
        uint32_t phase = atomic_load_explicit(&end->tx.phase, memory_order_relaxed);

        return phase == PHASE_RING || (phase == PHASE_TCP && end_is_remote(end));
}

static void reset(int fd, struct end *end, uint32_t reason);
static void past(struct end *end);

void fallback_check_order(int fd, struct end *end)
{
        if (atomic_load_explicit(&end->tx.phase, memory_order_relaxed) != PHASE_RING ||
            raw_check(fd, end) != RAW_BYPASSED || raw_is_clean(&end->tx))
                return;
        past(end);
        reset(fd, end, REASON_RAW);
}

void fallback_end_ring(struct end *end)
{
        struct view view = end_sends(end);

        atomic_store_explicit(&end->tx.phase, PHASE_OVER, memory_order_relaxed);
        ring_stamp(&view, atomic_load(&end->tx.edge), clock_stamp());
        atomic_store_explicit(&view.ring->end, atomic_load(&end->tx.edge) + 1, memory_order_release);
        wake(&view.ring->receivers, end);
}

/* What goes over TCP now may be there before the relays have brought `start`: the receiver would take it for
 * what comes before the ring. So the one who was that quick to go back waits until they have. False: they
 * don't. */
static bool await_start(struct end *end)
{
        enum { PATIENCE = 1000 * 1000 * 1000 }; /* ns */
        static const struct timespec nap = {.tv_nsec = 100 * 1000};
        struct view view = end_sends(end);
        uint64_t begin = now();

        if (!view_remote(&view) || !atomic_load(&end->tx.edge))
                return true;
        while (!atomic_load_explicit(&view.ring->received, memory_order_acquire) &&
               !atomic_load_explicit(&view.ring->head, memory_order_acquire)) {
                if (ready_broken(end) || now() - begin > PATIENCE)
                        return false;
                sys_2(SYS_nanosleep, &nap, 0);
        }
        return true;
}

void fallback_sender(int fd, struct end *end, uint32_t reason)
{
        fallback_end_ring(end);
        if (!await_start(end)) {
                reset_broken(fd, end, false);
                return;
        }
        atomic_store(&end->reason, reason);
        poller_sender_changed(end);
        statistics_count(&statistics.retreats);
        statistics_reason(reason);
}

/* The relays answer when all has come that the sender put in before it stopped. */
static bool stop_remote_sender(struct end *end, const struct view *view)
{
        enum { PATIENCE = 1000 * 1000 * 1000 }; /* ns: the peer's relay itself takes 20 ms */
        static const struct timespec nap = {.tv_nsec = 500 * 1000};
        uint64_t begin = now();

        remote_request_fallback(end);
        while (!ready_over(view)) {
                if (ready_broken(end) || now() - begin > PATIENCE)
                        return false;
                sys_2(SYS_nanosleep, &nap, 0);
        }
        return true;
}

/* Ask the other side to end its ring. False: it may still put bytes there. */
static bool stop_sender(struct end *end, uint32_t why)
{
        enum { PATIENCE = 100 * 1000 * 1000 }; /* ns: a copy of a piece, and being preempted in it */
        static const struct timespec nap = {.tv_nsec = 20 * 1000 * 1000};
        struct view view = end_receives(end);
        uint64_t begin;

        if (view_remote(&view))
                return stop_remote_sender(end, &view);
        atomic_store(&view.ring->leave, why);
        /* After this, a sender that isn't `busy` will see `leave` before it puts anything. Where the kernel
         * has no such barrier, what every core has done in the meantime must do. */
        if (sys_2(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0) < 0)
                sys_2(SYS_nanosleep, &nap, 0);
        begin = now();
        while (atomic_load_explicit(&view.ring->busy, memory_order_acquire))
                if (now() - begin > PATIENCE)
                        return false;
        return true;
}

bool fallback_sender_stopped(struct end *end)
{
        struct view view = end_receives(end);

        if (view_remote(&view))
                return ready_over(&view);
        return atomic_load(&view.ring->leave) &&
               !atomic_load_explicit(&view.ring->busy, memory_order_acquire);
}

/* Bytes that only we can read; RING_CORRUPT. */
static int64_t left_in_ring(struct end *end)
{
        struct view view = end_receives(end);

        return ring_ready(&end->rx, &view);
}

/* Under both locks. True: nothing comes through the ring any more, and nothing is in it. */
static bool leave(int fd, struct end *end, uint32_t reason)
{
        uint32_t phase = atomic_load(&end->rx.phase);

        fallback_check_order(fd, end);
        if (fallback_may_end_ring(end))
                fallback_sender(fd, end, reason);
        keep_end(fd, end);
        atomic_store(&end->tx.phase, PHASE_OVER);
        if (phase == PHASE_TCP)
                atomic_store(&end->rx.phase, PHASE_OVER);
        if (phase != PHASE_READY && phase != PHASE_RING)
                return true;
        if (!stop_sender(end, LEAVE_ASKED) || left_in_ring(end) != 0)
                return false;
        atomic_store_explicit(&end->rx.phase, PHASE_OVER, memory_order_relaxed);
        return true;
}

void fall_back(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        enum { NAPS = 50 };
        static const struct timespec nap = {.tv_nsec = 10 * 1000 * 1000};
        enum taken rx, tx;

        if (atomic_load(&end->stage) != STAGE_ATTACHED) {
                poller_leave(fd, key);
                end_leave(fd, end, key, reason);
                return;
        }
        rx = lock_take(&end->rx.lock, self());
        tx = lock_take(&end->tx.lock, self());
        if (end_is(end, key))
                leave(fd, end, reason);
        lock_release(&end->tx.lock, tx);
        lock_release(&end->rx.lock, rx);
        /* Of a sender that was preempted in the middle of a piece: who asks counts on it that no byte
         * follows. */
        for (int i = 0; i < NAPS && end_is(end, key) && end_has_rest(end) && !fallback_sender_stopped(end);
             i++)
                sys_2(SYS_nanosleep, &nap, 0);
}

/* Under both locks, after the sender has stopped: what is left in the ring, copied to memory of our own. */
static bool take_rest(struct end *end, struct pump *pump)
{
        struct view view = end_receives(end);
        uint64_t head = atomic_load(&end->rx.edge), start = atomic_load(&view.ring->start),
                 position = atomic_load(&end->rx.position);
        int64_t left = left_in_ring(end);
        unsigned char *bytes;
        size_t copied = 0;

        if (left <= 0 || !start || start - 1 < position)
                return false;
        bytes = reserve((size_t)left, MAP_PRIVATE);
        if (!bytes)
                return false;
        while (copied < (size_t)left) {
                size_t run;
                const unsigned char *place = ring_to_take(&view, head + copied, &run);

                run = run < (size_t)left - copied ? run : (size_t)left - copied;
                /* What nobody wrote must not be made here. */
                if (view_remote(&view) || !arena_copy(end, place, bytes + copied, run))
                        memcpy(bytes + copied, place, run);
                copied += run;
        }
        /* While it is ready, TCP's bytes come before the ring's. */
        pump->before = atomic_load(&end->rx.phase) == PHASE_READY ? start - 1 - position : 0;
        pump->bytes = bytes;
        pump->size = (size_t)left;
        return true;
}

bool end_is_behind(int fd, const struct end *end)
{
        uint64_t cookie = 0;
        uint32_t size = sizeof cookie;

        return sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) == 0 &&
               cookie == atomic_load_explicit(&end->cookie, memory_order_relaxed);
}

/* All descriptors of the end become the program's end of the pump. A child in our memory may have changed
 * what its numbers mean. */
static void replace_descriptors(struct end *end, uint64_t key, int program)
{
        bool ours = in_this_process();

        for (int fd = end_next_descriptor(end, -1); fd >= 0 && end_is(end, key);
             fd = end_next_descriptor(end, fd)) {
                long flags = sys_2(SYS_fcntl, fd, F_GETFD);

                if (flags < 0 || !end_is_behind(fd, end))
                        continue;
                if (ours)
                        poller_replace(fd, key, program, flags & FD_CLOEXEC ? O_CLOEXEC : 0);
                else
                        sys_3(SYS_dup3, program, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0);
        }
}

void hand_over_to(int fd, struct end *end, uint64_t key, int program, uint32_t reason)
{
        replace_descriptors(end, key, program);
        if (in_this_process())
                end_leave(fd, end, key, reason);
        else
                guest_tell(end, key, program);
        sys_1(SYS_close, program);
}

void stage_refuse(struct end *end, uint64_t key, uint32_t reason)
{
        static const struct timespec nap = {.tv_nsec = 1000 * 1000};
        enum taken rx = lock_take(&end->rx.lock, self()), tx = lock_take(&end->tx.lock, self());
        uint32_t stage = atomic_load(&end->stage);

        /* A thread that takes an answer is soon done with it. */
        for (int i = 0; i < 100 && end_is(end, key); i++) {
                if (stage == STAGE_ANSWERING)
                        sys_2(SYS_nanosleep, &nap, 0);
                else if (stage != STAGE_CANDIDATE && stage != STAGE_REQUESTED && stage != STAGE_GRANTED)
                        break;
                else if (atomic_compare_exchange_strong(&end->stage, &stage, STAGE_REFUSED)) {
                        atomic_store(&end->reason, reason);
                        if (stage == STAGE_GRANTED)
                                arena_release(end);
                        break;
                }
                stage = atomic_load(&end->stage);
        }
        lock_release(&end->tx.lock, tx);
        lock_release(&end->rx.lock, rx);
}

/* A remote sender that may not have stopped. */
static bool is_unanswered(struct end *end)
{
        uint32_t phase = atomic_load(&end->rx.phase);
        struct view view = end_receives(end);

        return view_remote(&view) && (phase == PHASE_READY || phase == PHASE_RING) && !ready_over(&view);
}

void hand_over(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        struct pump pump = {.tcp = fd};
        bool pumped = false, left;
        enum taken rx, tx;

        if (atomic_load(&end->stage) != STAGE_ATTACHED) {
                fall_back(fd, end, key, reason);
                return;
        }
        rx = lock_take(&end->rx.lock, self());
        tx = lock_take(&end->tx.lock, self());
        left = end_is(end, key) && !leave(fd, end, reason);
        if (left && is_unanswered(end)) {
                /* What may still come nobody would read, and what comes after it must not be taken for it. */
                reset_broken(fd, end, true);
        } else if (left && left_in_ring(end) > 0 && take_rest(end, &pump)) {
                pumped = pump_start(&pump);
                if (pumped) {
                        long status = sys_2(SYS_fcntl, fd, F_GETFL);
                        struct view view = end_receives(end);

                        sys_3(SYS_fcntl, pump.program, F_SETFL, status & O_NONBLOCK);
                        atomic_store(&end->rx.edge, atomic_load(&view.ring->tail));
                        atomic_store_explicit(&end->rx.phase, PHASE_OVER, memory_order_relaxed);
                }
                sys_2(SYS_munmap, pump.bytes, pump.size);
        }
        lock_release(&end->tx.lock, tx);
        lock_release(&end->rx.lock, rx);
        if (pumped)
                hand_over_to(fd, end, key, pump.program, reason);
}

/* Is there anything that makes close() more than a FIN? */
static bool closes_specially(int fd, struct end *end)
{
        struct linger linger = {0};
        uint32_t size = sizeof linger;
        int unread = 0;

        sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_LINGER, &linger, &size);
        sys_3(SYS_ioctl, fd, SIOCINQ, &unread);
        return linger.l_onoff || unread || ready_bytes(end);
}

void close_ring(int fd, struct end *end, uint64_t key)
{
        struct linger at_once = {.l_onoff = 1, .l_linger = 0};
        enum taken taken;

        if (!end_is(end, key) || atomic_load(&end->stage) != STAGE_ATTACHED ||
            atomic_load(&process.local[end_number(end)]) != 1)
                return;
        if (end_held_elsewhere(end))
                end_forget_dead(end);
        if (end_held_elsewhere(end))
                return;
        if (ready_bytes(end) && !ready_end(end))
                sys_5(SYS_setsockopt, fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        /* A peer that is busy with other rings asks the kernel rarely. What this program says next on another
         * connection must not be heard before this end: the FIN first, then the word that it is there. */
        taken = lock_take(&end->tx.lock, self());
        if (taken == LOCK_TAKEN && end_is(end, key))
                fallback_check_order(fd, end);
        if (taken == LOCK_TAKEN && end_is(end, key) && fallback_may_end_ring(end)) {
                if (!closes_specially(fd, end))
                        sys_2(SYS_shutdown, fd, SHUT_WR);
                fallback_end_ring(end);
        }
        lock_release(&end->tx.lock, taken);
}

void close_at_exit(int fd, struct end *end, uint64_t key)
{
        struct linger at_once = {.l_onoff = 1, .l_linger = 0};
        enum taken taken;

        if (!end_is(end, key) || atomic_load(&end->stage) != STAGE_ATTACHED)
                return;
        if (end_held_elsewhere(end))
                end_forget_dead(end);
        if (end_held_elsewhere(end))
                return;
        if (ready_bytes(end) && !ready_end(end))
                sys_5(SYS_setsockopt, fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        taken = lock_take(&end->tx.lock, self());
        if (taken == LOCK_TAKEN && end_is(end, key) && fallback_may_end_ring(end)) {
                fallback_end_ring(end);
                if (await_start(end))
                        poller_sender_changed(end);
                else
                        reset_broken(fd, end, false);
        }
        lock_release(&end->tx.lock, taken);
}

static void reset(int fd, struct end *end, uint32_t reason)
{
        /* A reset, at the next close or by what the kernel gets from now on; both directions are over for us.
         */
        struct sockaddr nowhere = {.sa_family = AF_UNSPEC};

        atomic_store(&end->reason, reason);
        atomic_store(&end->tx.phase, PHASE_OVER);
        atomic_store(&end->rx.phase, PHASE_OVER);
        sys_3(SYS_connect, fd, &nowhere, sizeof nowhere);
        statistics_reason(reason);
}

void fallback_bypassed(int fd, struct end *end)
{
        past(end);
        if (raw_is_clean(&end->tx))
                fallback_sender(fd, end, REASON_RAW);
        else
                reset(fd, end, REASON_RAW);
}

long fallback_unannounced(int fd, struct end *end)
{
        struct view view = end_receives(end);
        uint64_t head = atomic_load(&end->rx.edge);
        enum taken taken;
        bool known = atomic_load(&end->rx.clean) == head || atomic_load(&view.ring->clean) == head;

        /* What a thread puts at the same moment may come first. */
        if (known && stop_sender(end, LEAVE_RAW)) {
                int64_t ready = left_in_ring(end);

                if (ready && atomic_load(&view.ring->clean) == head + (uint64_t)ready)
                        return -EINPROGRESS;
                known = !ready;
        } else {
                known = false;
        }
        past(end);
        if (!known) {
                reset(fd, end, REASON_RAW);
                return -EBADE;
        }
        atomic_store_explicit(&end->rx.phase, PHASE_OVER, memory_order_relaxed);
        taken = lock_take(&end->tx.lock, self());
        if (taken == LOCK_TAKEN && fallback_may_end_ring(end))
                fallback_sender(fd, end, REASON_RAW);
        lock_release(&end->tx.lock, taken);
        poller_sender_changed(end);
        return -EINPROGRESS;
}

void reset_corrupt(int fd, struct end *end)
{
        reset(fd, end, REASON_CORRUPT);
        statistics_count(&statistics.corrupt);
}

/* Is there something that a reader gets before he hears of a reset? */
static bool is_unread(int fd, struct end *end)
{
        uint32_t phase = atomic_load(&end->rx.phase);
        int queued = 0;

        if (phase != PHASE_READY && phase != PHASE_RING)
                return false;
        sys_3(SYS_ioctl, fd, SIOCINQ, &queued);
        return left_in_ring(end) > 0 || (queued > 0 && remote_before(end, (uint64_t)queued));
}

void reset_broken(int fd, struct end *end, bool receiver)
{
        int error;
        uint32_t size = sizeof error;

        if (atomic_exchange(&end->reason, REASON_BROKEN) != REASON_BROKEN)
                statistics_count(&statistics.broken);
        if (!receiver && is_unread(fd, end)) {
                atomic_store(&end->tx.phase, PHASE_OVER);
                sys_2(SYS_shutdown, fd, SHUT_WR);
        } else {
                reset(fd, end, REASON_BROKEN);
                /* What follows the error is what follows one on TCP: the end, and EPIPE. A reader says the
                 * error itself. */
                sys_2(SYS_shutdown, fd, SHUT_RDWR);
                if (receiver)
                        sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_ERROR, &error, &size);
        }
        poller_sender_changed(end);
}

void fallback_announce(struct end *end)
{
        uint32_t phase = atomic_load(&end->rx.phase);

        if (atomic_load(&end->stage) == STAGE_ATTACHED && (phase == PHASE_READY || phase == PHASE_RING) &&
            end_is_remote(end))
                remote_request_fallback(end);
}
