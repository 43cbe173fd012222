/* Completion queues, completion channels and asynchronous events through the functions that
 * programs call, on a device without queue pairs.
 *
 *      notify rules
 *      notify race SECONDS SEED
 *
 * race: threads put completions into several queues of one channel, while other queues of it come
 * and go with events that nobody has read. Other threads sleep in the channel, arm and poll as
 * programs do, before and after they have read the event. A sleep that nobody ends is an event that
 * was lost: the exit code is 1.
 */
#include "../../dataplane/verbs/cq.h"
#include "../../dataplane/verbs/files.h"
#include "../../dataplane/verbs/opened.h"
#include "../../dataplane/verbs/opening.h"
#include "../../dataplane/verbs/port.h"
#include "../dataplane/check.h"
#include "no_router.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { QUEUES = 3, SENDERS = 2, SLEEPERS = 2, LIMIT = 64, PATIENCE = 20 };

static struct ibv_context *context;

static bool put(struct ibv_cq *cq, uint64_t number, bool solicited, bool polling)
{
        struct ibv_wc completion = {.wr_id = number, .opcode = IBV_WC_RECV, .byte_len = 7, .qp_num = 9};

        return cq_put(cq_of(cq), &completion, solicited, polling);
}

/* --- rules */

static bool is_readable(int fd)
{
        struct pollfd one = {.fd = fd, .events = POLLIN};

        return poll(&one, 1, 0) == 1;
}

static void never_wait(int fd)
{
        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
}

static union ibv_gid gid_with(uint8_t last)
{
        return (union ibv_gid){.raw = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = last}};
}

static bool set_gid(uint32_t index, union ibv_gid gid)
{
        struct port_place place = {
            .index = index, .queue_pairs = 100, .regions = 1 << 30, .guid = 0x1122334455667788, .gid = gid};

        return port_set(&place);
}

/* The only device; NULL: there is none. */
static struct ibv_device *find_device(void)
{
        int count = -1;
        struct ibv_device **list = ibv_get_device_list(&count), *found = list[0];

        CHECK(count == (found ? 1 : 0) && (!found || !list[1]));
        ibv_free_device_list(list);
        return found;
}

static void open_device(void)
{
        struct ibv_device *device;

        CHECK(!find_device());
        CHECK(set_gid(0, gid_with(1)) && !set_gid(0, gid_with(1)));
        device = find_device();
        CHECK(device && strcmp(ibv_get_device_name(device), "freeflow0") == 0);
        CHECK(ibv_get_device_guid(device) == htobe64(0x1122334455667788));
        CHECK(ibv_get_device_index(device) == 0);
        context = ibv_open_device(device);
        CHECK(context && context->device == device);
        never_wait(context->async_fd);
}

int ibv_query_port_speed(struct ibv_context *context, uint32_t number, uint64_t *speed);

