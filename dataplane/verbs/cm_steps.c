#include "cm_steps.h"

#include "client.h"
#include "cm_events.h"
#include "cm_send.h"
#include "cm_table.h"
#include "port.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
        LATE = 2000,     /* ms: how long a device waits for late packets */
        AWAY = 1000,     /* ms: until the router is looked for again */
        FIRST_PAUSE = 2, /* ms */
};

/* --- listeners */

static union ibv_gid gid_of(const struct verbs_gid *from)
{
        union ibv_gid gid;

        memcpy(gid.raw, from->bytes, sizeof gid.raw);
        return gid;
}

/* Is the address that was asked for one of the listener's? One of loopback is for the container
 * alone, though in the kernel it is for all. */
static bool serves(const struct cm_id *listener, const union cm_address *asked, const union ibv_gid *asker)
{
        const union cm_address *own = &listener->source;
        uint32_t place;
        bool same = own->any.sa_family == asked->any.sa_family;
        union ibv_gid one = cm_address_gid(own), other = cm_address_gid(asked);

        if (cm_address_is_loopback(own))
                return same && port_find(asker, &place);
        if (cm_address_is_any(own))
                return same || (own->any.sa_family == AF_INET6 && !listener->only_family);
        return same && !memcmp(&one, &other, sizeof one);
}

/* The connection that the peer has asked for; NULL: there is none of this number. */
static struct cm_id *asked_for(uint32_t connection)
{
        for (struct cm_id *id = cm_id_from(0); id; id = cm_id_from(id->place + 1))
                if (id->answers && id->connection == connection)
                        return id;
        return NULL;
}

static void fill_new(struct cm_id *id, const struct v_connection *request)
{
        id->state = CM_CONNECT;
        id->stage = request->step == V_STEP_RESOLVE ? CM_RESOLVE_ASKED : CM_ASKED;
        id->gid = (int)request->gid_index;
        id->peer.gid = gid_of(&request->peer_gid);
        id->connection = request->connection;
        id->answers = true;
        id->peer.qpn = request->qpn;
        id->peer.psn = request->psn;
        /* What one may ask for at once the other has to answer. */
        id->responder_resources = request->initiator_depth;
        id->initiator_depth = request->responder_resources;
        id->retry = request->retry;
        id->rnr_retry = request->rnr_retry;
}

/* A request for a listener. Returns 0, or why it is refused. */
static uint32_t ask(struct cm_id *listener, const struct v_connection *request)
{
        bool datagrams = request->step == V_STEP_RESOLVE;
        uint32_t nobody = datagrams ? CM_RESOLVE_UNSUPPORTED : CM_REJECT_NO_SERVICE;
        union cm_address asked;
        struct cm_event *event;
        union ibv_gid gid, asker = gid_of(&request->peer_gid);
        struct cm_id *id;

        if (!listener || listener->state != CM_LISTEN || listener->space != request->space ||
            (listener->type == IBV_QPT_UD) != datagrams || !port_gid(request->gid_index, &gid))
                return nobody;
        asked = cm_address_of(&gid, cm_address_port(&listener->source));
        if (!serves(listener, &asked, &asker))
                return nobody;
        /* Over its backlog nobody is told anything: the peer asks again. */
        if (!listener->backlog || asked_for(request->connection))
                return 0;
        event = cm_event_new(listener, CM_EVENT_REQUEST, 0);
        id = event ? cm_id_new(NULL, listener->space, listener->type) : NULL;
        if (!id) {
                free(event);
                return 0;
        }
        fill_new(id, request);
        id->source = asked;
        id->target = cm_address_of(&id->peer.gid, (uint16_t)request->from_port);
        id->qkey = listener->qkey;
        cm_event_request(event, id, request);
        listener->backlog--;
        cm_event_put(event);
        return 0;
}

/* --- the steps of a connection */

enum { KNOWN_PORTS = 8 };

/* To whom this process was connected. */
static struct known_port {
        union ibv_gid gid;
        uint16_t space, port;
} known_ports[KNOWN_PORTS];

static bool is_known(const struct known_port *wanted)
{
        for (int i = 0; i < KNOWN_PORTS; i++)
                if (!memcmp(&known_ports[i], wanted, sizeof *wanted))
                        return true;
        return false;
}

static struct known_port port_of(const struct cm_id *id)
{
        return (struct known_port){
            .gid = cm_address_gid(&id->target), .space = id->space, .port = cm_address_port(&id->target)};
}

