#include "boundary.h"

#include "fallback.h"
#include "flow.h"
#include "poller.h"
#include "ready.h"
#include "remote.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>

/* The receiver has seen all that comes through the ring. */
static long leave_ring(struct end *end)
{
        flow_become(&end->rx, PHASE_OVER);
        /* emulate_taken() has told the kernel of the last byte: from here on it has the options
         * alone. */
        store_relaxed(&end->peeked, 0);
        store_relaxed(&end->inq, 0);
        /* Threads that sleep in epoll wait for the kernel now, if the other direction is over too.
         */
        poller_receiver_changed(end);
        return -EINPROGRESS;
}

/* A remote ring is empty, and the kernel has returned `got`: 0 a FIN, more: bytes that come after
 * the ring.
 */
static long check_remote(struct transfer *t, long got)
{
        uint32_t shut = load_relaxed(&t->end->shut);

        if (ready_broken(t->end))
                return -ENOLINK;
        /* A connection that is gone without both sides' FIN was reset, whichever thread got the
         * error. */
        if (got == 0 &&
            (shut & SHUT_READ || (sys_poll(t->o->fd, 0) & POLLHUP &&
                                  !(load_relaxed(&t->end->shut) & (SHUT_WRITE | SHUTTING_WRITE)))))
                return 0;
        if (got >= 0) {
                remote_defer(t->end);
                return -EAGAIN;
        }
        if (got != -EAGAIN && got != -EINTR)
                leave_ring(t->end);
        return got;
}

/* Bytes that come before the ring may have been read by calls that the library didn't see: then
 * they aren't waited for. */
static bool taken_unseen(int fd, struct flow *flow, uint64_t last)
{
        struct tcp_info info;
        uint32_t size = sizeof info;
        int queued = 0;
        uint64_t taken;

        memset(&info, 0, sizeof info);
        if (sys_3(SYS_ioctl, fd, FIONREAD, &queued) < 0 || queued ||
            sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0 ||
            sys_3(SYS_ioctl, fd, FIONREAD, &queued) < 0 || queued)
                return false;
        taken = info.tcpi_bytes_received < last ? info.tcpi_bytes_received : last;
        if (taken <= load_relaxed(&flow->position))
                return false;
        store_relaxed(&flow->position, taken);
        return true;
}

/* Take bytes of TCP. */
static long take_tcp(struct transfer *t, size_t left)
{
        struct operation *o = t->o;
        struct iovec vec[VECTORS];
        struct msghdr message = {.msg_iov = vec};

        if (o->call == CALL_SPLICE_OUT)
                return sys_6(SYS_splice, o->fd, 0, o->other, 0, left, o->flags | (int)SPLICE_F_NONBLOCK);
        message.msg_iovlen = (size_t)transfer_buffers(o, &t->cursor, left, vec);
        return sys_3(SYS_recvmsg, o->fd, &message, (o->flags & (MSG_PEEK | MSG_TRUNC)) | MSG_DONTWAIT);
}

/* There is no `start`, and `queued` bytes may be taken: all of them come before the ring. With
 * none, the kernel is asked for the connection's end. Returns 1 if there are some. */
static long check_queue(struct transfer *t, int *queued, uint64_t *start)
{
        char byte;
        long got;

        *queued = sys_number(t->o->fd, FIONREAD);
        *start = load_acquire(&t->view.ring->start);
        if (*start || *queued > 0)
                return 1;
        got = sys_6(SYS_recvfrom, t->o->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT, 0, 0);
        /* Bytes or the ring came just now. What was sent before a FIN is visible after it. */
        if (got > 0 || load_acquire(&t->view.ring->start))
                return -EINPROGRESS;
        return view_remote(&t->view) ? check_remote(t, got) : got;
}

long boundary_before(struct transfer *t, size_t left)
{
        struct operation *o = t->o;
        struct flow *flow = t->flow;
        bool remote = view_remote(&t->view);
        uint64_t position = load_relaxed(&flow->position);
        uint64_t start = load_acquire(&t->view.ring->start), most;
        int queued = 0;
        long got;

        if (!start && (remote ? ready_over(&t->view) : load_acquire(&t->view.ring->end) != 0)) {
                start = load_acquire(&t->view.ring->start);
                /* Nothing has ever been put into it. */
                if (!start)
                        return leave_ring(t->end);
        }
        if (!start) {
                got = check_queue(t, &queued, &start);
                if (got <= 0)
                        return got;
        }
        if (start) {
                if (start - 1 < position)
                        return -EPROTO;
                store_relaxed(&flow->limit, start - 1);
                most = start - 1 - position;
                if (!most) {
                        flow_become(flow, PHASE_RING);
                        return -EINPROGRESS;
                }
        } else {
                most = (uint64_t)queued;
        }
        got = take_tcp(t, left < most ? left : most);
        if (got > 0 && !(o->flags & MSG_PEEK && !operation_is_splice(o)))
                store_relaxed(&flow->position, position + (uint64_t)got);
        if (got == -EAGAIN && start && taken_unseen(o->fd, flow, start - 1))
                return -EINPROGRESS;
        /* A splice's other errors are of the pipe. */
        if (remote && got < 0 && (got == -EAGAIN || o->call != CALL_SPLICE_OUT))
                return check_remote(t, got);
        return got;
}

long boundary_behind(struct transfer *t)
{
        struct end *end = t->end;
        struct flow *flow = t->flow;
        struct view *view = &t->view;
        uint64_t over = load_acquire(&view->ring->end);
        uint32_t stamp = ready_stamp();
        char byte;
        long got;

        if (over) {
                uint64_t head = load_relaxed(&flow->edge);

                /* What was put in before the end is visible with it. */
                if (ring_ready(flow, view))
                        return -EINPROGRESS;
                if (over - 1 != head)
                        return -EPROTO;
                return leave_ring(end);
        }
        if (view_remote(view) && (ready_over(view) || ready_broken(end))) {
                if (ring_ready(flow, view) || load_acquire(&view->ring->end))
                        return -EINPROGRESS;
                return ready_over(view) ? leave_ring(end) : -ENOLINK;
        }
        if (!t->event && load_relaxed(&flow->checked) == stamp)
                return -EAGAIN;
        store_relaxed(&flow->checked, stamp);
        got = sys_6(SYS_recvfrom, t->o->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT, 0, 0);
        if (got == -EAGAIN) {
                store_relaxed(&flow->clean, load_relaxed(&flow->edge));
                return -EAGAIN;
        }
        if (got == -EINTR)
                return -EAGAIN;
        if (got == -EBADF || got == -ENOTSOCK)
                return got;
        /* What the peer did before it closed or sent over TCP is visible now. */
        if (ring_ready(flow, view) || load_acquire(&view->ring->end))
                return -EINPROGRESS;
        if (view_remote(view))
                return check_remote(t, got);
        return got > 0 ? fallback_unannounced(t->o->fd, end) : got;
}

void boundary_tell(struct transfer *t)
{
        struct end *end = t->end;
        bool ready = load_relaxed(&t->flow->phase) == PHASE_READY;
        uint64_t start;

        /* Pairs with wait_begin(): either a waiter sees our position, or we see where the ring
         * begins. */
        atomic_thread_fence(memory_order_seq_cst);
        start = load_acquire(&t->view.ring->start);
        if (ready ? start && start - 1 <= load_relaxed(&t->flow->position)
                  : ready_end(end) && !ring_ready(t->flow, &t->view))
                poller_receiver_changed(end);
}

void boundary_closed(struct end *end)
{
        store_relaxed(&end->tx.checked, ready_stamp() - 1);
}
