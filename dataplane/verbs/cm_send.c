#include "cm_send.h"

#include "agent.h"
#include "client.h"
#include "monotonic.h"

#include <stdlib.h>
#include <string.h>

/* As the kernel's for an answer of the peer: 4.096 us << 20, and 15 times more. */
enum { ANSWER = 4295 /* ms */, TRIES = 15 };

static uint64_t earliest;

struct v_connection cm_step(const struct cm_id *id, uint32_t step)
{
        struct v_connection message = {
            .message = {.kind = V_CONNECTION, .size = sizeof message},
            .step = step,
            .id = id->number,
            .connection = id->connection,
            /* A router that has started since has numbered them anew. */
            .gid_index = (uint32_t)cm_address_place(&id->source),
            .space = id->space,
            .port = cm_address_port(&id->target),
            .from_port = cm_address_port(&id->source),
            .qpn = id->qpn,
            .type = id->type,
            .psn = id->psn,
            .responder_resources = id->responder_resources,
            .initiator_depth = id->initiator_depth,
            .retry = id->retry,
            .rnr_retry = id->rnr_retry,
        };

        memcpy(message.peer_gid.bytes, id->peer.gid.raw, sizeof message.peer_gid.bytes);
        return message;
}

void cm_step_private(struct v_connection *message, const void *data, size_t size)
{
        message->private_size = (uint16_t)size;
        memcpy(message->private_data, data, size);
}

static bool tell(const void *message, size_t size)
{
        uint32_t epoch;

        return client_epoch(&epoch) && client_send(message, size, epoch);
}

bool cm_send(const struct v_connection *message)
{
        return tell(message, sizeof *message);
}

void cm_send_step(const struct cm_id *id, uint32_t step)
{
        struct v_connection message = cm_step(id, step);

        cm_send(&message);
}

void cm_send_reject(const struct cm_id *id, uint32_t reason)
{
        struct v_connection message = cm_step(id, V_STEP_REJECT);

        message.reject = reason;
        cm_send(&message);
}

void cm_refuse(const struct v_connection *request, uint32_t reason)
{
        struct v_connection message = {
            .message = {.kind = V_CONNECTION, .size = sizeof message},
            .step = request->step == V_STEP_RESOLVE ? V_STEP_RESOLVED : V_STEP_REJECT,
            .connection = request->connection,
            .gid_index = request->gid_index,
            .space = request->space,
            .port = request->port,
            .reject = reason,
            .peer_gid = request->peer_gid,
        };

        cm_send(&message);
}

bool cm_told(struct cm_id *id)
{
        return client_epoch(&id->told_by);
}

/* What stands for any address of a family. Of IPv6 it is 0, and means all of both unless the
 * program says that it isn't to. */
static union ibv_gid any_of(const struct cm_id *id)
{
        static const union cm_address four = {.any.sa_family = AF_INET};
        union ibv_gid gid = {.raw = {0}};

        if (id->source.any.sa_family != AF_INET6)
                return cm_address_gid(&four);
        gid.raw[15] = id->only_family || cm_address_is_loopback(&id->source);
        return gid;
}

bool cm_send_listen(struct cm_id *id)
{
        struct v_listen message = {
            .message = {.kind = V_LISTEN, .size = sizeof message},
            .id = id->number,
            .space = id->space,
            .port = cm_address_port(&id->source),
            .backlog = id->state == CM_LISTEN ? CM_BACKLOG : 0,
            .reuse = id->reuse,
        };
        union ibv_gid gid = cm_address_is_any(&id->source) ? any_of(id) : cm_address_gid(&id->source);

        memcpy(message.gid.bytes, gid.raw, sizeof message.gid.bytes);
        return cm_told(id) && tell(&message, sizeof message);
}

void cm_send_listen_end(const struct cm_id *id)
{
        struct v_end message = {.message = {.kind = V_LISTEN_END, .size = sizeof message},
                                .number = id->number};

        tell(&message, sizeof message);
}

/* --- times */

uint64_t cm_now(void)
{
        return monotonic() / 1000000;
}

void cm_set_deadline(struct cm_id *id, uint64_t after)
{
        id->deadline = cm_now() + after;
        if (earliest && earliest <= id->deadline)
                return;
        earliest = id->deadline;
        agent_start();
}

bool cm_send_until_answered(struct cm_id *id, const struct v_connection *message)
{
        if (!id->sent)
                id->sent = calloc(1, sizeof *id->sent);
        if (!id->sent)
                return false;
        *id->sent = *message;
        id->tries = TRIES;
        cm_send(message);
        cm_set_deadline(id, ANSWER);
        return true;
}

void cm_quiet(struct cm_id *id)
{
        free(id->sent);
        id->sent = NULL;
        id->deadline = 0;
}

uint64_t cm_earliest(void)
{
        return earliest;
}

void cm_set_earliest(uint64_t time)
{
        earliest = time;
}