static void remember(const struct cm_id *id)
{
        static uint32_t next;
        struct known_port port = port_of(id);

        if (!is_known(&port))
                known_ports[next++ % KNOWN_PORTS] = port;
}

uint64_t cm_grace(const struct cm_id *id)
{
        enum { GRACE = 250, LONGER = 2000 };
        struct known_port port = port_of(id);

        return is_known(&port) ? LONGER : GRACE;
}

/* Programs that listen, end that and listen again, or that tell others of a port just before they
 * listen there, rely on a device that listens within microseconds; here the router has to be told.
 * So who is told that nobody listens asks again for a moment before the program hears of it. True:
 * it does. */
static bool asks_again(struct cm_id *id)
{
        if (!id->sent || cm_now() >= id->patient_until)
                return false;
        id->tries++;
        id->pause = id->pause ? id->pause * 2 : FIRST_PAUSE;
        cm_set_deadline(id, id->pause);
        return true;
}

static void replied(struct cm_id *id, const struct v_connection *reply)
{
        struct cm_event *event;

        if (id->stage == CM_ESTABLISHED)
                cm_send_step(id, V_STEP_READY);
        if (id->stage != CM_REQUESTED)
                return;
        cm_quiet(id);
        remember(id);
        id->stage = CM_ANSWERED;
        id->connection = reply->connection;
        /* Who was asked may have another address. */
        id->peer.gid = gid_of(&reply->peer_gid);
        cm_told(id);
        id->peer.qpn = reply->qpn;
        id->peer.psn = reply->psn;
        id->responder_resources = reply->initiator_depth;
        id->initiator_depth = reply->responder_resources;
        id->rnr_retry = reply->rnr_retry;
        event = cm_event_new(id, CM_EVENT_REPLY, 0);
        if (event) {
                cm_event_reply(event, reply);
                cm_event_put(event);
        }
}

void cm_establish(struct cm_id *id)
{
        cm_quiet(id);
        id->stage = CM_ESTABLISHED;
        cm_event_tell(id, CM_EVENT_ESTABLISHED, 0);
}

static void rejected(struct cm_id *id, const struct v_connection *reject)
{
        struct cm_event *event;

        if (id->stage < CM_REQUESTED || id->stage > CM_ANSWERED)
                return;
        if (id->stage == CM_REQUESTED && reject->reject == CM_REJECT_NO_SERVICE && asks_again(id))
                return;
        cm_quiet(id);
        id->stage = CM_ENDED;
        event = cm_event_new(id, CM_EVENT_REJECTED, (int)reject->reject);
        if (event) {
                cm_event_reject(event, reject);
                cm_event_put(event);
        }
}

/* The program hears of it once. */
static void tell_disconnected(struct cm_id *id, int status)
{
        if (id->state != CM_CONNECT)
                return;
        id->state = CM_DISCONNECT;
        cm_event_tell(id, CM_EVENT_DISCONNECTED, status);
}

void cm_late(struct cm_id *id)
{
        cm_quiet(id);
        id->stage = CM_WAITING;
        cm_set_deadline(id, LATE);
}

static void disconnected(struct cm_id *id)
{
        switch (id->stage) {
        case CM_REPLIED:
        case CM_ANSWERED:
        case CM_ESTABLISHED:
        case CM_LEAVING:
                cm_quiet(id);
                id->stage = CM_LEFT;
                tell_disconnected(id, 0);
                break;
        case CM_WAITING:
                cm_send_step(id, V_STEP_DISCONNECTED);
                break;
        default:
                break;
        }
}

static void resolved(struct cm_id *id, const struct v_connection *answer)
{
        struct cm_event *event;

        if (id->stage != CM_RESOLVING || (answer->reject == CM_RESOLVE_UNSUPPORTED && asks_again(id)))
                return;
        cm_quiet(id);
        id->stage = CM_ENDED;
        event = cm_event_new(id, answer->reject ? CM_EVENT_UNREACHABLE : CM_EVENT_ESTABLISHED,
                             (int)answer->reject);
        if (!answer->reject) {
                remember(id);
                id->peer.qpn = answer->qpn;
                id->qkey = answer->qkey;
        }
        if (event) {
                cm_event_resolved(event, id, answer);
                cm_event_put(event);
        }
}

/* Whom a step is for. The router doesn't know an id until it has answered. */
static struct cm_id *receiver_of(const struct v_connection *message)
{
        return message->id ? cm_id_of(message->id) : asked_for(message->connection);
}

