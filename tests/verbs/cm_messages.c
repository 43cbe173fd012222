/* Random messages of peers, and of a router, for ids in random states, without a router: whatever
 * comes, nothing is read or written but what may be, and no event is told of an id that is gone.
 * Arguments: seconds and a seed.
 */
#include "../../dataplane/verbs/agent.h"
#include "../../dataplane/verbs/client.h"
#include "../../dataplane/verbs/cm_command.h"
#include "../../dataplane/verbs/cm_device.h"
#include "../../dataplane/verbs/cm_send.h"
#include "../../dataplane/verbs/cm_steps.h"
#include "../../dataplane/verbs/cm_table.h"
#include "../../dataplane/verbs/direct_files.h"
#include "../../dataplane/verbs/pair.h"
#include "../../dataplane/verbs/port.h"
#include "../dataplane/check.h"

#include <fcntl.h>
#include <stdlib.h>
#include <time.h>

enum { IDS = 12, CHANNELS = 3, MOST_SAID = 256, PLACES = 64 };

/* --- what the library needs of a router */

static uint32_t sent, passed_on, epoch = 1;

bool client_send(const void *message, size_t size, uint32_t by)
{
        const struct message *header = message;

        CHECK(header->size == size && by == epoch);
        passed_on += header->kind == V_CONNECTION;
        sent++;
        return true;
}

static uint32_t current_epoch(void)
{
        return epoch;
}

const struct freeflow_services *client_services(void)
{
        static const struct freeflow_services services = {.epoch = current_epoch};

        return &services;
}

bool client_epoch(uint32_t *now)
{
        *now = epoch;
        return true;
}

bool client_open(int patience)
{
        (void)patience;
        return true;
}

/* The router gives each port that it is asked for. */
void client_receive(void)
{
        for (uint32_t place = 0; place < PLACES; place++) {
                struct cm_id *id;
                struct verbs_message message = {.listening = {.message = {.kind = V_LISTENING}, .port = 7}};

                mutex_take(&cm_mutex);
                id = cm_id_from(place);
                message.listening.id = id && id->asks ? id->number : 0;
                mutex_release(&cm_mutex);
                if (message.listening.id)
                        cm_handle(&message);
        }
}

int client_descriptor(void)
{
        return -1;
}

void client_serve(const struct client_user *user)
{
        (void)user;
}

bool agent_start(void)
{
        return true;
}

void agent_visit(int (*turn)(void))
{
        (void)turn;
}

void pair_start(void)
{
}

void direct_files_start(void)
{
}

/* --- the program */

static uint64_t state;
static int channels[CHANNELS];
static uint64_t answers[512];

static int channel(void)
{
        return channels[any(&state, CHANNELS)];
}

static void command(int fd, uint32_t cmd, void *in, size_t size)
{
        struct {
                struct rdma_ucm_cmd_hdr header;
                char bytes[512];
        } buffer = {.header = {.cmd = cmd, .in = (uint16_t)size, .out = sizeof answers}};

        memcpy(buffer.bytes, in, size);
        cm_write(fd, &buffer, sizeof buffer.header + size);
}

#define ANSWERS ((uintptr_t)answers)

static struct {
        uint32_t id;
        int fd;
} known[IDS];

/* Of a channel; the program knows a few, and destroys one for each new one. */
static void know(uint32_t id, int fd)
{
        uint64_t i = any(&state, IDS);
        struct rdma_ucm_destroy_id wanted = {.id = known[i].id, .response = ANSWERS};

        if (known[i].fd)
                command(known[i].fd, RDMA_USER_CM_CMD_DESTROY_ID, &wanted, sizeof wanted);
        known[i].id = id;
        known[i].fd = fd;
}

