#include "pair.h"

#include "agent.h"
#include "client.h"
#include "datagram_slots.h"
#include "datagrams.h"
#include "direct.h"
#include "groups.h"
#include "monotonic.h"
#include "numbers.h"
#include "queue_pair.h"

#include <string.h>

enum {
        /* What is refused for the moment is asked for again: */
        MOST_REFUSALS = 16,
        PAUSE = 20, /* ms, doubled each time, up to */
        PAUSE_MOST = 1000,
        /* How long the other side may take to ask again, in ms: */
        ASK_PATIENCE = 10000,
};

/* --- asking --- */

/* While a request is sent, so that each is sent once by a socket. */
static struct mutex asking;

/* Datagrams may come to the queue pair, or no more. False: the router was not told. */
static bool tell_of_datagrams(const struct queue_pair *queue, uint32_t epoch, bool open)
{
        struct v_datagrams message = {.message = {.kind = V_DATAGRAMS, .size = sizeof message},
                                      .qpn = queue->plain.qp_base.qp_num,
                                      .on = open};

        return client_send(&message, sizeof message, epoch);
}

static void join_group(const struct queue_pair *queue, const union ibv_gid *group)
{
        datagram_router->join(queue, group, true);
}

/* Ask, unless that has been done by the router's socket that is there. It is not done before the
 * router has described the device, which it may number anew. */
static void ask_by_socket(const struct freeflow_services *here, struct queue_pair *queue)
{
        struct v_queue_pair wanted = {
            .message = {.kind = V_QUEUE_PAIR, .size = sizeof wanted},
            .request = atomic_load(&queue->request),
            .qpn = queue->plain.qp_base.qp_num,
            .peer_qpn = queue->attributes.dest_qp_num,
            .type = queue->plain.qp_base.qp_type,
            .paired = queue_paired(queue) == QUEUE_PAIRED,
        };
        uint32_t epoch;

        if (queue->asked_for && queue->asked_by == here->epoch())
                return;
        queue->asked_for = false;
        if (queue->ask_at && monotonic() < queue->ask_at)
                return;
        if (!client_epoch(&epoch))
                return;
        queue->asked_by = epoch;
        if (queue_has_datagrams(queue)) {
                queue->asked_for = tell_of_datagrams(queue, epoch, true);
                groups_of(queue, join_group);
                return;
        }
        if (!port_find(&queue->gid, &wanted.gid_index))
                return;
        memcpy(wanted.peer_gid.bytes, queue->attributes.ah_attr.grh.dgid.raw, sizeof wanted.peer_gid.bytes);
        queue->asked_for = client_send(&wanted, sizeof wanted, epoch);
        /* A router that comes after another one knows nothing. */
        atomic_store_explicit(&queue->told, 0, memory_order_relaxed);
}

static void ask(struct queue_pair *queue)
{
        static uint32_t requests;
        const struct freeflow_services *here = client_services();

        if (!here)
                return;
        mutex_take(&asking);
        atomic_store(&queue->request, requests = requests + 1 ? requests + 1 : 1);
        queue->asked_for = false;
        queue->refusals = 0;
        queue->ask_at = queue->wait_end = 0;
        atomic_store_explicit(&queue->operations, 0, memory_order_relaxed);
        atomic_store_explicit(&queue->bytes, 0, memory_order_relaxed);
        ask_by_socket(here, queue);
        mutex_release(&asking);
        /* To wait for the answer, and not for ever. */
        agent_start();
}

/* The request goes with the socket. A router that comes after has to know of it all the same, to
 * tell when the peer is gone. */
static bool ask_again(struct queue_pair *queue)
{
        const struct freeflow_services *here = client_services();
        bool asked = true, over = false, anew = false;
        uint32_t by;

        if (!here || !atomic_load(&queue->request) || queue_paired(queue) == QUEUE_LOST)
                return true;
        mutex_take(&asking);
        if (atomic_load(&queue->request)) {
                by = queue->asked_by;
                ask_by_socket(here, queue);
                asked = queue->asked_for;
                anew = asked && by != queue->asked_by;
                over = queue->wait_end && queue_paired(queue) == QUEUE_ASKED && monotonic() > queue->wait_end;
        }
        mutex_release(&asking);
        if (anew)
                direct_ask_again(queue);
        if (over)
                queue_lose(queue);
        return asked;
}

static uint64_t in_ms(uint64_t time)
{
        return monotonic() + time * 1000000;
}

/* It was refused for a moment, or has lost what it was granted: ask again, unless that has been in
 * vain too often. `patience`: how long to wait for the other side then, in ms; 0: for as long as
 * the program does. */
static void ask_later(struct queue_pair *queue, uint64_t patience)
{
        uint64_t pause;
        bool over;

        mutex_take(&asking);
        over = queue->refusals == MOST_REFUSALS;
        pause = (uint64_t)PAUSE << queue->refusals;
        queue->refusals += !over;
        queue->asked_for = false;
        queue->ask_at = in_ms(pause < PAUSE_MOST ? pause : PAUSE_MOST);
        queue->wait_end = patience ? in_ms(patience) : 0;
        mutex_release(&asking);
        if (over)
                queue_lose(queue);
}

static void give_back(struct queue_pair *queue)
{
        if (atomic_load_explicit(&queue->place.incarnation, memory_order_relaxed))
                agent_leave(&queue->place);
        client_release(&queue->place);
}

/* --- what they do --- */

/* The router knows nothing of queue pairs with datagrams but that they are there. */
static bool is_untold(const struct queue_pair *queue)
{
        return !queue_has_datagrams(queue) &&
               atomic_load_explicit(&queue->operations, memory_order_relaxed) !=
                   atomic_load_explicit(&queue->told, memory_order_relaxed);
}