static void step(const struct v_connection *message)
{
        struct cm_id *id = receiver_of(message);
        uint32_t refused;

        if (message->step == V_STEP_REQUEST || message->step == V_STEP_RESOLVE) {
                refused = ask(id, message);
                if (refused)
                        cm_refuse(message, refused);
        } else if (!id) {
                return;
        } else if (message->step == V_STEP_REPLY) {
                replied(id, message);
        } else if (message->step == V_STEP_READY && id->stage == CM_REPLIED) {
                cm_establish(id);
        } else if (message->step == V_STEP_REJECT) {
                rejected(id, message);
        } else if (message->step == V_STEP_DISCONNECT) {
                disconnected(id);
        } else if (message->step == V_STEP_DISCONNECTED &&
                   (id->stage == CM_LEAVING || id->stage == CM_LEFT)) {
                cm_late(id);
                tell_disconnected(id, 0);
        } else if (message->step == V_STEP_RESOLVED) {
                resolved(id, message);
        }
}

/* --- answers of the router */

static int error_of(uint32_t reason)
{
        switch (reason) {
        case REASON_LIMIT:
        case REASON_MEMORY:
                return -ENOMEM;
        case REASON_OFF:
        case REASON_FOREIGN:
                return -EADDRNOTAVAIL;
        default:
                return -EADDRINUSE;
        }
}

_Atomic uint32_t cm_answers;