/* An id goes one step on, if it can. */
static void act(void)
{
        uint64_t which = any(&state, IDS);
        uint32_t id = known[which].id;
        struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        int fd = any(&state, 20) && known[which].fd ? known[which].fd : channel();

        switch (any(&state, 12)) {
        case 0: {
                struct rdma_ucm_create_id wanted = {
                    .response = ANSWERS, .uid = 1, .ps = any(&state, 3) ? RDMA_PS_TCP : RDMA_PS_UDP};

                command(fd, RDMA_USER_CM_CMD_CREATE_ID, &wanted, sizeof wanted);
                know((uint32_t)answers[0], fd);
                break;
        }
        case 1: {
                struct rdma_ucm_listen wanted = {.id = id, .backlog = 3};

                command(fd, RDMA_USER_CM_CMD_LISTEN, &wanted, sizeof wanted);
                break;
        }
        case 2: {
                struct rdma_ucm_resolve_ip wanted = {.id = id};

                memcpy(&wanted.dst_addr, &own, sizeof own);
                command(fd, RDMA_USER_CM_CMD_RESOLVE_IP, &wanted, sizeof wanted);
                break;
        }
        case 3: {
                struct rdma_ucm_resolve_route wanted = {.id = id};

                command(fd, RDMA_USER_CM_CMD_RESOLVE_ROUTE, &wanted, sizeof wanted);
                break;
        }
        case 4: {
                struct rdma_ucm_connect wanted = {.id = id, .conn_param.valid = 1};

                command(fd, RDMA_USER_CM_CMD_CONNECT, &wanted, sizeof wanted);
                break;
        }
        case 5: {
                struct rdma_ucm_accept wanted = {.id = id, .uid = 1, .conn_param.valid = any(&state, 2)};

                command(fd, RDMA_USER_CM_CMD_ACCEPT, &wanted, sizeof wanted);
                break;
        }
        case 6: {
                struct rdma_ucm_disconnect wanted = {.id = id};

                command(fd, RDMA_USER_CM_CMD_DISCONNECT, &wanted, sizeof wanted);
                break;
        }
        case 7: {
                struct rdma_ucm_notify wanted = {.id = id, .event = IBV_EVENT_COMM_EST};

                command(fd, RDMA_USER_CM_CMD_NOTIFY, &wanted, sizeof wanted);
                break;
        }
        case 8: {
                struct rdma_ucm_init_qp_attr wanted = {
                    .id = id, .response = ANSWERS, .qp_state = (uint32_t)any(&state, 8)};

                command(fd, RDMA_USER_CM_CMD_INIT_QP_ATTR, &wanted, sizeof wanted);
                break;
        }
        case 9: {
                struct rdma_ucm_migrate_id wanted = {.id = id, .response = ANSWERS, .fd = (uint32_t)fd};
                int to = channel();

                command(to, RDMA_USER_CM_CMD_MIGRATE_ID, &wanted, sizeof wanted);
                if (known[which].fd == fd)
                        known[which].fd = to;
                break;
        }
        default: {
                struct rdma_ucm_reject wanted = {.id = id};

                if (!any(&state, 4))
                        command(fd, RDMA_USER_CM_CMD_REJECT, &wanted, sizeof wanted);
                break;
        }
        }
}

static void read_events(void)
{
        struct rdma_ucm_get_event wanted = {.response = ANSWERS};

        for (int i = 0; i < CHANNELS; i++)
                for (;;) {
                        struct rdma_ucm_event_resp *event = (void *)answers;

                        event->event = UINT32_MAX;
                        command(channels[i], RDMA_USER_CM_CMD_GET_EVENT, &wanted, sizeof wanted);
                        if (event->event == UINT32_MAX)
                                break;
                        CHECK(event->uid == 1 && event->event <= CM_EVENT_LATE_OVER);
                        CHECK(event->param.conn.private_data_len < MOST_SAID);
                        if (event->event == CM_EVENT_REQUEST)
                                know(event->id, channels[i]);
                }
}

/* --- the peer */

static uint32_t number(void)
{
        struct cm_id *id = cm_id_from(known[any(&state, IDS)].id);

        return any(&state, 8) ? (id ? id->number : 0) : (uint32_t)any(&state, UINT32_MAX);
}

