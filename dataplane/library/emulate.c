#include "emulate.h"

#include "mapping.h"
#include "sys.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>

void emulate_message(struct transfer *t)
{
        struct operation *o = t->o;
        struct msghdr *message = o->message;
        size_t room;
        int unread;

        if (o->call == CALL_RECVFROM && o->address && o->address_size)
                *o->address_size = 0;
        if (o->call != CALL_RECVMSG)
                return;
        room = message->msg_control ? message->msg_controllen : 0;
        if (message->msg_name)
                message->msg_namelen = 0;
        message->msg_controllen = 0;
        message->msg_flags = o->flags & MSG_CMSG_CLOEXEC;
        if (__builtin_expect(!load_relaxed(&t->end->inq), 1))
                return;
        if (room < CMSG_LEN(sizeof unread)) {
                message->msg_flags |= MSG_CTRUNC;
                return;
        }
        message->msg_controllen = room < CMSG_SPACE(sizeof unread) ? room : CMSG_SPACE(sizeof unread);
        unread = emulate_unread(t->end, sys_number(o->fd, FIONREAD));
        *(struct cmsghdr *)message->msg_control = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof unread), .cmsg_level = IPPROTO_TCP, .cmsg_type = TCP_CM_INQ};
        memcpy(CMSG_DATA((struct cmsghdr *)message->msg_control), &unread, sizeof unread);
}

int emulate_unread(struct end *end, int queued)
{
        enum taken taken = lock_take(&end->rx.lock, self());
        uint32_t phase = atomic_load(&end->rx.phase);
        uint64_t before = UINT64_MAX; /* bytes of TCP that are still to come before those of the ring */
        int64_t ready = 0;

        if (phase == PHASE_READY || phase == PHASE_RING) {
                struct view view = end_receives(end);
                uint64_t start = load_acquire(&view.ring->start);
                uint64_t position = load_relaxed(&end->rx.position);

                if (phase == PHASE_RING)
                        before = 0;
                else if (start)
                        before = start - 1 > position ? start - 1 - position : 0;
                /* As a peek: the ring's bytes can be read once all of those are there. */
                if (queued >= 0 && before <= (uint64_t)queued)
                        ready = ring_ready(&end->rx, &view);
        }
        lock_release(&end->rx.lock, taken);
        return queued + (ready > 0 ? (int)ready : 0);
}

void emulate_taken(struct transfer *t, uint64_t taken)
{
        struct end *end = t->end;
        uint32_t low = load_relaxed(&end->low);
        uint32_t peeked = load_relaxed(&end->peeked);

        if (low)
                emulate_low_water(t->o->fd, low, ring_ready(&end->rx, &t->view));
        if (peeked)
                store_relaxed(&end->peeked, peeked - 1 > taken ? peeked - (uint32_t)taken : 1);
}

void emulate_low_water(int fd, uint32_t low, int64_t left)
{
        int of_kernel = left > 0 ? (low > left ? (int)(low - left) : 1) : (int)low;

        sys_set_option(fd, SOL_SOCKET, SO_RCVLOWAT, of_kernel);
}

size_t emulate_least(const struct transfer *t)
{
        uint32_t low = load_relaxed(&t->end->low);

        if (operation_is_splice(t->o))
                return 1;
        if (t->o->flags & MSG_WAITALL)
                return t->o->size;
        return !low ? 1 : low < t->o->size ? low : t->o->size;
}
