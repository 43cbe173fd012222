/* Echoes over queue pairs of rdma_cm. A client whose queue pair breaks says how, and connects
 * again.
 *
 *      reconnecting server PORT
 *      reconnecting client NAME PORT
 *      reconnecting idle NAME PORT
 *
 * A client sends numbered messages, twenty in a second, and checks their echoes; an idle one sends
 * a single message. They print "answered" when the first echo of a connection is there, and how it
 * has ended. A client prints the status of the request that failed first, and the event of the
 * queue pair. An idle one, whose queue pair has no request to fail, waits for rdma_cm's event.
 */
#include "../../dataplane/check.h"

#include <poll.h>
#include <pthread.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>

enum {
        DEPTH = 8,           /* Messages without an echo. */
        ROOM = 2 * DEPTH,    /* Requests of a queue. */
        PAUSE = 50,          /* Milliseconds between two messages. */
        WAITING = 200 * 1000 /* Microseconds before another attempt to connect. */
};

static const struct rdma_conn_param usual = {
    .responder_resources = 1, .initiator_depth = 1, .retry_count = 7, .rnr_retry_count = 7};

struct connection {
        struct rdma_cm_id *id;
        struct ibv_mr *region;
        uint64_t received[ROOM];
};

/* An endpoint, or NULL if there is none, now. */
static struct rdma_cm_id *endpoint(const char *name, const char *port)
{
        struct rdma_addrinfo hints = {.ai_port_space = RDMA_PS_TCP, .ai_flags = name ? 0 : RAI_PASSIVE};
        struct ibv_qp_init_attr wanted = {.cap = {.max_send_wr = ROOM,
                                                  .max_recv_wr = ROOM,
                                                  .max_send_sge = 1,
                                                  .max_recv_sge = 1,
                                                  .max_inline_data = 64},
                                          .sq_sig_all = 1};
        struct rdma_addrinfo *found;
        struct rdma_cm_id *id = NULL;

        if (rdma_getaddrinfo(name ? name : "0.0.0.0", port, &hints, &found))
                return NULL;
        if (rdma_create_ep(&id, found, NULL, &wanted))
                id = NULL;
        rdma_freeaddrinfo(found);
        return id;
}

static bool receive(struct connection *connection, uint64_t *into)
{
        return rdma_post_recv(connection->id, into, into, sizeof *into, connection->region) == 0;
}

static bool prepare(struct connection *connection)
{
        connection->region = rdma_reg_msgs(connection->id, connection->received, sizeof connection->received);
        for (int i = 0; connection->region && i < ROOM; i++) {
                if (!receive(connection, &connection->received[i]))
                        return false;
        }
        return connection->region != NULL;
}

static bool send_number(struct connection *connection, uint64_t number)
{
        return rdma_post_send(connection->id, NULL, &number, sizeof number, NULL, IBV_SEND_INLINE) == 0;
}

static void let_go(struct connection *connection)
{
        if (connection->region)
                rdma_dereg_mr(connection->region);
        rdma_destroy_ep(connection->id);
        free(connection);
}

/* --- the server */

static void *serve(void *of)
{
        struct connection *connection = of;
        struct rdma_conn_param parameters = usual;
        struct ibv_wc wc;

        if (prepare(connection) && rdma_accept(connection->id, &parameters) == 0) {
                while (rdma_get_recv_comp(connection->id, &wc) == 1 && wc.status == IBV_WC_SUCCESS) {
                        uint64_t *got = (uint64_t *)(uintptr_t)wc.wr_id;

                        if (!send_number(connection, *got) || !receive(connection, got) ||
                            rdma_get_send_comp(connection->id, &wc) != 1 || wc.status != IBV_WC_SUCCESS)
                                break;
                }
        }
        let_go(connection);
        return NULL;
}

static void listen_at(const char *port)
{
        struct rdma_cm_id *listener = endpoint(NULL, port), *id;

        CHECK(listener && rdma_listen(listener, 16) == 0);
        while (rdma_get_request(listener, &id) == 0) {
                struct connection *connection = calloc(1, sizeof *connection);
                pthread_t thread;

                CHECK(connection);
                connection->id = id;
                CHECK(pthread_create(&thread, NULL, serve, connection) == 0 && pthread_detach(thread) == 0);
        }
        FAIL("no more requests");
}

/* --- a client */

static void say(const char *text)
{
        printf("%s\n", text);
        fflush(stdout);
}

/* Take the completions. Returns the status of the first that failed, or 0. */
static enum ibv_wc_status take(struct connection *connection, uint64_t *echoed)
{
        struct ibv_cq *queues[] = {connection->id->send_cq, connection->id->recv_cq};
        struct ibv_wc wc;

        for (int i = 0; i < 2; i++) {
                while (ibv_poll_cq(queues[i], 1, &wc) > 0) {
                        uint64_t *got = (uint64_t *)(uintptr_t)wc.wr_id;

                        if (wc.status != IBV_WC_SUCCESS)
                                return wc.status;
                        if (!(wc.opcode & IBV_WC_RECV))
                                continue;
                        CHECK(*got == ++*echoed);
                        if (*echoed == 1)
                                say("answered");
                        CHECK(receive(connection, got));
                }
        }
        return IBV_WC_SUCCESS;
}

/* Wait for the event of a queue pair that has broken. */
static const char *event_of(struct ibv_context *context, struct ibv_qp *qp)
{
        struct ibv_async_event event;
        bool own;

        do {
                CHECK(ibv_get_async_event(context, &event) == 0);
                own = event.event_type == IBV_EVENT_QP_FATAL && event.element.qp == qp;
                ibv_ack_async_event(&event);
        } while (!own);
        return ibv_event_type_str(event.event_type);
}

/* Send one message, take its echo, and wait for rdma_cm's event. */
static void rest(struct connection *connection)
{
        struct rdma_cm_event *event;
        uint64_t echoed = 0;

        CHECK(send_number(connection, 1));
        while (!echoed && take(connection, &echoed) == IBV_WC_SUCCESS)
                poll(NULL, 0, PAUSE);
        CHECK(rdma_get_cm_event(connection->id->channel, &event) == 0);
        say(rdma_event_str(event->event));
        rdma_ack_cm_event(event);
}

/* Exchange messages until the queue pair is broken. */
static void exchange(struct connection *connection)
{
        uint64_t sent = 0, echoed = 0;
        enum ibv_wc_status status;

        while ((status = take(connection, &echoed)) == IBV_WC_SUCCESS) {
                if (sent - echoed < DEPTH)
                        CHECK(send_number(connection, ++sent));
                poll(NULL, 0, PAUSE);
        }
        printf("broken: %s, %s\n", ibv_wc_status_str(status),
               event_of(connection->id->verbs, connection->id->qp));
        fflush(stdout);
}

static void ask(const char *name, const char *port, bool idle)
{
        for (;;) {
                struct connection *connection = calloc(1, sizeof *connection);
                struct rdma_conn_param parameters = usual;

                CHECK(connection);
                connection->id = endpoint(name, port);
                if (!connection->id) {
                        free(connection);
                } else {
                        if (prepare(connection) && rdma_connect(connection->id, &parameters) == 0)
                                (idle ? rest : exchange)(connection);
                        let_go(connection);
                }
                usleep(WAITING);
        }
}

int main(int count, char **arguments)
{
        CHECK(count >= 3);
        if (strcmp(arguments[1], "server") == 0)
                listen_at(arguments[2]);
        CHECK(count == 4);
        ask(arguments[2], arguments[3], strcmp(arguments[1], "idle") == 0);
        return 0;
}