/* By the socket that has asked for it. */
static void tell_by_socket(const struct freeflow_services *here, struct queue_pair *queue)
{
        struct v_status status = {
            .message = {.kind = V_STATUS, .size = sizeof status},
            .qpn = queue->plain.qp_base.qp_num,
            .state = queue_state(queue),
            .moved = queue->direct.moved,
            .operations = atomic_load_explicit(&queue->operations, memory_order_relaxed),
            .bytes = atomic_load_explicit(&queue->bytes, memory_order_relaxed),
        };

        if (queue->asked_for && here->send(&status, sizeof status, queue->asked_by) == 0)
                atomic_store_explicit(&queue->told, status.operations, memory_order_relaxed);
}

static bool tell(struct queue_pair *queue, bool now)
{
        const struct freeflow_services *here = client_services();

        if (!is_untold(queue) || !here || !atomic_load(&queue->request) ||
            queue_paired(queue) != QUEUE_PAIRED)
                return true;
        if (!now)
                return false;
        mutex_take(&asking);
        if (atomic_load(&queue->request))
                tell_by_socket(here, queue);
        mutex_release(&asking);
        return !is_untold(queue);
}

/* --- answers --- */

/* There is no memory or no descriptor, or one queue pair too many, at this moment. */
static bool passes(uint32_t reason)
{
        return reason == REASON_MEMORY || reason == REASON_LIMIT;
}

/* Is the message about the pairing that the queue pair wants now? */
static bool is_wanted(const struct queue_pair *queue, uint32_t request)
{
        return request && atomic_load(&queue->request) == request;
}

static void granted(void *owner, void *argument)
{
        struct queue_pair *queue = owner;
        struct verbs_message *message = argument;
        const struct freeflow_services *here = client_services();
        int bell;

        if (!here || !is_wanted(queue, message->grant.request))
                return;
        if (message->reason) {
                if (passes(message->reason))
                        ask_later(queue, 0);
                else
                        queue_lose(queue);
                return;
        }
        bell = agent_join(&message->place);
        atomic_store_explicit(&queue->bell, bell, memory_order_relaxed);
        agent_serve(&message->place, queue->plain.qp_base.qp_num);
        if (queue_pair_up(queue, here->sends(&message->place), here->receives(&message->place),
                          &message->place, message->grant.number))
                /* It is the queue pair's now. */
                atomic_store_explicit(&message->place.incarnation, 0, memory_order_relaxed);
        else
                agent_leave(&message->place);
}

static void refused(void *owner, void *argument)
{
        struct queue_pair *queue = owner;
        const struct verbs_message *message = argument;
        uint32_t reason = message->refuse.reason;

        if (!is_wanted(queue, message->refuse.request))
                return;
        if (queue_paired(queue) == QUEUE_ASKED && passes(reason)) {
                ask_later(queue, 0);
        } else if (reason == REASON_PEER_CLOSED && queue_pair_down(queue)) {
                /* The other side could not use the slot, and asks again, or it is gone. */
                give_back(queue);
                ask_later(queue, ASK_PATIENCE);
        } else if (queue_paired(queue) == QUEUE_ASKED || reason == REASON_PEER_CLOSED) {
                /* A router that refuses what another one has paired can't tell when the peer is
                 * gone, which it need not be. */
                queue_lose(queue);
        }
}

static bool handle(struct verbs_message *message)
{
        const struct freeflow_services *here = client_services();

        if (here && datagram_slots_handle(here, message))
                return true;
        if (message->header.kind == V_GRANT) {
                number_use(message->grant.qpn, granted, message);
                client_release(&message->place);
        } else if (message->header.kind == V_REFUSE && message->refuse.kind == V_QUEUE_PAIR) {
                number_use(message->refuse.number, refused, message);
        } else {
                return false;
        }
        if (here && message->descriptor >= 0)
                here->close_own(message->descriptor);
        return true;
}

/* --- the end of it --- */

static void leave(struct queue_pair *queue)
{
        const struct freeflow_services *here = client_services();
        struct v_end end = {.message = {.kind = V_QUEUE_PAIR_END, .size = sizeof end},
                            .number = queue->plain.qp_base.qp_num};

        if (here) {
                mutex_take(&asking);
                if (atomic_load(&queue->request) && is_untold(queue))
                        tell_by_socket(here, queue);
                mutex_release(&asking);
        }
        give_back(queue);
        if (!here)
                return;
        mutex_take(&asking);
        if (atomic_exchange(&queue->request, 0)) {
                if (queue_has_datagrams(queue))
                        tell_of_datagrams(queue, here->epoch(), false);
                else
                        client_send(&end, sizeof end, here->epoch());
        }
        mutex_release(&asking);
}

static void ring(struct queue_pair *queue, struct waiters *waiters)
{
        const struct freeflow_services *here;

        /* Services are a system call away. */
        if (!waiters_sleep(waiters))
                return;
        here = client_services();
        if (here)
                here->ring(waiters, &queue->place);
}

static void forked(void)
{
        asking = (struct mutex){0};
        agent_forget();
        numbers_forget();
        datagrams_forget();
        memory_forget();
}

static void retired(void)
{
        agent_stop();
}

static const struct queue_pairer pairer = {
    .ask = ask, .ask_again = ask_again, .tell = tell, .listen = client_receive, .ring = ring, .leave = leave};
static const struct client_user user = {.handle = handle, .forked = forked, .retired = retired};

static void watch(void)
{
        agent_start();
}

void pair_start(void)
{
        queue_pairer = &pairer;
        queue_watch = watch;
        datagram_slots_start();
        client_serve(&user);
}
