#include "datagram_slots.h"

#include "agent.h"
#include "client.h"
#include "datagrams.h"
#include "groups.h"

#include <sys/resource.h>

static void seek(const union ibv_gid *from, const union ibv_gid *to, uint32_t number, uint32_t wanted,
                 uint32_t request)
{
        struct v_datagrams message = {.message = {.kind = V_DATAGRAM_PEER, .size = sizeof message},
                                      .request = request,
                                      .qpn = number,
                                      .peer_qpn = wanted,
                                      .on = 1};
        uint32_t epoch;

        memcpy(message.gid.bytes, to, sizeof message.gid.bytes);
        if (client_epoch(&epoch) && port_find(from, &message.gid_index))
                client_send(&message, sizeof message, epoch);
}

/* On each network of the container. */
static void join(const struct queue_pair *queue, const union ibv_gid *group, bool on)
{
        struct v_datagrams message = {.message = {.kind = V_GROUP, .size = sizeof message},
                                      .qpn = queue->plain.qp_base.qp_num,
                                      .on = on};
        union ibv_gid own;
        uint32_t epoch;

        memcpy(message.gid.bytes, group, sizeof message.gid.bytes);
        if (!client_epoch(&epoch))
                return;
        for (; message.gid_index < PORT_GIDS; message.gid_index++)
                if (port_gid(message.gid_index, &own))
                        client_send(&message, sizeof message, epoch);
}

static uint32_t epoch_of_socket(void)
{
        const struct freeflow_services *here = client_services();

        return here ? here->epoch() : 0;
}

static void ring(struct datagram_peer *peer, struct waiters *waiters)
{
        const struct freeflow_services *here = client_services();

        if (here && atomic_load_explicit(&peer->place.incarnation, memory_order_relaxed))
                services_wake(here, waiters, &peer->place);
}

static void leave(struct datagram_peer *peer, uint32_t number, bool returned)
{
        struct place place;

        if (!client_services() || !datagrams_end(peer, number, returned, &place))
                return;
        agent_leave(&place);
        client_release(&place);
}

static void end(struct datagram_peer *peer, uint32_t number)
{
        leave(peer, number, false);
}

/* May it be otherwise in a moment? */
static bool passes(uint32_t reason)
{
        return reason == REASON_NOT_FOUND || reason == REASON_LIMIT || reason == REASON_MEMORY;
}

/* How many slots others may give this process. Each takes up to four of the descriptors that the
 * library keeps for itself, a quarter of the process's at least (own.c): half of those in all. */
static uint64_t most_unasked(void)
{
        enum { EACH = 4, PART = 8 };
        struct rlimit limit = {.rlim_cur = 1024};

        sys_4(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, &limit);
        return limit.rlim_cur / PART / EACH;
}

static void granted(const struct freeflow_services *here, struct verbs_message *message)
{
        const struct v_grant *grant = &message->grant;
        struct datagram_slot slot = {.first = grant->peer_qpn,
                                     .count = grant->peer_count,
                                     .number = grant->number,
                                     .epoch = message->epoch,
                                     .unasked = !grant->request};
        struct datagram_peer *peer, *before;

        memcpy(&slot.to, grant->peer_gid.bytes, sizeof slot.to);
        if (message->reason) {
                peer_refused(grant->request, passes(message->reason));
                return;
        }
        if (!port_gid(grant->gid_index, &slot.from)) {
                client_release(&message->place);
                return;
        }
        /* What an earlier router gave for the same queue pairs; this one does not know of it. */
        while ((before = peer_before(&slot))) {
                slot.unasked &= before->unasked;
                end(before, before->number);
        }
        if (!peer_may_come(&slot, most_unasked())) {
                client_release(&message->place);
                return;
        }
        slot.place = &message->place;
        slot.out = here->sends(&message->place);
        slot.in = here->receives(&message->place);
        slot.bell = agent_join(&message->place);
        peer = peer_up(&slot);
        if (peer) {
                agent_serve(&message->place, AGENT_DATAGRAMS | peer->index);
                return;
        }
        agent_leave(&message->place);
        client_release(&message->place);
}

/* The members of a group that is sent to. */
static void changed(const struct v_datagrams *change)
{
        union ibv_gid from, group;

        memcpy(&group, change->gid.bytes, sizeof group);
        if (!change->number)
                group_answered(change->request);
        else if (port_gid(change->gid_index, &from))
                group_change(&from, &group, change->number, change->on);
}

bool datagram_slots_handle(const struct freeflow_services *here, struct verbs_message *message)
{
        const struct v_refuse *refuse = &message->refuse;
        struct datagram_peer *peer;

        if (message->header.kind == V_GRANT && message->grant.slot_kind == V_SLOT_DATAGRAMS) {
                granted(here, message);
                return true;
        }
        if (message->header.kind == V_GROUP) {
                changed(&message->group);
                return true;
        }
        if (message->header.kind != V_REFUSE)
                return false;
        if (refuse->kind == V_DATAGRAM_PEER) {
                peer_refused(refuse->request, passes(refuse->reason));
                group_answered(refuse->request);
        }
        if (refuse->kind == V_GRANT && (peer = peer_with(refuse->number, message->epoch)))
                leave(peer, refuse->number, refuse->reason == REASON_LIMIT);
        return refuse->kind == V_DATAGRAM_PEER || refuse->kind == V_GRANT || refuse->kind == V_GROUP;
}

static const struct datagram_router router = {
    .seek = seek, .join = join, .epoch = epoch_of_socket, .ring = ring, .end = end};

void datagram_slots_start(void)
{
        datagram_router = &router;
}