static void check_attributes(void)
{
        struct {
                struct ibv_device_attr_ex extended;
                uint64_t more[8];
        } attributes;
        struct ibv_query_device_ex_input unknown = {.comp_mask = 1};
        struct ibv_port_attr port;
        uint64_t speed;

        memset(&attributes, 0xaa, sizeof attributes);
        CHECK(verbs_get_ctx(context)->query_device_ex(context, NULL, &attributes.extended,
                                                      sizeof attributes) == 0);
        CHECK(attributes.extended.phys_port_cnt_ex == 1 && attributes.extended.orig_attr.phys_port_cnt == 1);
        CHECK(attributes.extended.orig_attr.max_qp == 100); /* the router's, as it is the lower one */
        CHECK(attributes.extended.orig_attr.max_mr == MOST_REGIONS);
        CHECK(attributes.extended.orig_attr.node_guid == htobe64(0x1122334455667788));
        CHECK(!attributes.more[0] && !attributes.more[7]);
        CHECK(ibv_query_device_ex(context, &unknown, &attributes.extended) == EINVAL);
        /* A program that knows fewer fields. */
        memset(&attributes, 0xaa, sizeof attributes);
        CHECK(verbs_get_ctx(context)->query_device_ex(context, NULL, &attributes.extended,
                                                      sizeof attributes.extended.orig_attr) == 0);
        CHECK(attributes.extended.comp_mask == 0xaaaaaaaa);
        CHECK(ibv_query_device(context, &attributes.extended.orig_attr) == 0);
        CHECK(attributes.extended.comp_mask == 0xaaaaaaaa);

        memset(&port, 0xaa, sizeof port);
        CHECK(ibv_query_port(context, 1, &port) == 0 && port.state == IBV_PORT_ACTIVE);
        CHECK(port.link_layer == IBV_LINK_LAYER_ETHERNET && !port.lid && port.pkey_tbl_len == 1);
        CHECK(!port.port_cap_flags2);
        CHECK(ibv_query_port(context, 2, &port) == EINVAL && ibv_query_port(context, 0, &port) == EINVAL);
        CHECK(ibv_query_port_speed(context, 1, &speed) == 0 && speed == 1000);
        CHECK(ibv_query_port_speed(context, 2, &speed) == EINVAL);
#undef ibv_query_port
        memset(&port, 0xaa, sizeof port);
        CHECK(ibv_query_port(context, 1, (struct _compat_ibv_port_attr *)&port) == 0);
        CHECK(port.link_layer == IBV_LINK_LAYER_ETHERNET && port.port_cap_flags2 == 0xaaaa);
}

static void check_gids(void)
{
        struct ibv_gid_entry entries[2];
        union ibv_gid gid, one = gid_with(1), two = {.raw = {0x20, 1, 0xd, 0xb8, [15] = 2}};
        __be16 pkey;

        CHECK(set_gid(5, two) && !set_gid(PORT_GIDS, two));
        CHECK(ibv_query_gid(context, 1, 0, &gid) == 0 && !memcmp(&gid, &one, sizeof gid));
        CHECK(ibv_query_gid(context, 1, 1, &gid) == 0 && !gid.global.interface_id);
        CHECK(ibv_query_gid(context, 1, -1, &gid) == -1 && errno == EINVAL);
        CHECK(ibv_query_gid(context, 1, PORT_GIDS, &gid) == -1 && ibv_query_gid(context, 2, 0, &gid) == -1);
        CHECK(ibv_query_gid_ex(context, 1, 5, entries, 0) == 0 && entries[0].gid_index == 5);
        CHECK(entries[0].gid_type == IBV_GID_TYPE_ROCE_V2 && !entries[0].ndev_ifindex);
        CHECK(ibv_query_gid_ex(context, 1, 1, entries, 0) == ENODATA);
        CHECK(ibv_query_gid_ex(context, 1, PORT_GIDS, entries, 0) == EINVAL);
        CHECK(ibv_query_gid_ex(context, 1, 0, entries, 1) == EOPNOTSUPP);
        CHECK(ibv_query_gid_table(context, entries, 1, 0) == -EINVAL);
        CHECK(ibv_query_gid_table(context, entries, 0, 0) == -EINVAL);
        CHECK(ibv_query_gid_table(context, entries, 2, 1) == -EOPNOTSUPP);
        CHECK(ibv_query_gid_table(context, entries, 2, 0) == 2);
        CHECK(entries[0].gid_index == 0 && entries[1].gid_index == 5);
        /* 127.0.0.1 is the address of the first interface. */
        CHECK(!memcmp(&entries[1].gid, &two, sizeof two) && entries[0].ndev_ifindex == 1);
        CHECK(ibv_query_pkey(context, 1, 0, &pkey) == 0 && pkey == 0xffff);
        CHECK(ibv_query_pkey(context, 1, 1, &pkey) == -1 && ibv_get_pkey_index(context, 1, pkey) == 0);
        CHECK(ibv_get_pkey_index(context, 1, 1) == -1);
}

int ibv_read_sysfs_file(const char *folder, const char *file, char *text, size_t size);

