/* A program that writes commands to the device of rdma_cm as librdmacm does, with both ends of each
 * connection in one process: its argument says what to check. 10.0.4.1 is its own address.
 */
#include "../dataplane/check.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <rdma/rdma_user_cm.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define DEVICE "/dev/infiniband/rdma_cm"
#define OWN "10.0.4.1"

enum {
        ADDRESS_RESOLVED = 0,
        ADDRESS_ERROR = 1,
        ROUTE_RESOLVED = 2,
        REQUEST = 4,
        REPLY = 5,
        UNREACHABLE = 7,
        REJECTED = 8,
        ESTABLISHED = 9,
        DISCONNECTED = 10,
        JOINED = 12,
        LATE_OVER = 15,
        IN_FAMILY_OF_IB = 27,
        PATIENCE = 20000, /* ms */
};

/* --- commands */

/* Returns 0 or a negative errno. */
static int command_of(int fd, uint32_t cmd, const void *in, size_t size, size_t out)
{
        char buffer[1024];
        struct rdma_ucm_cmd_hdr header = {.cmd = cmd, .in = (uint16_t)size, .out = (uint16_t)out};
        ssize_t done;

        memcpy(buffer, &header, sizeof header);
        memcpy(buffer + sizeof header, in, size);
        done = write(fd, buffer, sizeof header + size);
        if (done < 0)
                return -errno;
        CHECK(done == (ssize_t)(sizeof header + size));
        return 0;
}

#define COMMAND(fd, name, in, out) command_of(fd, RDMA_USER_CM_CMD_##name, &(in), sizeof(in), out)
#define POINTER(to) ((uintptr_t)(to))

static int open_device(void)
{
        int fd = open(DEVICE, O_RDWR | O_CLOEXEC);

        CHECK(fd >= 0);
        return fd;
}

static uint32_t create(int fd, uint64_t uid, uint16_t space)
{
        struct rdma_ucm_create_id_resp created = {.id = 12345};
        struct rdma_ucm_create_id wanted = {.uid = uid, .response = POINTER(&created), .ps = space};

        CHECK(COMMAND(fd, CREATE_ID, wanted, sizeof created) == 0);
        return created.id;
}

/* Returns how many events were reported. */
static uint32_t destroy(int fd, uint32_t id)
{
        struct rdma_ucm_destroy_id_resp destroyed;
        struct rdma_ucm_destroy_id wanted = {.response = POINTER(&destroyed), .id = id};

        CHECK(COMMAND(fd, DESTROY_ID, wanted, sizeof destroyed) == 0);
        return destroyed.events_reported;
}

static struct sockaddr_in6 address(const char *text, uint16_t port)
{
        struct sockaddr_in6 made = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
        struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port)};

        if (inet_pton(AF_INET, text, &four.sin_addr) == 1)
                memcpy(memset(&made, 0, sizeof made), &four, sizeof four);
        else
                CHECK(inet_pton(AF_INET6, text, &made.sin6_addr) == 1);
        return made;
}

static int bind_to(int fd, uint32_t id, const char *text, uint16_t port)
{
        struct rdma_ucm_bind_ip wanted = {.addr = address(text, port), .id = id};

        return COMMAND(fd, BIND_IP, wanted, 0);
}

static int resolve(int fd, uint32_t id, const char *text, uint16_t port)
{
        struct rdma_ucm_resolve_ip wanted = {.dst_addr = address(text, port), .id = id, .timeout_ms = 2000};

        return COMMAND(fd, RESOLVE_IP, wanted, 0);
}

static int resolve_route(int fd, uint32_t id)
{
        struct rdma_ucm_resolve_route wanted = {.id = id, .timeout_ms = 2000};

        return COMMAND(fd, RESOLVE_ROUTE, wanted, 0);
}

static int listen_on(int fd, uint32_t id, uint32_t backlog)
{
        struct rdma_ucm_listen wanted = {.id = id, .backlog = backlog};

        return COMMAND(fd, LISTEN, wanted, 0);
}

static int connect_as(int fd, uint32_t id, const char *said, uint8_t size)
{
        struct rdma_ucm_connect wanted = {.id = id,
                                          .conn_param = {.qp_num = 0x111,
                                                         .private_data_len = size,
                                                         .responder_resources = 3,
                                                         .initiator_depth = 5,
                                                         .retry_count = 6,
                                                         .rnr_retry_count = 7,
                                                         .flow_control = 1,
                                                         .valid = 1}};

        strcpy((char *)wanted.conn_param.private_data, said);
        return COMMAND(fd, CONNECT, wanted, 0);
}

static int accept_as(int fd, uint32_t id, uint64_t uid, const char *said, uint8_t size)
{
        struct rdma_ucm_accept wanted = {.id = id,
                                         .uid = uid,
                                         .conn_param = {.qp_num = 0x222,
                                                        .private_data_len = size,
                                                        .responder_resources = 2,
                                                        .initiator_depth = 1,
                                                        .rnr_retry_count = 4,
                                                        .valid = 1}};

        strcpy((char *)wanted.conn_param.private_data, said);
        return COMMAND(fd, ACCEPT, wanted, 0);
}

static int confirm(int fd, uint32_t id)
{
        struct rdma_ucm_accept wanted = {.id = id};

        return COMMAND(fd, ACCEPT, wanted, 0);
}