static void say(void)
{
        struct verbs_message message = {.reason = 0};
        struct v_connection *step = &message.connection;

        for (size_t i = 0; i < sizeof *step; i++)
                ((uint8_t *)step)[i] = (uint8_t)any(&state, 256);
        step->message = (struct message){.kind = V_CONNECTION, .size = sizeof *step};
        mutex_take(&cm_mutex);
        step->id = any(&state, 4) ? number() : 0;
        mutex_release(&cm_mutex);
        /* Most connections should come far. */
        step->step = (uint32_t)any(&state, any(&state, 4) ? V_STEP_READY + 1 : V_STEP_RESUME + 2);
        step->connection = (uint32_t)any(&state, 16);
        if (any(&state, 8)) {
                step->gid_index = (uint32_t)any(&state, 2);
                step->space = any(&state, 3) ? RDMA_PS_TCP : RDMA_PS_UDP;
                step->reject = (uint32_t)any(&state, 9);
        }
        if (!any(&state, 8)) {
                message.refuse.message.kind = V_REFUSE;
                message.refuse.kind = any(&state, 2) ? V_LISTEN : V_CONNECTION;
                message.refuse.number = step->id;
                message.refuse.reason = (uint32_t)any(&state, 17);
        }
        CHECK(cm_handle(&message));
}

/* Whatever is due some time is due now; or another router has started. */
static void pass_time(void)
{
        struct cm_id *id;

        mutex_take(&cm_mutex);
        for (id = cm_id_from(0); id; id = cm_id_from(id->place + 1))
                if (id->deadline && any(&state, 2))
                        id->deadline = 1;
        cm_set_earliest(1);
        mutex_release(&cm_mutex);
        epoch += !any(&state, 4);
        cm_turn();
}

/* A request that nobody answers is sent 16 times. */
static void check_silence(void)
{
        struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        struct rdma_ucm_create_id wanted = {.response = ANSWERS, .uid = 1, .ps = RDMA_PS_TCP};
        struct rdma_ucm_resolve_ip resolved = {.id = 0};
        struct rdma_ucm_resolve_route routed = {.id = 0};
        struct rdma_ucm_connect connected = {.conn_param.valid = 1};
        struct rdma_ucm_get_event next = {.response = ANSWERS};
        struct rdma_ucm_event_resp *event = (void *)answers;
        struct rdma_ucm_destroy_id destroyed = {.response = ANSWERS};

        memcpy(&resolved.dst_addr, &own, sizeof own);
        command(channels[0], RDMA_USER_CM_CMD_CREATE_ID, &wanted, sizeof wanted);
        command(channels[0], RDMA_USER_CM_CMD_RESOLVE_IP, &resolved, sizeof resolved);
        command(channels[0], RDMA_USER_CM_CMD_RESOLVE_ROUTE, &routed, sizeof routed);
        command(channels[0], RDMA_USER_CM_CMD_CONNECT, &connected, sizeof connected);
        for (uint32_t times = 1; cm_earliest(); times++) {
                CHECK(passed_on == times && times <= 16);
                cm_id_from(0)->deadline = 1;
                cm_set_earliest(1);
                cm_turn();
        }
        for (int i = 0; i < 3; i++)
                command(channels[0], RDMA_USER_CM_CMD_GET_EVENT, &next, sizeof next);
        CHECK(passed_on == 16 && event->event == CM_EVENT_UNREACHABLE && (int)event->status == -ETIMEDOUT);
        command(channels[0], RDMA_USER_CM_CMD_DESTROY_ID, &destroyed, sizeof destroyed);
}

int main(int count, char **arguments)
{
        struct port_place place = {.index = 0, .queue_pairs = 8, .regions = 8, .first = 1, .guid = 1};
        struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        time_t end;

        CHECK(count == 3);
        end = time(NULL) + atoi(arguments[1]);
        state = seed = strtoull(arguments[2], NULL, 10);
        place.gid = cm_address_gid((union cm_address *)&own);
        port_set(&place);
        for (int i = 0; i < CHANNELS; i++) {
                channels[i] = cm_file_open();
                CHECK(channels[i] >= 0 && fcntl(channels[i], F_SETFL, O_NONBLOCK) == 0);
        }
        check_silence();
        while (time(NULL) < end)
                for (int i = 0; i < 1000; i++) {
                        if (any(&state, 2))
                                act();
                        else
                                say();
                        if (!any(&state, 20))
                                read_events();
                        if (!any(&state, 100))
                                pass_time();
                }
        CHECK(passed_on && sent > passed_on);
        return 0;
}