/* A file of the device says this; NULL: there is none. */
static void check_file(const char *file, const char *says)
{
        char text[FILE_TEXT];
        int length = ibv_read_sysfs_file(context->device->ibdev_path, file, text, sizeof text);

        if (!says ? length >= 0 : (length != (int)strlen(says) || strcmp(text, says)))
                FAIL(file);
}

/* The device's files say what its attributes say. */
static void check_files(void)
{
        char text[FILE_TEXT];
        struct ibv_device_attr device;

        CHECK(ibv_query_device(context, &device) == 0);
        check_file("fw_ver", device.fw_ver);
        check_file("node_guid", "1122:3344:5566:7788");
        check_file("node_type", "1: CA");
        check_file("ports/1/state", "4: ACTIVE");
        check_file("ports/1/link_layer", "Ethernet");
        check_file("ports/1/cap_mask", "0x04010000");
        check_file("ports/1/pkeys/0", "0xffff");
        check_file("ports/1/gids/0", "0000:0000:0000:0000:0000:ffff:7f00:0001");
        check_file("ports/1/gids/1", "0000:0000:0000:0000:0000:0000:0000:0000");
        check_file("ports/1/gids/5", "2001:0db8:0000:0000:0000:0000:0000:0002");
        check_file("ports/1/gid_attrs/types/5", "RoCE v2");
        check_file("ports/1/gid_attrs/ndevs/0", "lo");
        check_file("ports/1/gids/127", "0000:0000:0000:0000:0000:0000:0000:0000");
        /* Nobody has the address, and nobody has these files. */
        check_file("ports/1/gid_attrs/ndevs/5", NULL);
        check_file("ports/1/gid_attrs/types/1", NULL);
        check_file("ports/1/gids/128", NULL);
        check_file("ports/1/gids/05", NULL);
        check_file("ports/1/gids/4294967296", NULL);
        check_file("ports/1/gids/", NULL);
        check_file("ports/1/gids/-1", NULL);
        check_file("ports/2/state", NULL);
        check_file("board_id", NULL);
        CHECK(ibv_read_sysfs_file(SYSFS_VERBS, "ibdev", text, sizeof text) == 9);
        CHECK(!strcmp(text, context->device->name));
        CHECK(ibv_read_sysfs_file(context->device->ibdev_path, "fw_ver", text, 2) == 2);
}

static void check_wishes(void)
{
        struct ibv_cq_init_attr_ex wanted = {.cqe = 10, .wc_flags = IBV_WC_STANDARD_FLAGS};
        struct ibv_modify_cq_attr change = {.attr_mask = IBV_CQ_ATTR_MODERATE};
        struct ibv_cq *cq;

        CHECK(!ibv_create_cq(context, 0, NULL, NULL, 0) && errno == EINVAL);
        CHECK(!ibv_create_cq(context, -1, NULL, NULL, 0) && errno == EINVAL);
        CHECK(!ibv_create_cq(context, MOST_COMPLETIONS + 1, NULL, NULL, 0) && errno == EINVAL);
        CHECK(!ibv_create_cq(context, 1, NULL, NULL, 1) && errno == EINVAL);
        CHECK(!ibv_create_cq(context, 1, NULL, NULL, -1) && errno == EINVAL);
        wanted.wc_flags |= IBV_WC_EX_WITH_COMPLETION_TIMESTAMP;
        CHECK(!ibv_create_cq_ex(context, &wanted) && errno == EOPNOTSUPP);
        wanted.wc_flags = 0;
        wanted.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS;
        wanted.flags = IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN;
        CHECK(!ibv_create_cq_ex(context, &wanted) && errno == EOPNOTSUPP);
        wanted.comp_mask = 1 << 30;
        CHECK(!ibv_create_cq_ex(context, &wanted) && errno == EOPNOTSUPP);

        cq = ibv_create_cq(context, MOST_COMPLETIONS, &wanted, NULL, 0);
        CHECK(cq && cq->cqe == MOST_COMPLETIONS && cq->cq_context == &wanted && cq->context == context);
        CHECK(ibv_resize_cq(cq, 2) == 0 && cq->cqe == 2);
        CHECK(ibv_resize_cq(cq, 0) == EINVAL && ibv_resize_cq(cq, MOST_COMPLETIONS + 1) == EINVAL);
        CHECK(put(cq, 0, false, false) && put(cq, 1, false, false));
        CHECK(ibv_resize_cq(cq, 1) == EINVAL && cq->cqe == 2);
        CHECK(ibv_modify_cq(cq, &change) == 0);
        change.attr_mask = IBV_CQ_ATTR_RESERVED;
        CHECK(ibv_modify_cq(cq, &change) == EOPNOTSUPP);
        CHECK(ibv_poll_cq(cq, 0, NULL) == 0 && ibv_poll_cq(cq, -1, NULL) == 0);
        atomic_fetch_add(&cq_of(cq)->users, 1);
        CHECK(ibv_destroy_cq(cq) == EBUSY);
        atomic_fetch_sub(&cq_of(cq)->users, 1);
        CHECK(ibv_destroy_cq(cq) == 0);
}