static int reject_it(int fd, uint32_t id, const char *said, uint8_t size)
{
        struct rdma_ucm_reject wanted = {.id = id, .private_data_len = size};

        strcpy((char *)wanted.private_data, said);
        return COMMAND(fd, REJECT, wanted, 0);
}

static int disconnect(int fd, uint32_t id)
{
        struct rdma_ucm_disconnect wanted = {.id = id};

        return COMMAND(fd, DISCONNECT, wanted, 0);
}

static int notify(int fd, uint32_t id, uint32_t event)
{
        struct rdma_ucm_notify wanted = {.id = id, .event = event};

        return COMMAND(fd, NOTIFY, wanted, 0);
}

static int attributes(int fd, uint32_t id, uint32_t state, struct ib_uverbs_qp_attr *found)
{
        struct rdma_ucm_init_qp_attr wanted = {.response = POINTER(found), .id = id, .qp_state = state};

        return COMMAND(fd, INIT_QP_ATTR, wanted, sizeof *found);
}

static int set_option(int fd, uint32_t id, uint32_t name, int value, uint32_t size)
{
        struct rdma_ucm_set_option wanted = {
            .optval = POINTER(&value), .id = id, .level = RDMA_OPTION_ID, .optname = name, .optlen = size};

        return COMMAND(fd, SET_OPTION, wanted, 0);
}

static struct rdma_ucm_query_route_resp route(int fd, uint32_t id)
{
        struct rdma_ucm_query_route_resp found;
        struct rdma_ucm_query wanted = {.response = POINTER(&found), .id = id};

        CHECK(COMMAND(fd, QUERY_ROUTE, wanted, sizeof found) == 0);
        return found;
}

/* --- events */

static bool is_ready(int fd, int patience)
{
        struct pollfd source = {.fd = fd, .events = POLLIN};

        return poll(&source, 1, patience) == 1;
}

static int read_event(int fd, struct rdma_ucm_event_resp *event)
{
        struct rdma_ucm_get_event wanted = {.response = POINTER(event)};

        return COMMAND(fd, GET_EVENT, wanted, sizeof *event);
}

/* The next event, which has to be of this kind. */
static struct rdma_ucm_event_resp expect(int fd, uint32_t kind)
{
        struct rdma_ucm_event_resp event = {.event = 0};

        CHECK(is_ready(fd, PATIENCE) && read_event(fd, &event) == 0);
        if (event.event != kind)
                fprintf(stderr, "event %u, status %d, expected %u\n", event.event, (int)event.status, kind);
        CHECK(event.event == kind);
        return event;
}

/* --- ends of connections */

static uint16_t port_of(int fd, uint32_t id)
{
        return ntohs(route(fd, id).src_addr.sin6_port);
}

static uint32_t listener(int fd, uint64_t uid, uint16_t space, uint32_t backlog)
{
        uint32_t id = create(fd, uid, space);

        CHECK(bind_to(fd, id, "0.0.0.0", 0) == 0 && port_of(fd, id));
        CHECK(listen_on(fd, id, backlog) == 0);
        return id;
}

/* One that knows the way to a port. */
static uint32_t traveller(int fd, uint64_t uid, uint16_t space, uint16_t port)
{
        uint32_t id = create(fd, uid, space);

        CHECK(resolve(fd, id, OWN, port) == 0);
        CHECK(expect(fd, ADDRESS_RESOLVED).uid == uid);
        CHECK(resolve_route(fd, id) == 0);
        CHECK(expect(fd, ROUTE_RESOLVED).status == 0);
        return id;
}

struct ends {
        int client_fd, server_fd;
        uint32_t client, listener, server;
};

/* A request that has come. */
static struct ends asked(uint16_t space)
{
        struct ends ends = {.client_fd = open_device(), .server_fd = open_device()};
        struct rdma_ucm_event_resp event;

        ends.listener = listener(ends.server_fd, 1, space, 0);
        ends.client = traveller(ends.client_fd, 2, space, port_of(ends.server_fd, ends.listener));
        CHECK(connect_as(ends.client_fd, ends.client, "hello", 5) == 0);
        event = expect(ends.server_fd, REQUEST);
        CHECK(event.uid == 1 && event.id != ends.listener);
        ends.server = event.id;
        return ends;
}

/* --- the cases */

static void check_file(void)
{
        int fd = open_device(), other = open(DEVICE, O_RDWR | O_NONBLOCK), copy;
        struct rdma_ucm_event_resp event;
        struct stat found;
        uint32_t id;

        CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC && fcntl(other, F_GETFD) == 0);
        CHECK(fstat(fd, &found) == 0 && S_ISCHR(found.st_mode));
        CHECK(stat(DEVICE, &found) == 0 && S_ISCHR(found.st_mode) && access(DEVICE, R_OK | W_OK) == 0);
        CHECK(read_event(other, &event) == -EAGAIN && !is_ready(other, 0));
        id = create(other, 7, RDMA_PS_TCP);
        CHECK(resolve(other, id, OWN, 1) == 0);
        copy = dup(other);
        CHECK(copy >= 0 && fstat(copy, &found) == 0 && S_ISCHR(found.st_mode));
        CHECK(close(other) == 0 && is_ready(copy, 0));
        CHECK(expect(copy, ADDRESS_RESOLVED).uid == 7 && !is_ready(copy, 0));
        CHECK(destroy(copy, id) == 1);
        CHECK(close(copy) == 0 && fstat(copy, &found) == -1 && errno == EBADF);
        CHECK(dup2(fd, copy) == copy && close(fd) == 0);
        id = create(copy, 7, RDMA_PS_TCP);
        CHECK(close(copy) == 0);
        fd = open_device();
        CHECK(create(fd, 7, RDMA_PS_TCP) == id); /* its number was free again */
}