static void answered(struct cm_id *id)
{
        id->asks = false;
        atomic_fetch_add(&cm_answers, 1);
        sys_3(SYS_futex, &cm_answers, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

static void listening(const struct v_listen *answer)
{
        struct cm_id *id = cm_id_of(answer->id);

        if (!id || !id->asks)
                return;
        answered(id);
        id->registered = true;
        cm_address_set_port(&id->source, (uint16_t)answer->port);
}

/* Of a connection: it can't be, or not any more. */
static void given_up(struct cm_id *id)
{
        switch (id->stage) {
        case CM_REQUESTED:
        case CM_REPLIED:
        case CM_ANSWERED:
        case CM_RESOLVING:
                cm_quiet(id);
                id->stage = CM_ENDED;
                cm_event_tell(id, CM_EVENT_UNREACHABLE, -ENETUNREACH);
                break;
        case CM_ESTABLISHED:
        case CM_LEAVING:
                cm_late(id);
                tell_disconnected(id, 0);
                break;
        case CM_ASKED:
        case CM_RESOLVE_ASKED:
                id->stage = CM_ENDED;
                break;
        default:
                break;
        }
}

static void refused(const struct v_refuse *answer)
{
        bool listens = answer->kind == V_LISTEN;
        struct cm_id *id = answer->number || listens ? cm_id_of(answer->number) : asked_for(answer->request);

        if (id && listens && id->asks) {
                answered(id);
                id->refused = error_of(answer->reason);
        } else if (id && !listens && answer->reason != REASON_LIMIT) {
                given_up(id);
        }
}

bool cm_handle(const struct verbs_message *message)
{
        bool about_refusal = message->header.kind == V_REFUSE &&
                             (message->refuse.kind == V_LISTEN || message->refuse.kind == V_CONNECTION);

        if (message->header.kind != V_LISTENING && message->header.kind != V_CONNECTION && !about_refusal)
                return false;
        mutex_take(&cm_mutex);
        if (message->header.kind == V_CONNECTION)
                step(&message->connection);
        else if (about_refusal)
                refused(&message->refuse);
        else
                listening(&message->listening);
        mutex_release(&cm_mutex);
        return true;
}

/* --- the end */

/* Tell the peer what the kernel tells it when an id is destroyed. */
static void leave_peer(struct cm_id *id)
{
        switch (id->stage) {
        case CM_REQUESTED:
                cm_send_reject(id, CM_REJECT_TIMEOUT);
                break;
        case CM_ASKED:
        case CM_REPLIED:
        case CM_ANSWERED:
                cm_send_reject(id, CM_REJECT_BY_PROGRAM);
                break;
        case CM_ESTABLISHED:
                cm_send_step(id, V_STEP_DISCONNECT);
                break;
        case CM_LEFT:
                cm_send_step(id, V_STEP_DISCONNECTED);
                break;
        case CM_RESOLVE_ASKED: {
                struct v_connection answer = cm_step(id, V_STEP_RESOLVED);

                answer.reject = CM_RESOLVE_REJECTED;
                cm_send(&answer);
                break;
        }
        default:
                break;
        }
}

static void free_id(struct cm_id *id)
{
        leave_peer(id);
        if (id->registered || id->asks)
                cm_send_listen_end(id);
        cm_id_free(id);
}

void cm_end(struct cm_id *id)
{
        struct cm_event *event;
        struct cm_group *group;

        while ((event = cm_event_withdraw(id, NULL))) {
                if (event->asking)
                        free_id(event->asking);
                free(event);
        }
        while (id->type == IBV_QPT_UD && (group = cm_group_of(id)))
                cm_group_free(group);
        free_id(id);
}

/* --- times */

static void reached(struct cm_id *id)
{
        enum cm_stage stage = id->stage;

        id->deadline = 0;
        if (id->sent && id->tries) {
                struct v_connection message = *id->sent;
                uint32_t tries = id->tries - 1;

                cm_send_until_answered(id, &message);
                id->tries = tries;
                return;
        }
        cm_quiet(id);
        if (stage == CM_WAITING) {
                id->stage = CM_ENDED;
                cm_event_tell(id, CM_EVENT_LATE_OVER, 0);
        } else if (stage == CM_LEAVING) {
                cm_late(id);
                tell_disconnected(id, -ETIMEDOUT);
        } else if (stage == CM_REQUESTED || stage == CM_REPLIED || stage == CM_RESOLVING) {
                id->stage = CM_ENDED;
                cm_event_tell(id, CM_EVENT_UNREACHABLE, -ETIMEDOUT);
        }
}

static bool is_made(const struct cm_id *id)
{
        return id->stage >= CM_REPLIED && id->stage <= CM_LEAVING;
}

/* Is there one that this socket's router has not been told of, or may have to be? */
static bool has_untold(uint32_t epoch)
{
        for (struct cm_id *id = cm_id_from(0); id; id = cm_id_from(id->place + 1))
                if (id->sent || ((id->registered || is_made(id)) && id->told_by != epoch))
                        return true;
        return false;
}

static void register_all(uint32_t epoch)
{
        for (struct cm_id *id = cm_id_from(0); id; id = cm_id_from(id->place + 1))
                if (id->registered && id->told_by != epoch)
                        cm_send_listen(id);
}

static void resume_all(uint32_t epoch)
{
        for (struct cm_id *id = cm_id_from(0); id; id = cm_id_from(id->place + 1)) {
                if (!is_made(id) || id->told_by == epoch || !cm_told(id))
                        continue;
                cm_send_step(id, V_STEP_RESUME);
                /* What the peer has answered may have been lost. */
                if (id->stage == CM_LEAVING)
                        cm_send_step(id, V_STEP_DISCONNECT);
                else if (id->sent)
                        cm_send(id->sent);
        }
}

/* A router that comes after knows of no listener and no connection. False: it has to be told
 * later. */
static bool register_again(void)
{
        static uint32_t known; /* by this one all are */
        const struct freeflow_services *here = client_services();
        uint32_t epoch = here ? here->epoch() : known;
        bool some;

        if (epoch == known)
                return true;
        mutex_take(&cm_mutex);
        some = has_untold(epoch);
        mutex_release(&cm_mutex);
        if (some && !client_open(0))
                return false;
        mutex_take(&cm_mutex);
        register_all(epoch);
        resume_all(epoch);
        mutex_release(&cm_mutex);
        known = epoch;
        return true;
}

/* Returns ms; -1: never. */
static int turn(void)
{
        uint64_t now = cm_now(), next = 0;

        if (!cm_earliest())
                return -1;
        if (cm_earliest() <= now) {
                for (struct cm_id *id = cm_id_from(0); id; id = cm_id_from(id->place + 1)) {
                        if (id->deadline && id->deadline <= now)
                                reached(id);
                        if (id->deadline && (!next || id->deadline < next))
                                next = id->deadline;
                }
                cm_set_earliest(next);
        }
        if (!cm_earliest())
                return -1;
        return cm_earliest() > now ? (int)(cm_earliest() - now) : 0;
}

int cm_turn(void)
{
        bool told = register_again();
        int next;

        mutex_take(&cm_mutex);
        next = turn();
        mutex_release(&cm_mutex);
        return told || (next >= 0 && next < AWAY) ? next : AWAY;
}