static void check_limit(void)
{
        static struct ibv_cq *queues[MOST_QUEUES];

        for (int i = 0; i < MOST_QUEUES; i++)
                CHECK((queues[i] = ibv_create_cq(context, 1, NULL, NULL, 0)));
        for (int i = 0; i < 3; i++)
                CHECK(!ibv_create_cq(context, 1, NULL, NULL, 0) && errno == ENOMEM);
        for (int i = 0; i < MOST_QUEUES; i++)
                CHECK(ibv_destroy_cq(queues[i]) == 0);
}

static uint64_t driven, armed;

/* A driver that has this many completions to put in. */
static bool drive(struct cq *cq)
{
        uint64_t many = driven;

        for (; driven; driven--)
                CHECK(put(&cq->plain, driven, false, true));
        return many;
}

static void note_arming(struct cq *cq)
{
        CHECK(cq->completions.armed);
        armed++;
}

static const struct cq_driver driver = {.poll = drive, .arm = note_arming};

static void check_extended(void)
{
        struct ibv_cq_init_attr_ex wanted = {.cqe = 10, .wc_flags = IBV_WC_STANDARD_FLAGS};
        struct ibv_poll_cq_attr plain = {0}, unknown = {.comp_mask = 1};

        for (int single = 0; single < 2; single++) {
                struct ibv_cq_ex *cq;

                wanted.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD;
                wanted.flags = single ? IBV_CREATE_CQ_ATTR_SINGLE_THREADED : 0;
                cq = ibv_create_cq_ex(context, &wanted);
                CHECK(cq && ibv_start_poll(cq, &plain) == ENOENT && ibv_start_poll(cq, &plain) == ENOENT);
                CHECK(ibv_start_poll(cq, &unknown) == EINVAL);
                CHECK(put(ibv_cq_ex_to_cq(cq), 5, false, false) && put(ibv_cq_ex_to_cq(cq), 6, false, false));
                CHECK(ibv_start_poll(cq, &plain) == 0 && cq->wr_id == 5 && cq->status == IBV_WC_SUCCESS);
                CHECK(ibv_wc_read_opcode(cq) == IBV_WC_RECV && ibv_wc_read_byte_len(cq) == 7);
                CHECK(ibv_wc_read_qp_num(cq) == 9 && !ibv_wc_read_vendor_err(cq));
                CHECK(!ibv_wc_read_imm_data(cq) && !ibv_wc_read_src_qp(cq) && !ibv_wc_read_wc_flags(cq));
                CHECK(!ibv_wc_read_slid(cq) && !ibv_wc_read_sl(cq) && !ibv_wc_read_dlid_path_bits(cq));
                CHECK(ibv_next_poll(cq) == 0 && cq->wr_id == 6);
                CHECK(ibv_next_poll(cq) == ENOENT);
                ibv_end_poll(cq);
                atomic_store(&cq_of(ibv_cq_ex_to_cq(cq))->driver, &driver);
                driven = 1;
                CHECK(ibv_start_poll(cq, &plain) == 0 && cq->wr_id == 1);
                ibv_end_poll(cq);
                CHECK(ibv_start_poll(cq, &plain) == ENOENT);
                CHECK(ibv_destroy_cq(ibv_cq_ex_to_cq(cq)) == 0);
        }
}

