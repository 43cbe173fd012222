/* RDMA devices, as the transport `verbs` uses them: libibverbs, the device that is open, and its
 * completion queue.
 *
 * All links share one completion queue, with room for everything that their queue pairs can hold,
 * so it cannot overrun.
 */
#ifndef FREEFLOW_RELAY_VERBS_DEVICE_H
#define FREEFLOW_RELAY_VERBS_DEVICE_H

#include "context.h"
#include "link.h"

#include <infiniband/verbs.h>

enum {
        CHANNELS = 1024,
        QUEUE = 256,   /* work requests in a send queue */
        MESSAGES = 64, /* buffers for SENDs */
        PER_LINK = QUEUE + WINDOW,
};

/* The functions of libibverbs that are used; the others are inline and call the device's own
 * functions. */
#define FUNCTIONS(X)                                                                                         \
        X(struct ibv_device **, get_device_list, (int *))                                                    \
        X(void, free_device_list, (struct ibv_device **))                                                    \
        X(const char *, get_device_name, (struct ibv_device *))                                              \
        X(struct ibv_context *, open_device, (struct ibv_device *))                                          \
        X(int, close_device, (struct ibv_context *))                                                         \
        X(int, get_async_event, (struct ibv_context *, struct ibv_async_event *))                            \
        X(void, ack_async_event, (struct ibv_async_event *))                                                 \
        X(int, query_device, (struct ibv_context *, struct ibv_device_attr *))                               \
        X(int, query_port, (struct ibv_context *, uint8_t, void *))                                          \
        X(int, query_gid, (struct ibv_context *, uint8_t, int, union ibv_gid *))                             \
        X(struct ibv_pd *, alloc_pd, (struct ibv_context *))                                                 \
        X(int, dealloc_pd, (struct ibv_pd *))                                                                \
        X(struct ibv_mr *, reg_mr, (struct ibv_pd *, void *, size_t, int))                                   \
        X(int, dereg_mr, (struct ibv_mr *))                                                                  \
        X(struct ibv_comp_channel *, create_comp_channel, (struct ibv_context *))                            \
        X(int, destroy_comp_channel, (struct ibv_comp_channel *))                                            \
        X(struct ibv_cq *, create_cq, (struct ibv_context *, int, void *, struct ibv_comp_channel *, int))   \
        X(int, resize_cq, (struct ibv_cq *, int))                                                            \
        X(int, destroy_cq, (struct ibv_cq *))                                                                \
        X(int, get_cq_event, (struct ibv_comp_channel *, struct ibv_cq **, void **))                         \
        X(void, ack_cq_events, (struct ibv_cq *, unsigned))                                                  \
        X(struct ibv_qp *, create_qp, (struct ibv_pd *, struct ibv_qp_init_attr *))                          \
        X(int, modify_qp, (struct ibv_qp *, struct ibv_qp_attr *, int))                                      \
        X(int, destroy_qp, (struct ibv_qp *))                                                                \
        X(const char *, wc_status_str, (enum ibv_wc_status))                                                 \
        X(const char *, event_type_str, (enum ibv_event_type))

#define DECLARE(type, name, arguments) type(*name) arguments;
extern struct verbs_functions {
        FUNCTIONS(DECLARE)
} verbs;

/* Exists as long as links or registrations use it. After another one was opened, or the device was
 * removed, the last user frees it. */
struct verbs_device {
        struct watch completions, events;
        unsigned users;
        bool armed, named; /* the completion queue is armed; the device's sysfs entry is visible */
        struct ibv_context *context;
        struct ibv_pd *domain;
        struct ibv_comp_channel *channel;
        struct ibv_cq *queue;
        struct ibv_port_attr port;
        union ibv_gid gid;
        uint8_t port_number;
        uint16_t gid_index;
        unsigned links, capacity; /* of the completion queue, in links */
        int most;                 /* entries that the device allows in it */
};

struct verbs_channel {
        struct verbs_device *device;
        struct link *link; /* NULL: destroyed, but a thread still connects it */
        bool connecting;
        /* messages that arrived before connecting was known to be complete */
        unsigned early_count;
        struct {
                uint32_t buffer, size;
        } early[WINDOW];
        uint32_t number; /* in work request ids */
        struct ibv_qp *pair;
        uint32_t inline_most;
        uint32_t sequence;
        /* WINDOW to receive, MESSAGES to send */
        struct wire_message *buffers;
        struct ibv_mr *region;
        /* Counts of work requests and messages: posted, complete, and posted up to the last
         * signalled one. */
        uint64_t posted, done, sent, sent_done, signalled_posted, signalled_sent;
        /* at batch % QUEUE: `posted` and `sent` after that batch */
        struct {
                uint64_t posted, sent;
        } marks[QUEUE];
        /* the batch that is being made */
        unsigned count;
        struct ibv_send_wr requests[BLOCKS * WRITES + 1];
        struct ibv_sge pieces[BLOCKS * WRITES + 1];
};

extern struct verbs_device *verbs_device;              /* that is open; NULL: none */
extern struct verbs_channel *verbs_channels[CHANNELS]; /* by number */

/* Writes a text that ends with the cause. Returns errno as the call left it, never 0. */
int verbs_fail(char *text, const char *what);
/* Loads libibverbs, once. False, with a text: it can't be used. */
bool verbs_load(char *text);
/* R_OPEN. errno, with a text. */
int verbs_open_device(const struct relay_open *open, uint32_t *mtu, char *text);
void verbs_close_device(void);
/* Ends one use of the device. */
void verbs_put_device(struct verbs_device *d);
/* All links of the device are lost. */
void verbs_all_down(const struct verbs_device *d, int error, const char *text);
uint64_t verbs_tick(uint64_t present);

#endif