/* Two channels in one epoll. */
static void check_epoll(void)
{
        int epoll = epoll_create1(0), fds[] = {open_device(), open_device()};
        struct epoll_event found;

        for (int i = 0; i < 2; i++) {
                struct epoll_event wanted = {.events = EPOLLIN, .data.fd = fds[i]};

                CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &wanted) == 0);
        }
        CHECK(epoll_wait(epoll, &found, 1, 0) == 0);
        for (int i = 0; i < 2; i++) {
                CHECK(resolve(fds[i], create(fds[i], 1, RDMA_PS_TCP), OWN, 1) == 0);
                CHECK(epoll_wait(epoll, &found, 1, PATIENCE) == 1 && found.data.fd == fds[i]);
                expect(fds[i], ADDRESS_RESOLVED);
                CHECK(epoll_wait(epoll, &found, 1, 0) == 0);
        }
}

static void on_signal(int number)
{
        (void)number;
}

static void check_blocking(void)
{
        int fd = open_device();
        struct sigaction action = {.sa_handler = on_signal};
        struct rdma_ucm_event_resp event;
        uint32_t id = create(fd, 1, RDMA_PS_TCP);
        pid_t child;

        CHECK(sigaction(SIGALRM, &action, NULL) == 0);
        alarm(1);
        CHECK(read_event(fd, &event) == -EINTR);
        CHECK(resolve(fd, id, OWN, 1) == 0);
        child = fork();
        if (!child) {
                /* The channel is its parent's. */
                if (read_event(fd, &event) != -EIO || resolve(fd, id, OWN, 1) != -EIO)
                        _exit(1);
                close(fd);
                _exit(0);
        }
        int status;

        CHECK(waitpid(child, &status, 0) == child && status == 0);
        expect(fd, ADDRESS_RESOLVED);
        CHECK(destroy(fd, id) == 1);
}

/* Each command, with the least and one byte less of what it needs. */
static void check_sizes(void)
{
        static const struct {
                uint32_t cmd;
                size_t in, out;
        } all[] = {
            {RDMA_USER_CM_CMD_CREATE_ID, sizeof(struct rdma_ucm_create_id), 4},
            {RDMA_USER_CM_CMD_DESTROY_ID, sizeof(struct rdma_ucm_destroy_id), 4},
            {RDMA_USER_CM_CMD_BIND_IP, sizeof(struct rdma_ucm_bind_ip), 0},
            {RDMA_USER_CM_CMD_RESOLVE_IP, sizeof(struct rdma_ucm_resolve_ip), 0},
            {RDMA_USER_CM_CMD_RESOLVE_ROUTE, sizeof(struct rdma_ucm_resolve_route), 0},
            {RDMA_USER_CM_CMD_QUERY_ROUTE, sizeof(struct rdma_ucm_query),
             offsetof(struct rdma_ucm_query_route_resp, ibdev_index)},
            {RDMA_USER_CM_CMD_CONNECT, offsetof(struct rdma_ucm_connect, ece), 0},
            {RDMA_USER_CM_CMD_LISTEN, sizeof(struct rdma_ucm_listen), 0},
            {RDMA_USER_CM_CMD_ACCEPT, offsetof(struct rdma_ucm_accept, ece), 0},
            {RDMA_USER_CM_CMD_REJECT, sizeof(struct rdma_ucm_reject), 0},
            {RDMA_USER_CM_CMD_DISCONNECT, sizeof(struct rdma_ucm_disconnect), 0},
            {RDMA_USER_CM_CMD_INIT_QP_ATTR, sizeof(struct rdma_ucm_init_qp_attr),
             sizeof(struct ib_uverbs_qp_attr)},
            {RDMA_USER_CM_CMD_SET_OPTION, sizeof(struct rdma_ucm_set_option), 0},
            {RDMA_USER_CM_CMD_NOTIFY, sizeof(struct rdma_ucm_notify), 0},
            {RDMA_USER_CM_CMD_JOIN_IP_MCAST, sizeof(struct rdma_ucm_join_ip_mcast), 4},
            {RDMA_USER_CM_CMD_LEAVE_MCAST, sizeof(struct rdma_ucm_destroy_id), 4},
            {RDMA_USER_CM_CMD_MIGRATE_ID, sizeof(struct rdma_ucm_migrate_id), 4},
            {RDMA_USER_CM_CMD_QUERY, sizeof(struct rdma_ucm_query), 4},
            {RDMA_USER_CM_CMD_BIND, sizeof(struct rdma_ucm_bind), 0},
            {RDMA_USER_CM_CMD_RESOLVE_ADDR, sizeof(struct rdma_ucm_resolve_addr), 0},
            {RDMA_USER_CM_CMD_JOIN_MCAST, sizeof(struct rdma_ucm_join_mcast), 4},
        };
        struct rdma_ucm_cmd_hdr header = {.cmd = RDMA_USER_CM_CMD_LISTEN, .in = 8};
        char zeros[1024] = {0};
        int fd = open_device();

        for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
                CHECK(command_of(fd, all[i].cmd, zeros, all[i].in - 1, all[i].out) == -EINVAL);
                if (all[i].out && all[i].cmd != RDMA_USER_CM_CMD_QUERY &&
                    all[i].cmd != RDMA_USER_CM_CMD_JOIN_MCAST)
                        CHECK(command_of(fd, all[i].cmd, zeros, all[i].in, all[i].out - 1) == -ENOSPC);
        }
        CHECK(write(fd, &header, 4) == -1 && errno == EINVAL);
        CHECK(write(fd, &header, sizeof header) == -1 && errno == EINVAL);
        CHECK(command_of(fd, RDMA_USER_CM_CMD_JOIN_MCAST + 1, zeros, 8, 0) == -EINVAL);
        CHECK(command_of(fd, UINT32_MAX, zeros, 8, 0) == -EINVAL);
        CHECK(command_of(fd, RDMA_USER_CM_CMD_GET_OPTION, zeros, 8, 0) == -ENOSYS);
}