static void expect_event(struct ibv_comp_channel *channel, struct ibv_cq *cq)
{
        struct ibv_cq *found = NULL;
        void *of_program = NULL;

        CHECK(is_readable(channel->fd) && ibv_get_cq_event(channel, &found, &of_program) == 0);
        CHECK(found == cq && of_program == cq->cq_context);
}

static void expect_none(struct ibv_comp_channel *channel)
{
        struct ibv_cq *found;
        void *of_program;

        CHECK(!is_readable(channel->fd));
        CHECK(ibv_get_cq_event(channel, &found, &of_program) == -1 && errno == EAGAIN);
}

static void check_channel(void)
{
        struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
        struct ibv_cq *one = ibv_create_cq(context, LIMIT, &seed, channel, 0);
        struct ibv_cq *two = ibv_create_cq(context, LIMIT, &context, channel, 0);
        struct ibv_wc taken[LIMIT];

        CHECK(channel && channel->context == context && one && two && one->channel == channel);
        CHECK(ibv_destroy_comp_channel(channel) == EBUSY);
        never_wait(channel->fd);
        CHECK(put(one, 0, true, false));
        expect_none(channel);
        CHECK(ibv_req_notify_cq(one, 0) == 0 && ibv_req_notify_cq(two, 1) == 0);
        CHECK(put(two, 0, false, false));
        expect_none(channel);
        CHECK(put(two, 1, true, false) && put(one, 1, false, false) && put(one, 2, false, false));
        /* All has been polled when the events are read: they come all the same. */
        CHECK(ibv_poll_cq(one, LIMIT, taken) == 3 && ibv_poll_cq(two, LIMIT, taken) == 2);
        expect_event(channel, two);
        expect_event(channel, one);
        expect_none(channel);
        /* A queue may have several. */
        for (int i = 0; i < 3; i++)
                CHECK(ibv_req_notify_cq(one, 0) == 0 && put(one, 3, false, false));
        CHECK(ibv_req_notify_cq(two, 0) == 0 && put(two, 2, false, false));
        expect_event(channel, one);
        expect_event(channel, two);
        expect_event(channel, one);
        ibv_ack_cq_events(one, 3);
        ibv_ack_cq_events(two, 2);
        /* It takes its events along. */
        CHECK(ibv_destroy_cq(one) == 0);
        expect_none(channel);
        CHECK(ibv_destroy_comp_channel(channel) == EBUSY && ibv_destroy_cq(two) == 0);
        CHECK(ibv_destroy_comp_channel(channel) == 0);
}

/* What a poll executes and doesn't take causes an event. */
static void check_driver(void)
{
        struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
        struct ibv_cq *cq = ibv_create_cq(context, LIMIT, NULL, channel, 0);
        struct ibv_wc taken[LIMIT];

        never_wait(channel->fd);
        atomic_store(&cq_of(cq)->driver, &driver);
        armed = 0;
        CHECK(ibv_req_notify_cq(cq, 0) == 0 && armed == 1);
        driven = 3;
        CHECK(ibv_poll_cq(cq, LIMIT, taken) == 3);
        expect_none(channel);
        driven = 3;
        CHECK(ibv_poll_cq(cq, 2, taken) == 2);
        expect_event(channel, cq);
        expect_none(channel);
        ibv_ack_cq_events(cq, 1);
        CHECK(ibv_destroy_cq(cq) == 0 && ibv_destroy_comp_channel(channel) == 0);
}

