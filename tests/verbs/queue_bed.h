/* What the programs that test queue pairs share: a device with one GID, ends with a queue pair
 * each, and rings for them.
 */
#ifndef FREEFLOW_TEST_QUEUE_BED_H
#define FREEFLOW_TEST_QUEUE_BED_H

#include "../../dataplane/verbs/numbers.h"
#include "../../dataplane/verbs/port.h"
#include "../../dataplane/verbs/queue_pair.h"
#include "connecting.h"
#include "direct_bed.h"
#include "no_router.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

enum { REMOTE_SHIFT = 16, FIRST_NUMBER = 1000, LIMIT = 128 };

/* Two rings, between inaccessible pages, which processes that fork share. */
struct rings {
        struct view views[2];
};

static inline unsigned char *fenced(size_t size)
{
        unsigned char *place =
            mmap(NULL, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        CHECK(place != MAP_FAILED);
        CHECK(mmap(place + PAGE, size, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED);
        return place + PAGE;
}

static inline struct rings new_rings(bool remote)
{
        uint32_t shift = remote ? REMOTE_SHIFT : RING_SHIFT;
        struct rings made;

        for (int i = 0; i < 2; i++)
                made.views[i] =
                    view_of((struct ring *)(void *)fenced(PAGE), fenced((size_t)1 << shift), shift);
        return made;
}

static inline void free_rings(struct rings *rings)
{
        for (int i = 0; i < 2; i++) {
                munmap((unsigned char *)rings->views[i].ring - PAGE, 3 * PAGE);
                munmap(view_bulk(&rings->views[i]) - PAGE, view_size(&rings->views[i]) + 2 * PAGE);
        }
}

static const struct place nowhere;

/* What whoever pairs them without a router has nothing to do for. */

static inline bool ask_again(struct queue_pair *queue)
{
        (void)queue;
        return true;
}

static inline void listen_to_nobody(void)
{
}

static inline void ring(struct queue_pair *queue, struct waiters *waiters)
{
        (void)queue;
        (void)waiters;
}

static inline struct ibv_context *open_device(void)
{
        struct port_place place = {.queue_pairs = 100,
                                   .regions = 1000,
                                   .first = FIRST_NUMBER,
                                   .guid = 1,
                                   .direct_bytes = UINT32_MAX,
                                   .gid = {.raw = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}}};
        struct ibv_device **list;
        struct ibv_context *context;

        port_set(&place);
        list = ibv_get_device_list(NULL);
        CHECK(list[0]);
        context = ibv_open_device(list[0]);
        CHECK(context);
        ibv_free_device_list(list);
        return context;
}

static inline void make_end(struct end *end, struct ibv_context *context, struct ibv_qp_cap cap,
                            bool signal_all)
{
        struct ibv_qp_init_attr wanted = {.cap = cap, .qp_type = IBV_QPT_RC, .sq_sig_all = signal_all};

        end->context = context;
        CHECK((end->pd = ibv_alloc_pd(context)));
        CHECK((end->sent = ibv_create_cq(context, 2 * LIMIT, NULL, NULL, 0)));
        CHECK((end->received = ibv_create_cq(context, 2 * LIMIT, NULL, NULL, 0)));
        wanted.send_cq = end->sent;
        wanted.recv_cq = end->received;
        CHECK((end->qp = ibv_create_qp(end->pd, &wanted)));
}

static inline void destroy_end(struct end *end)
{
        CHECK(!end->qp || ibv_destroy_qp(end->qp) == 0);
        CHECK(ibv_destroy_cq(end->sent) == 0 && ibv_destroy_cq(end->received) == 0);
        CHECK(ibv_dealloc_pd(end->pd) == 0);
}

/* One completion, for which it polls both ends. */
static inline struct ibv_wc wait_for(struct ibv_cq *cq, struct ibv_cq *other)
{
        struct ibv_wc wc;
        time_t end = time(NULL) + 30;

        while (!ibv_poll_cq(cq, 1, &wc)) {
                struct ibv_wc unexpected;

                CHECK(!other || !ibv_poll_cq(other, 0, &unexpected));
                if (other)
                        cq_of(other)->driver ? (void)atomic_load(&cq_of(other)->driver)->poll(cq_of(other))
                                             : (void)0;
                reach_files(NULL);
                CHECK(time(NULL) < end);
        }
        return wc;
}

#endif