static void check_ids(void)
{
        int fd = open_device(), other = open_device();
        uint32_t id = create(fd, 1, RDMA_PS_TCP), second = create(fd, 2, RDMA_PS_UDP);
        struct rdma_ucm_create_id wanted = {.uid = 1, .ps = 0x107};
        struct rdma_ucm_query query = {.id = id, .option = 77};
        uint32_t answer[64];

        CHECK(id != second);
        CHECK(listen_on(fd, 60000, 1) == -ENOENT && listen_on(fd, UINT32_MAX, 1) == -ENOENT);
        CHECK(listen_on(other, id, 1) == -EINVAL);
        wanted.response = query.response = POINTER(answer);
        CHECK(COMMAND(fd, CREATE_ID, wanted, 4) == -EINVAL);
        CHECK(COMMAND(fd, QUERY, query, sizeof answer) == -ENOSYS);
        CHECK(destroy(fd, id) == 0 && create(fd, 3, RDMA_PS_TCP) == id);
}

static void check_states(void)
{
        int fd = open_device();
        uint32_t id = create(fd, 1, RDMA_PS_TCP);
        struct ib_uverbs_qp_attr found;

        CHECK(resolve_route(fd, id) == -EINVAL && connect_as(fd, id, "", 0) == -EINVAL);
        CHECK(accept_as(fd, id, 1, "", 0) == -EINVAL && reject_it(fd, id, "", 0) == -EINVAL);
        CHECK(disconnect(fd, id) == -EINVAL && notify(fd, id, IBV_EVENT_COMM_EST) == -EINVAL);
        CHECK(attributes(fd, id, IBV_QPS_INIT, &found) == -EINVAL);
        CHECK(resolve(fd, id, OWN, 1) == 0 && bind_to(fd, id, "0.0.0.0", 0) == -EINVAL);
        expect(fd, ADDRESS_RESOLVED);
        CHECK(resolve(fd, id, OWN, 1) == -EINVAL && connect_as(fd, id, "", 0) == -EINVAL);
        CHECK(listen_on(fd, id, 1) == -EINVAL);
        CHECK(attributes(fd, id, IBV_QPS_INIT, &found) == 0 && !found.qp_access_flags);
        CHECK(found.qp_attr_mask == (IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
        CHECK(found.port_num == 1 && attributes(fd, id, IBV_QPS_RTR, &found) == -EINVAL);
        CHECK(resolve_route(fd, id) == 0 && resolve_route(fd, id) == -EINVAL);
        expect(fd, ROUTE_RESOLVED);
        CHECK(connect_as(fd, id, "a", 57) == -EINVAL);
        CHECK(set_option(fd, id, RDMA_OPTION_ID_TOS, 32, 1) == 0);
        CHECK(set_option(fd, id, RDMA_OPTION_ID_TOS, 32, 4) == -EINVAL);
        CHECK(set_option(fd, id, RDMA_OPTION_ID_ACK_TIMEOUT, 9, 1) == 0);
        CHECK(set_option(fd, id, RDMA_OPTION_ID_AFONLY, 1, 4) == -EINVAL);
        CHECK(set_option(fd, id, 99, 1, 4) == -ENOSYS);
        CHECK(destroy(fd, id) == 2);
}

static void check_addresses(void)
{
        int fd = open_device();
        uint32_t one = create(fd, 1, RDMA_PS_TCP), two = create(fd, 2, RDMA_PS_TCP), three;
        struct rdma_ucm_bind of_ib = {.id = one, .addr_size = 48};
        struct rdma_ucm_query_route_resp found;
        uint16_t port;

        of_ib.addr.ss_family = IN_FAMILY_OF_IB;
        CHECK(COMMAND(fd, BIND, of_ib, 0) == -EAFNOSUPPORT);
        of_ib.addr_size = 47;
        CHECK(COMMAND(fd, BIND, of_ib, 0) == -EINVAL);
        CHECK(bind_to(fd, one, "10.9.9.9", 0) == -EADDRNOTAVAIL);
        CHECK(bind_to(fd, one, OWN, 0) == 0 && (port = port_of(fd, one)));
        found = route(fd, one);
        CHECK(found.node_guid && found.port_num == 1 && found.num_paths == 0);
        CHECK(found.src_addr.sin6_family == AF_INET && found.ib_route[0].sgid[15] == 1);
        CHECK(bind_to(fd, two, OWN, port) == -EADDRINUSE && bind_to(fd, two, "0.0.0.0", 0) == 0);
        CHECK(!route(fd, two).node_guid);
        /* Without an address it is bound to all. */
        three = create(fd, 3, RDMA_PS_TCP);
        CHECK(listen_on(fd, three, 5) == 0 && port_of(fd, three) && listen_on(fd, three, 5) == -EINVAL);
        CHECK(destroy(fd, one) == 0 && destroy(fd, three) == 0);
        one = create(fd, 1, RDMA_PS_TCP);
        CHECK(bind_to(fd, one, OWN, port) == 0); /* it is free again */
        CHECK(resolve(fd, one, "fd00::1", 1) == -EINVAL && resolve(fd, one, OWN, 9) == 0);
        CHECK(expect(fd, ADDRESS_RESOLVED).id == one && resolve_route(fd, one) == 0);
        found = route(fd, one);
        CHECK(found.num_paths == 1 && found.ib_route[0].mtu == IBV_MTU_4096);
        CHECK(found.ib_route[0].dgid[15] == 1 && found.ib_route[0].dgid[10] == 0xff);
        CHECK(ntohs(found.dst_addr.sin6_port) == 9 && ntohs(found.src_addr.sin6_port) == port);
        /* Where no packet can go, or only by another network's address. */
        three = create(fd, 4, RDMA_PS_TCP);
        CHECK(expect(fd, ROUTE_RESOLVED).id == one);
        CHECK(resolve(fd, three, "192.0.2.1", 1) == 0);
        CHECK((int)expect(fd, ADDRESS_ERROR).status < 0);
        CHECK(resolve(fd, three, OWN, 1) == 0 && expect(fd, ADDRESS_RESOLVED).id == three);
        /* Loopback is no address of the device's, and stands for any. */
        one = create(fd, 5, RDMA_PS_TCP);
        CHECK(bind_to(fd, one, "127.0.0.1", 0) == 0 && port_of(fd, one) && !route(fd, one).node_guid);
        CHECK(resolve(fd, one, "127.0.0.9", 1) == 0 && expect(fd, ADDRESS_RESOLVED).id == one);
        CHECK(route(fd, one).ib_route[0].dgid[10] == 0xff && route(fd, one).ib_route[0].dgid[15] == 1);
}

static void check_connection(void)
{
        struct ends ends = asked(RDMA_PS_TCP);
        struct ib_uverbs_qp_attr one, other;
        struct rdma_ucm_query_route_resp found = route(ends.server_fd, ends.server);
        struct rdma_ucm_event_resp event;

        CHECK(found.num_paths == 1 && found.node_guid);
        CHECK(found.dst_addr.sin6_port == route(ends.client_fd, ends.client).src_addr.sin6_port);
        CHECK(attributes(ends.server_fd, ends.server, IBV_QPS_RTR, &one) == 0);
        CHECK(one.dest_qp_num == 0x111 && one.max_dest_rd_atomic == 5 && one.ah_attr.is_global);
        CHECK(accept_as(ends.server_fd, ends.server, 3, "welcome", 197) == -EINVAL);
        CHECK(accept_as(ends.server_fd, ends.server, 3, "welcome", 7) == 0);
        event = expect(ends.client_fd, REPLY);
        CHECK(event.uid == 2 && event.param.conn.qp_num == 0x222);
        CHECK(event.param.conn.responder_resources == 1 && event.param.conn.initiator_depth == 2);
        CHECK(event.param.conn.private_data_len == 196 &&
              !strcmp((char *)event.param.conn.private_data, "welcome"));
        CHECK(attributes(ends.client_fd, ends.client, IBV_QPS_INIT, &one) == 0);
        CHECK(one.qp_access_flags & IBV_ACCESS_REMOTE_READ);
        CHECK(attributes(ends.client_fd, ends.client, IBV_QPS_RTR, &one) == 0);
        CHECK(attributes(ends.server_fd, ends.server, IBV_QPS_RTS, &other) == 0);
        CHECK(one.rq_psn == other.sq_psn && one.dest_qp_num == 0x222 && other.retry_cnt == 6);
        CHECK(other.rnr_retry == 7 && other.max_rd_atomic == 1);
        CHECK(attributes(ends.client_fd, ends.client, IBV_QPS_RTS, &other) == 0 && other.rnr_retry == 4);
        CHECK(attributes(ends.client_fd, ends.client, IBV_QPS_SQD, &other) == -EINVAL);
        CHECK(confirm(ends.client_fd, ends.client) == 0 && confirm(ends.client_fd, ends.client) == -EINVAL);
        CHECK(expect(ends.server_fd, ESTABLISHED).uid == 3);
        CHECK(notify(ends.server_fd, ends.server, IBV_EVENT_COMM_EST) == -EISCONN);
        CHECK(notify(ends.server_fd, ends.server, IBV_EVENT_QP_FATAL) == -EINVAL);
        CHECK(disconnect(ends.client_fd, ends.client) == 0);
        CHECK(expect(ends.server_fd, DISCONNECTED).id == ends.server);
        CHECK(!is_ready(ends.client_fd, 100) && disconnect(ends.server_fd, ends.server) == 0);
        CHECK(expect(ends.client_fd, DISCONNECTED).status == 0);
        expect(ends.client_fd, LATE_OVER);
        expect(ends.server_fd, LATE_OVER);
        /* A request counts for the listener. */
        CHECK(destroy(ends.server_fd, ends.server) == 3);
        CHECK(destroy(ends.server_fd, ends.listener) == 1 && destroy(ends.client_fd, ends.client) == 5);
}

/* The side that the peer's READY has not reached hears of it from its queue pair. */
static void check_notify(void)
{
        struct ends ends = asked(RDMA_PS_TCP);

        CHECK(notify(ends.server_fd, ends.server, IBV_EVENT_COMM_EST) == -EINVAL);
        CHECK(accept_as(ends.server_fd, ends.server, 3, "", 0) == 0);
        CHECK(notify(ends.server_fd, ends.server, IBV_EVENT_COMM_EST) == 0);
        CHECK(expect(ends.server_fd, ESTABLISHED).uid == 3);
        expect(ends.client_fd, REPLY);
        CHECK(confirm(ends.client_fd, ends.client) == 0 && !is_ready(ends.server_fd, 100));
        /* Destroyed, it disconnects. */
        CHECK(destroy(ends.client_fd, ends.client) == 3);
        expect(ends.server_fd, DISCONNECTED);
}

static void check_rejection(void)
{
        struct ends ends = asked(RDMA_PS_TCP), second;
        struct rdma_ucm_event_resp event;
        uint16_t port = port_of(ends.server_fd, ends.listener);
        uint32_t id;

        CHECK(reject_it(ends.server_fd, ends.server, "no", 149) == -EINVAL);
        CHECK(reject_it(ends.server_fd, ends.server, "no", 2) == 0);
        event = expect(ends.client_fd, REJECTED);
        CHECK(event.status == 28 && event.param.conn.private_data_len == 148);
        CHECK(!strcmp((char *)event.param.conn.private_data, "no"));
        CHECK(accept_as(ends.server_fd, ends.server, 3, "", 0) == -EINVAL);
        /* Nobody listens. */
        CHECK(destroy(ends.server_fd, ends.listener) == 1);
        id = traveller(ends.client_fd, 4, RDMA_PS_TCP, port);
        CHECK(connect_as(ends.client_fd, id, "", 0) == 0);
        event = expect(ends.client_fd, REJECTED);
        CHECK(event.uid == 4 && event.status == 8);
        /* Who asks gives up; who was asked notices when it answers. */
        second = asked(RDMA_PS_TCP);
        CHECK(destroy(second.client_fd, second.client) == 2);
        CHECK(create(second.client_fd, 5, RDMA_PS_TCP) == second.client && usleep(200000) == 0);
        CHECK(accept_as(second.server_fd, second.server, 6, "", 0) == -EINVAL);
        CHECK(!is_ready(second.server_fd, 0) && !is_ready(second.client_fd, 0));
        /* The listener ends, with a request that nobody has read. */
        id = traveller(second.client_fd, 7, RDMA_PS_TCP, port_of(second.server_fd, second.listener));
        CHECK(connect_as(second.client_fd, id, "", 0) == 0 && is_ready(second.server_fd, PATIENCE));
        CHECK(destroy(second.server_fd, second.listener) == 1);
        CHECK(expect(second.client_fd, REJECTED).status == 28 && !is_ready(second.server_fd, 0));
}

/* Requests over the backlog are not seen until there is room; then they come again. */
static void check_backlog(void)
{
        int client = open_device(), server = open_device();
        uint32_t id = listener(server, 1, RDMA_PS_TCP, 1);
        uint32_t first = traveller(client, 2, RDMA_PS_TCP, port_of(server, id));
        uint32_t second = traveller(client, 3, RDMA_PS_TCP, port_of(server, id));
        struct rdma_ucm_event_resp event;

        CHECK(connect_as(client, first, "one", 3) == 0 && is_ready(server, PATIENCE));
        CHECK(connect_as(client, second, "two", 3) == 0 && usleep(200000) == 0);
        event = expect(server, REQUEST);
        CHECK(!strcmp((char *)event.param.conn.private_data, "one") && !is_ready(server, 100));
        CHECK(accept_as(server, event.id, 4, "", 0) == 0);
        expect(client, REPLY);
        event = expect(server, REQUEST);
        CHECK(!strcmp((char *)event.param.conn.private_data, "two"));
        CHECK(reject_it(server, event.id, "", 0) == 0 && expect(client, REJECTED).uid == 3);
}

static void check_migration(void)
{
        struct ends ends = asked(RDMA_PS_TCP);
        int third = open_device();
        struct rdma_ucm_migrate_resp moved = {.events_reported = 99};
        struct rdma_ucm_migrate_id wanted = {
            .response = POINTER(&moved), .id = ends.client, .fd = (uint32_t)ends.client_fd};

        CHECK(accept_as(ends.server_fd, ends.server, 3, "", 0) == 0 && is_ready(ends.client_fd, PATIENCE));
        CHECK(COMMAND(third, MIGRATE_ID, wanted, sizeof moved) == 0 && moved.events_reported == 2);
        CHECK(!is_ready(ends.client_fd, 0) && is_ready(third, 0));
        CHECK(confirm(ends.client_fd, ends.client) == -EINVAL);
        expect(third, REPLY);
        CHECK(close(ends.client_fd) == 0 && confirm(third, ends.client) == 0);
        expect(ends.server_fd, ESTABLISHED);
        wanted.fd = 0;
        CHECK(COMMAND(third, MIGRATE_ID, wanted, sizeof moved) == -ENOENT);
        /* A channel that is closed takes its connections along. */
        CHECK(close(third) == 0);
        expect(ends.server_fd, DISCONNECTED);
}

static void check_datagrams(void)
{
        struct ends ends = asked(RDMA_PS_UDP), second;
        struct rdma_ucm_event_resp event;
        struct ib_uverbs_qp_attr found;
        uint32_t id;

        CHECK(attributes(ends.server_fd, ends.server, IBV_QPS_INIT, &found) == 0);
        CHECK(found.qkey == 0x01234567 && found.qp_attr_mask & IBV_QP_QKEY);
        CHECK(accept_as(ends.server_fd, ends.server, 3, "here", 4) == 0);
        event = expect(ends.client_fd, ESTABLISHED);
        CHECK(event.param.ud.qp_num == 0x222 && event.param.ud.qkey == 0x01234567);
        CHECK(event.param.ud.ah_attr.is_global && event.param.ud.ah_attr.grh.dgid[15] == 1);
        CHECK(event.param.ud.private_data_len == 136 && !strcmp((char *)event.param.ud.private_data, "here"));
        CHECK(destroy(ends.server_fd, ends.server) == 0 && !is_ready(ends.client_fd, 100));
        second = asked(RDMA_PS_UDP);
        CHECK(reject_it(second.server_fd, second.server, "", 0) == 0);
        CHECK(expect(second.client_fd, UNREACHABLE).status == 2);
        id = traveller(second.client_fd, 5, RDMA_PS_UDP, 1);
        CHECK(connect_as(second.client_fd, id, "", 0) == 0);
        CHECK(expect(second.client_fd, UNREACHABLE).status == 1);
}

static void check_groups(void)
{
        int fd = open_device();
        uint32_t id = create(fd, 1, RDMA_PS_UDP), wrong = create(fd, 2, RDMA_PS_TCP);
        struct rdma_ucm_create_id_resp joined = {.id = 99};
        struct rdma_ucm_destroy_id_resp left;
        struct rdma_ucm_join_ip_mcast wanted = {
            .response = POINTER(&joined), .uid = 7, .addr = address("239.1.2.3", 0), .id = id};
        struct rdma_ucm_destroy_id leave = {.response = POINTER(&left)};
        struct rdma_ucm_event_resp event;

        CHECK(COMMAND(fd, JOIN_IP_MCAST, wanted, 4) == -EINVAL); /* it has no device */
        CHECK(bind_to(fd, id, OWN, 0) == 0 && bind_to(fd, wrong, OWN, 0) == 0);
        wanted.id = wrong;
        CHECK(COMMAND(fd, JOIN_IP_MCAST, wanted, 4) == -EINVAL);
        wanted.id = id;
        CHECK(COMMAND(fd, JOIN_IP_MCAST, wanted, 4) == 0);
        event = expect(fd, JOINED);
        CHECK(event.uid == 7 && event.id == joined.id && event.param.ud.qp_num == 0xffffff);
        CHECK(event.param.ud.ah_attr.grh.dgid[12] == 239 && event.param.ud.ah_attr.grh.dgid[11] == 0xff);
        leave.id = joined.id;
        CHECK(COMMAND(fd, LEAVE_MCAST, leave, 4) == 0 && left.events_reported == 1);
        CHECK(COMMAND(fd, LEAVE_MCAST, leave, 4) == -ENOENT);
        CHECK(COMMAND(fd, JOIN_IP_MCAST, wanted, 4) == 0);
        leave.id = joined.id;
        CHECK(COMMAND(fd, LEAVE_MCAST, leave, 4) == 0 && left.events_reported == 0 && !is_ready(fd, 0));
        CHECK(COMMAND(fd, JOIN_IP_MCAST, wanted, 4) == 0 && destroy(fd, id) == 1 && !is_ready(fd, 0));
        /* No route leads to this one. */
        id = create(fd, 3, RDMA_PS_UDP);
        CHECK(resolve(fd, id, "225.1.2.3", 0) == 0 && expect(fd, ADDRESS_RESOLVED).id == id);
}

/* Commands of random kinds and sizes, with random bytes in them but for pointers. */
static void check_random(void)
{
        int fds[] = {open(DEVICE, O_RDWR | O_NONBLOCK), open(DEVICE, O_RDWR | O_NONBLOCK)};
        static uint64_t answers[512];
        uint64_t state = seed;

        for (int round = 0; round < 30000; round++) {
                uint64_t in[64];
                uint32_t cmd = (uint32_t)any(&state, RDMA_USER_CM_CMD_JOIN_MCAST + 2);
                uint32_t *words = (uint32_t *)in;

                for (size_t i = 0; i < sizeof in / sizeof *in; i++)
                        in[i] = any(&state, 4) ? any(&state, 8) : any(&state, UINT64_MAX);
                /* Where pointers are. */
                if (cmd != RDMA_USER_CM_CMD_ACCEPT)
                        in[0] = any(&state, 8) ? POINTER(answers) : 0;
                if (cmd == RDMA_USER_CM_CMD_CREATE_ID) {
                        in[1] = POINTER(answers);
                        words[4] = any(&state, 2) ? RDMA_PS_TCP : RDMA_PS_UDP;
                }
                if (cmd == RDMA_USER_CM_CMD_RESOLVE_IP || cmd == RDMA_USER_CM_CMD_BIND ||
                    cmd == RDMA_USER_CM_CMD_LISTEN || cmd == RDMA_USER_CM_CMD_RESOLVE_ROUTE ||
                    cmd == RDMA_USER_CM_CMD_RESOLVE_ADDR || cmd == RDMA_USER_CM_CMD_NOTIFY)
                        words[0] = (uint32_t)any(&state, 8);
                if (cmd == RDMA_USER_CM_CMD_SET_OPTION)
                        words[5] = (uint32_t)any(&state, sizeof answers);
                command_of(fds[any(&state, 2)], cmd, in, any(&state, sizeof in),
                           any(&state, 2) ? sizeof answers : any(&state, 400));
        }
}

/* --- threads against each other */

static int race_server;
static uint16_t race_port;
static _Atomic bool race_over;
static _Atomic uint32_t race_made;

/* Accepts some, rejects some, and destroys others as they are. */
static void *serve(void *argument)
{
        uint64_t state = seed;

        (void)argument;
        while (!race_over) {
                struct rdma_ucm_event_resp event = {.event = 0};

                if (!is_ready(race_server, 100) || read_event(race_server, &event))
                        continue;
                if (event.event == REQUEST) {
                        uint64_t what = any(&state, 8);

                        if (what == 0 && reject_it(race_server, event.id, "no", 2) == 0)
                                destroy(race_server, event.id);
                        else if (what == 1 || accept_as(race_server, event.id, 100 + event.id, "yes", 3))
                                destroy(race_server, event.id);
                } else if (event.event == DISCONNECTED || event.event == REJECTED) {
                        if (any(&state, 2))
                                disconnect(race_server, event.id);
                        destroy(race_server, event.id);
                }
        }
        return NULL;
}

/* Connects again and again, and gives up at any moment. */
static void *ask(void *argument)
{
        uint64_t state = seed + POINTER(argument);
        struct rdma_ucm_event_resp event;
        int fd = open_device();

        while (!race_over) {
                uint32_t id = traveller(fd, 1 + POINTER(argument), RDMA_PS_TCP, race_port);
                bool waits = any(&state, 4);

                CHECK(connect_as(fd, id, "hello", 5) == 0);
                if (waits && is_ready(fd, PATIENCE) && read_event(fd, &event) == 0 && event.event == REPLY &&
                    confirm(fd, id) == 0) {
                        race_made++;
                        if (any(&state, 2))
                                CHECK(disconnect(fd, id) == 0);
                }
                if (!any(&state, 8)) {
                        close(fd);
                        fd = open_device();
                } else {
                        destroy(fd, id);
                }
                CHECK(!is_ready(fd, 0));
        }
        close(fd);
        return NULL;
}

static void check_race(void)
{
        enum { ASKERS = 3, SECONDS = 2 };
        pthread_t threads[ASKERS + 1];
        uint32_t id;

        race_server = open_device();
        id = listener(race_server, 1, RDMA_PS_TCP, 0);
        race_port = port_of(race_server, id);
        for (uintptr_t i = 0; i <= ASKERS; i++)
                CHECK(pthread_create(&threads[i], NULL, i ? ask : serve, (void *)i) == 0);
        sleep(SECONDS);
        race_over = true;
        for (int i = 0; i <= ASKERS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(race_made > 10);
}

/* A peer in another process, which says when it is connected and then waits. */
static void check_peer(const char *port)
{
        int fd = open_device();
        uint32_t id;

        if (atoi(port)) {
                id = traveller(fd, 2, RDMA_PS_TCP, (uint16_t)atoi(port));
                CHECK(connect_as(fd, id, "", 0) == 0);
                expect(fd, REPLY);
                CHECK(confirm(fd, id) == 0);
                CHECK(write(1, "connected\n", 10) == 10);
                pause();
        }
        id = listener(fd, 1, RDMA_PS_TCP, 0);
        printf("%u\n", port_of(fd, id));
        fflush(stdout);
        id = expect(fd, REQUEST).id;
        CHECK(accept_as(fd, id, 3, "", 0) == 0);
        expect(fd, ESTABLISHED);
        puts("established");
        fflush(stdout);
        expect(fd, DISCONNECTED);
        CHECK(disconnect(fd, id) == 0 && destroy(fd, id) == 2);
}

int main(int count, char **arguments)
{
        static const struct {
                const char *name;
                void (*check)(void);
        } cases[] = {
            {"file", check_file},
            {"epoll", check_epoll},
            {"blocking", check_blocking},
            {"sizes", check_sizes},
            {"ids", check_ids},
            {"states", check_states},
            {"addresses", check_addresses},
            {"connection", check_connection},
            {"notify", check_notify},
            {"rejection", check_rejection},
            {"backlog", check_backlog},
            {"migration", check_migration},
            {"datagrams", check_datagrams},
            {"groups", check_groups},
            {"random", check_random},
            {"race", check_race},
        };
        struct ibv_device **(*list)(int *) = dlsym(RTLD_DEFAULT, "ibv_get_device_list");
        int number = 0;

        CHECK(open(DEVICE, O_RDWR) == -1 && errno == ENOENT);
        CHECK(list && list(&number) && number == 1);
        if (count == 3 && !strcmp(arguments[1], "peer"))
                check_peer(arguments[2]);
        seed = count == 3 ? strtoull(arguments[2], NULL, 10) : 0;
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
                if (count > 1 && !strcmp(arguments[1], cases[i].name))
                        cases[i].check();
        return 0;
}