static void check_asynchronous(void)
{
        struct ibv_async_event event = {0};
        struct ibv_cq *cq = ibv_create_cq(context, 1, NULL, NULL, 0);

        CHECK(ibv_get_async_event(context, &event) == -1 && errno == EAGAIN);
        CHECK(put(cq, 0, false, false) && !put(cq, 1, false, false));
        opening_tell_gids_changed();
        opening_tell_gids_changed();
        CHECK(is_readable(context->async_fd) && ibv_get_async_event(context, &event) == 0);
        CHECK(event.event_type == IBV_EVENT_CQ_ERR && event.element.cq == cq);
        ibv_ack_async_event(&event);
        CHECK(ibv_get_async_event(context, &event) == 0);
        CHECK(event.event_type == IBV_EVENT_GID_CHANGE && event.element.port_num == 1);
        ibv_ack_async_event(&event);
        CHECK(!is_readable(context->async_fd) && ibv_destroy_cq(cq) == 0);
        /* It takes its event along. */
        cq = ibv_create_cq(context, 1, NULL, NULL, 0);
        CHECK(put(cq, 0, false, false) && !put(cq, 1, false, false) && is_readable(context->async_fd));
        CHECK(ibv_destroy_cq(cq) == 0 && !is_readable(context->async_fd));
        opening_tell_gids_changed();
        CHECK(ibv_get_async_event(context, &event) == 0 && event.event_type == IBV_EVENT_GID_CHANGE);
}

static void *acknowledge_later(void *cq)
{
        usleep(20 * 1000);
        __atomic_store_n(&armed, 1, __ATOMIC_RELAXED);
        ibv_ack_cq_events(cq, 1);
        usleep(20 * 1000);
        __atomic_store_n(&armed, 2, __ATOMIC_RELAXED);
        ibv_ack_async_event(&(struct ibv_async_event){.element.cq = cq, .event_type = IBV_EVENT_CQ_ERR});
        return NULL;
}

/* A queue isn't destroyed before its events are acknowledged. */
static void check_acknowledging(void)
{
        struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
        struct ibv_cq *cq = ibv_create_cq(context, 1, NULL, channel, 0);
        struct ibv_async_event event;
        pthread_t thread;

        CHECK(ibv_req_notify_cq(cq, 0) == 0 && put(cq, 0, false, false) && !put(cq, 0, false, false));
        expect_event(channel, cq);
        CHECK(ibv_get_async_event(context, &event) == 0 && event.element.cq == cq);
        CHECK(pthread_create(&thread, NULL, acknowledge_later, cq) == 0);
        CHECK(ibv_destroy_cq(cq) == 0 && __atomic_load_n(&armed, __ATOMIC_RELAXED) == 2);
        CHECK(pthread_join(thread, NULL) == 0 && ibv_destroy_comp_channel(channel) == 0);
}

static void check_child(struct ibv_comp_channel *channel, struct ibv_cq *cq)
{
        struct ibv_context *own;
        struct ibv_device_attr device;
        struct ibv_async_event event;
        struct ibv_cq *found;
        union ibv_gid gid;
        void *of_program;

        port_forget();
        opening_forget();
        CHECK(!find_device());
        CHECK(ibv_get_cq_event(channel, &found, &of_program) == -1 && errno == EIO);
        CHECK(ibv_get_async_event(context, &event) == -1 && errno == EIO);
        CHECK(!ibv_create_cq(context, 1, NULL, NULL, 0) && errno == EIO);
        CHECK(ibv_req_notify_cq(cq, 0) == EIO && ibv_query_device(context, &device) == EIO);
        CHECK(ibv_poll_cq(cq, 1, &(struct ibv_wc){0}) < 0 && ibv_resize_cq(cq, 5) == EIO);
        CHECK(ibv_query_gid(context, 1, 0, &gid) == -1 && errno == EIO);
        /* What it opens itself it can use. */
        set_gid(0, gid_with(1));
        own = ibv_open_device(find_device());
        CHECK(own && ibv_query_gid(own, 1, 0, &gid) == 0 && ibv_query_device(own, &device) == 0);
        CHECK(ibv_query_gid(context, 1, 0, &gid) == -1 && errno == EIO);
        /* What was the parent's can be freed. */
        CHECK(ibv_destroy_cq(cq) == 0 && ibv_destroy_comp_channel(channel) == 0);
        CHECK(ibv_close_device(context) == 0);
        opening_tell_gids_changed();
        CHECK(ibv_get_async_event(own, &event) == 0 && ibv_close_device(own) == 0);
}

