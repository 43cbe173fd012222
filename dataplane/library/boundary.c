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
        atomic_store_explicit(&end->peeked, 0, memory_order_relaxed);
        atomic_store_explicit(&end->inq, 0, memory_order_relaxed);
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
        uint32_t shut = atomic_load_explicit(&t->end->shut, memory_order_relaxed);

        if (ready_broken(t->end))
                return -ENOLINK;
        /* A connection that is gone without both sides' FIN was reset, whichever thread got the
         * error. */
        if (got == 0 && (shut & SHUT_READ || (sys_poll(t->o->fd, 0) & POLLHUP &&
                                              !(atomic_load_explicit(&t->end->shut, memory_order_relaxed) &
                                                (SHUT_WRITE | SHUTTING_WRITE)))))
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
        if (taken <= atomic_load_explicit(&flow->position, memory_order_relaxed))
                return false;
        atomic_store_explicit(&flow->position, taken, memory_order_relaxed);
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
        *start = atomic_load_explicit(&t->view.ring->start, memory_order_acquire);
        if (*start || *queued > 0)
                return 1;
        got = sys_6(SYS_recvfrom, t->o->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT, 0, 0);
        /* Bytes or the ring came just now. What was sent before a FIN is visible after it. */
        if (got > 0 || atomic_load_explicit(&t->view.ring->start, memory_order_acquire))
                return -EINPROGRESS;
        return view_remote(&t->view) ? check_remote(t, got) : got;
}

long boundary_before(struct transfer *t, size_t left)
{
        struct operation *o = t->o;
        struct flow *flow = t->flow;
        bool remote = view_remote(&t->view);
        uint64_t position = atomic_load_explicit(&flow->position, memory_order_relaxed);
        uint64_t start = atomic_load_explicit(&t->view.ring->start, memory_order_acquire), most;
        int queued = 0;
        long got;

        if (!start && (remote ? ready_over(&t->view)
                              : atomic_load_explicit(&t->view.ring->end, memory_order_acquire) != 0)) {
                start = atomic_load_explicit(&t->view.ring->start, memory_order_acquire);
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
                atomic_store_explicit(&flow->limit, start - 1, memory_order_relaxed);
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
                atomic_store_explicit(&flow->position, position + (uint64_t)got, memory_order_relaxed);
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
        uint64_t over = atomic_load_explicit(&view->ring->end, memory_order_acquire);
        uint32_t stamp = ready_stamp();
        char byte;
        long got;

        if (over) {
                uint64_t head = atomic_load_explicit(&flow->edge, memory_order_relaxed);

                /* What was put in before the end is visible with it. */
                if (ring_ready(flow, view))
                        return -EINPROGRESS;
                if (over - 1 != head)
                        return -EPROTO;
                return leave_ring(end);
        }
        if (view_remote(view) && (ready_over(view) || ready_broken(end))) {
                if (ring_ready(flow, view) || atomic_load_explicit(&view->ring->end, memory_order_acquire))
                        return -EINPROGRESS;
                return ready_over(view) ? leave_ring(end) : -ENOLINK;
        }
        if (!t->event && atomic_load_explicit(&flow->checked, memory_order_relaxed) == stamp)
                return -EAGAIN;
        atomic_store_explicit(&flow->checked, stamp, memory_order_relaxed);
        got = sys_6(SYS_recvfrom, t->o->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT, 0, 0);
        if (got == -EAGAIN) {
                atomic_store_explicit(&flow->clean, atomic_load_explicit(&flow->edge, memory_order_relaxed),
                                      memory_order_relaxed);
                return -EAGAIN;
        }
        if (got == -EINTR)
                return -EAGAIN;
        if (got == -EBADF || got == -ENOTSOCK)
                return got;
        /* What the peer did before it closed or sent over TCP is visible now. */
        if (ring_ready(flow, view) || atomic_load_explicit(&view->ring->end, memory_order_acquire))
                return -EINPROGRESS;
        if (view_remote(view))
                return check_remote(t, got);
        return got > 0 ? fallback_unannounced(t->o->fd, end) : got;
}

void boundary_tell(struct transfer *t)
{
        struct end *end = t->end;
        bool ready = atomic_load_explicit(&t->flow->phase, memory_order_relaxed) == PHASE_READY;
        uint64_t start;

        /* Pairs with wait_begin(): either a waiter sees our position, or we see where the ring
         * begins. */
        atomic_thread_fence(memory_order_seq_cst);
        start = atomic_load_explicit(&t->view.ring->start, memory_order_acquire);
        if (ready ? start && start - 1 <= atomic_load_explicit(&t->flow->position, memory_order_relaxed)
                  : ready_end(end) && !ring_ready(t->flow, &t->view))
                poller_receiver_changed(end);
}

void boundary_closed(struct end *end)
{
        atomic_store_explicit(&end->tx.checked, ready_stamp() - 1, memory_order_relaxed);
}