/* A child of fork has nothing that its parent opened, and takes no event of its parent's. */
static void check_fork(void)
{
        struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
        struct ibv_cq *cq = ibv_create_cq(context, 1, NULL, channel, 0);
        int status;
        pid_t child;

        CHECK(ibv_req_notify_cq(cq, 0) == 0 && put(cq, 0, false, false));
        CHECK(ibv_req_notify_cq(cq, 0) == 0);
        child = fork();
        if (child == 0) {
                check_child(channel, cq);
                _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        expect_event(channel, cq);
        ibv_ack_cq_events(cq, 1);
        CHECK(ibv_destroy_cq(cq) == 0 && ibv_destroy_comp_channel(channel) == 0);
}

static void check_port_loss(void)
{
        struct ibv_port_attr port;

        CHECK(set_gid(5, (union ibv_gid){0}) && find_device());
        CHECK(set_gid(0, (union ibv_gid){0}) && !set_gid(0, (union ibv_gid){0}));
        CHECK((ibv_query_port)(context, 1, (struct _compat_ibv_port_attr *)&port) == 0);
        CHECK(port.state == IBV_PORT_DOWN && !find_device());
}

/* --- race */

static struct ibv_comp_channel *channel_of_all;
static struct ibv_cq *queues[QUEUES];
static _Atomic int32_t room[QUEUES]; /* completions that may still be put in */
static _Atomic uint64_t sent, received, taken_by_driver, slept;
static _Atomic bool ends, ended;

static bool reserve(int queue)
{
        if (atomic_fetch_sub(&room[queue], 1) > 0)
                return true;
        atomic_fetch_add(&room[queue], 1);
        return false;
}

static void *send_all(void *argument)
{
        uint64_t random = seed + (uintptr_t)argument;

        while (!atomic_load(&ended)) {
                int queue = (int)any(&random, QUEUES);

                if (atomic_load(&ends) && any(&random, 2))
                        usleep(100);
                if (any(&random, 20) == 0)
                        usleep(any(&random, 50));
                if (!reserve(queue)) {
                        sched_yield();
                        continue;
                }
                atomic_fetch_add(&sent, 1);
                CHECK(put(queues[queue], 1, true, false));
        }
        return NULL;
}

/* Now and then a poll executes something itself. */
static bool drive_at_random(struct cq *cq)
{
        static _Atomic uint64_t state;
        uint64_t random = atomic_fetch_add(&state, 1) ^ seed;
        int queue = 0;

        while (queues[queue] != &cq->plain)
                queue++;
        if (any(&random, 4) || !reserve(queue))
                return false;
        atomic_fetch_add(&sent, 1);
        atomic_fetch_add(&taken_by_driver, 1);
        return put(&cq->plain, 1, true, true);
}

static void do_nothing(struct cq *cq)
{
        (void)cq;
}

static const struct cq_driver at_random = {.poll = drive_at_random, .arm = do_nothing};

static void poll_some(uint64_t *random, int queue, bool all)
{
        struct ibv_wc completions[8];
        int many;

        do {
                many = ibv_poll_cq(queues[queue], 1 + (int)any(random, 8), completions);
                CHECK(many >= 0);
                atomic_fetch_add(&received, (uint64_t)many);
                atomic_fetch_add(&room[queue], many);
        } while (many && all);
}

static void *sleep_and_poll(void *argument)
{
        uint64_t random = ~seed + (uintptr_t)argument;

        while (!atomic_load(&ends)) {
                struct ibv_cq *cq;
                void *of_program;
                int queue;

                if (any(&random, 3) == 0)
                        poll_some(&random, (int)any(&random, QUEUES), any(&random, 2));
                CHECK(ibv_get_cq_event(channel_of_all, &cq, &of_program) == 0);
                ibv_ack_cq_events(cq, 1);
                atomic_fetch_add(&slept, 1);
                if (!of_program)
                        continue; /* of a queue that goes */
                queue = (int)((struct ibv_cq **)of_program - queues);
                if (any(&random, 2))
                        poll_some(&random, queue, any(&random, 2));
                CHECK(ibv_req_notify_cq(queues[queue], (int)any(&random, 2)) == 0);
                poll_some(&random, queue, true);
        }
        return NULL;
}

static void *come_and_go(void *argument)
{
        uint64_t random = seed * 3 + (uintptr_t)argument;

        while (!atomic_load(&ended)) {
                struct ibv_cq *cq = ibv_create_cq(context, 4, NULL, channel_of_all, 0);
                uint64_t events = any(&random, 4);

                CHECK(cq);
                for (uint64_t i = 0; i < events; i++)
                        CHECK(ibv_req_notify_cq(cq, 0) == 0 && put(cq, i, false, false));
                if (any(&random, 4) == 0)
                        sched_yield();
                CHECK(ibv_destroy_cq(cq) == 0);
                usleep(any(&random, 200));
        }
        return NULL;
}

/* Something is received again and again, until `until`. */
static void watch(time_t until)
{
        uint64_t before = 0;
        time_t moved = time(NULL);

        while (time(NULL) < until || !before) {
                usleep(10 * 1000);
                if (atomic_load(&received) != before)
                        moved = time(NULL);
                else if (time(NULL) > moved + PATIENCE)
                        FAIL("an event was lost");
                before = atomic_load(&received);
        }
}

static void race(time_t until)
{
        pthread_t senders[SENDERS], sleepers[SLEEPERS], other;
        uint64_t random = 0;

        channel_of_all = ibv_create_comp_channel(context);
        for (int i = 0; i < QUEUES; i++) {
                CHECK((queues[i] = ibv_create_cq(context, LIMIT, &queues[i], channel_of_all, 0)));
                atomic_store(&room[i], LIMIT);
                CHECK(ibv_req_notify_cq(queues[i], 0) == 0);
                if (i)
                        atomic_store(&cq_of(queues[i])->driver, &at_random);
        }
        for (uintptr_t i = 0; i < SLEEPERS; i++)
                CHECK(pthread_create(&sleepers[i], NULL, sleep_and_poll, (void *)i) == 0);
        for (uintptr_t i = 0; i < SENDERS; i++)
                CHECK(pthread_create(&senders[i], NULL, send_all, (void *)i) == 0);
        CHECK(pthread_create(&other, NULL, come_and_go, NULL) == 0);
        watch(until);
        /* The senders go on until nobody sleeps any more. */
        atomic_store(&ends, true);
        for (int i = 0; i < SLEEPERS; i++)
                CHECK(pthread_join(sleepers[i], NULL) == 0);
        atomic_store(&ended, true);
        for (int i = 0; i < SENDERS; i++)
                CHECK(pthread_join(senders[i], NULL) == 0);
        CHECK(pthread_join(other, NULL) == 0);
        for (int i = 0; i < QUEUES; i++) {
                atomic_store(&cq_of(queues[i])->driver, NULL);
                poll_some(&random, i, true);
                CHECK(ibv_destroy_cq(queues[i]) == 0);
        }
        CHECK(received == sent && slept && taken_by_driver);
        CHECK(ibv_destroy_comp_channel(channel_of_all) == 0);
        printf("received %llu, slept %llu\n", (unsigned long long)received, (unsigned long long)slept);
}

int main(int arguments, char **argument)
{
        bool rules = arguments == 2 && strcmp(argument[1], "rules") == 0;

        if (!rules && arguments != 4)
                return 2;
        open_device();
        if (rules) {
                check_attributes();
                check_gids();
                check_files();
                check_wishes();
                check_limit();
                check_extended();
                check_channel();
                check_driver();
                check_asynchronous();
                check_acknowledging();
                check_fork();
                check_port_loss();
        } else {
                seed = strtoull(argument[3], NULL, 0);
                race(time(NULL) + 1 + atoi(argument[2]));
        }
        return ibv_close_device(context);
}
