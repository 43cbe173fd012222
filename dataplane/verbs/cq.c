#include "cq.h"

#include "opened.h"

#include <errno.h>
#include <stdlib.h>

/* What extended queues say of a completion. */
enum { SAYS = IBV_WC_STANDARD_FLAGS };

static _Atomic uint32_t queues, last_handle;

/* --- completions */

static void tell(struct cq *cq, enum completion_outcome outcome)
{
        if (outcome == COMPLETION_EVENT && cq->plain.channel)
                channel_put(channel_of(cq->plain.channel), &cq->member);
        else if (outcome == COMPLETION_OVERRUN)
                events_put(&opened_of(cq->plain.context)->events, &cq->overrun);
}

bool cq_put(struct cq *cq, const struct ibv_wc *completion, bool solicited, bool polling)
{
        enum completion_outcome outcome;

        outcome = completions_put(&cq->completions, completion, solicited, polling);
        tell(cq, outcome);
        return outcome != COMPLETION_OVERRUN;
}

/* The queue is empty. True: the driver has gone on. */
static bool go_on(struct cq *cq)
{
        const struct cq_driver *driver = atomic_load_explicit(&cq->driver, memory_order_acquire);

        return driver && driver->poll(cq);
}

static void settle(struct cq *cq)
{
        tell(cq, completions_settle(&cq->completions));
}

int cq_poll(struct ibv_cq *plain, int most, struct ibv_wc *completions)
{
        struct cq *cq = cq_of(plain);
        uint32_t wanted = most > 0 ? (uint32_t)most : 0, taken;

        if (opened_is_lost(plain->context))
                return -EIO;
        taken = completions_take(&cq->completions, wanted, completions);
        if (taken || !wanted)
                return (int)taken;
        if (go_on(cq)) {
                taken = completions_take(&cq->completions, wanted, completions);
                settle(cq);
        }
        return (int)taken;
}

int cq_request(struct ibv_cq *plain, int solicited_only)
{
        struct cq *cq = cq_of(plain);
        const struct cq_driver *driver;

        if (opened_is_lost(plain->context))
                return EIO;
        completions_arm(&cq->completions, solicited_only);
        driver = atomic_load_explicit(&cq->driver, memory_order_acquire);
        if (driver)
                driver->arm(cq);
        return 0;
}

/* --- one completion after the other */

/* True: one is there to be read. */
static bool next_one(struct cq *cq)
{
        if (!completions_take(&cq->completions, 1, &cq->now)) {
                if (!go_on(cq))
                        return false;
                cq->settle = true;
                if (!completions_take(&cq->completions, 1, &cq->now))
                        return false;
        }
        cq->extended.wr_id = cq->now.wr_id;
        cq->extended.status = cq->now.status;
        return true;
}

static struct cq *of_extended(struct ibv_cq_ex *extended)
{
        return (struct cq *)extended;
}

static void end_poll(struct ibv_cq_ex *extended)
{
        struct cq *cq = of_extended(extended);

        if (cq->settle) {
                cq->settle = false;
                settle(cq);
        }
        if (!cq->single_threaded)
                mutex_release(&cq->reading);
}

static int start_poll(struct ibv_cq_ex *extended, struct ibv_poll_cq_attr *wanted)
{
        struct cq *cq = of_extended(extended);

        if (wanted->comp_mask)
                return EINVAL;
        if (opened_is_lost(extended->context))
                return EIO;
        if (!cq->single_threaded)
                mutex_take(&cq->reading);
        if (next_one(cq))
                return 0;
        end_poll(extended);
        return ENOENT;
}

static int next_poll(struct ibv_cq_ex *extended)
{
        return next_one(of_extended(extended)) ? 0 : ENOENT;
}

static enum ibv_wc_opcode read_opcode(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.opcode;
}

static uint32_t read_vendor_err(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.vendor_err;
}

static uint32_t read_byte_len(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.byte_len;
}

static __be32 read_imm_data(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.imm_data;
}

static uint32_t read_qp_num(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.qp_num;
}

static uint32_t read_src_qp(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.src_qp;
}

static unsigned int read_wc_flags(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.wc_flags;
}

static uint32_t read_slid(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.slid;
}

static uint8_t read_sl(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.sl;
}

static uint8_t read_dlid_path_bits(struct ibv_cq_ex *extended)
{
        return of_extended(extended)->now.dlid_path_bits;
}

static void extend(struct cq *cq)
{
        struct ibv_cq_ex *extended = &cq->extended;

        extended->start_poll = start_poll;
        extended->next_poll = next_poll;
        extended->end_poll = end_poll;
        extended->read_opcode = read_opcode;
        extended->read_vendor_err = read_vendor_err;
        extended->read_byte_len = read_byte_len;
        extended->read_imm_data = read_imm_data;
        extended->read_qp_num = read_qp_num;
        extended->read_src_qp = read_src_qp;
        extended->read_wc_flags = read_wc_flags;
        extended->read_slid = read_slid;
        extended->read_sl = read_sl;
        extended->read_dlid_path_bits = read_dlid_path_bits;
}

/* --- queues */

/* Why there can't be a queue like this: an errno, or 0. */
static int objection(struct ibv_context *context, const struct ibv_cq_init_attr_ex *wanted)
{
        uint32_t flags = wanted->comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS ? wanted->flags : 0;

        if (wanted->comp_mask & ~(uint32_t)(IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD) ||
            wanted->wc_flags & ~(uint64_t)SAYS || flags & ~(uint32_t)IBV_CREATE_CQ_ATTR_SINGLE_THREADED)
                return EOPNOTSUPP;
        if (!wanted->cqe || wanted->cqe > MOST_COMPLETIONS ||
            wanted->comp_vector >= (uint32_t)context->num_comp_vectors)
                return EINVAL;
        return opened_is_lost(context) ? EIO : 0;
}

static void attach(struct cq *cq, struct ibv_context *context, const struct ibv_cq_init_attr_ex *wanted)
{
        cq->plain.context = context;
        cq->plain.channel = wanted->channel;
        cq->plain.cq_context = wanted->cq_context;
        cq->plain.handle = atomic_fetch_add_explicit(&last_handle, 1, memory_order_relaxed) + 1;
        cq->plain.cqe = (int)wanted->cqe;
        cq->member.queue = &cq->plain;
        cq->overrun.what.element.cq = &cq->plain;
        cq->overrun.what.event_type = IBV_EVENT_CQ_ERR;
        if (wanted->channel)
                channel_join(channel_of(wanted->channel));
}

static struct cq *create(struct ibv_context *context, const struct ibv_cq_init_attr_ex *wanted)
{
        int refused = objection(context, wanted);
        struct cq *cq = NULL;

        if (refused) {
                errno = refused;
                return NULL;
        }
        if (atomic_fetch_add_explicit(&queues, 1, memory_order_relaxed) < MOST_QUEUES)
                cq = calloc(1, sizeof *cq);
        if (cq && completions_start(&cq->completions, wanted->cqe)) {
                attach(cq, context, wanted);
                return cq;
        }
        free(cq);
        atomic_fetch_sub_explicit(&queues, 1, memory_order_relaxed);
        errno = ENOMEM;
        return NULL;
}

VERB struct ibv_cq *ibv_create_cq(struct ibv_context *context, int entries, void *of_program,
                                  struct ibv_comp_channel *channel, int vector)
{
        struct ibv_cq_init_attr_ex wanted = {
            .cqe = entries > 0 ? (uint32_t)entries : 0,
            .cq_context = of_program,
            .channel = channel,
            .comp_vector = (uint32_t)vector,
        };
        struct cq *cq = create(context, &wanted);

        return cq ? &cq->plain : NULL;
}

struct ibv_cq_ex *cq_create_extended(struct ibv_context *context, struct ibv_cq_init_attr_ex *wanted)
{
        struct cq *cq = create(context, wanted);

        if (!cq)
                return NULL;
        cq->single_threaded = wanted->comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS &&
                              wanted->flags & IBV_CREATE_CQ_ATTR_SINGLE_THREADED;
        extend(cq);
        return &cq->extended;
}

VERB int ibv_destroy_cq(struct ibv_cq *plain)
{
        struct cq *cq = cq_of(plain);

        if (atomic_load_explicit(&cq->users, memory_order_acquire))
                return EBUSY;
        if (!opened_is_lost(plain->context)) {
                if (plain->channel)
                        channel_leave(channel_of(plain->channel), &cq->member);
                events_drop(&opened_of(plain->context)->events, &cq->overrun);
                events_wait(&plain->async_events_completed);
        }
        completions_end(&cq->completions);
        free(cq->driven);
        free(cq);
        atomic_fetch_sub_explicit(&queues, 1, memory_order_relaxed);
        return 0;
}

VERB int ibv_resize_cq(struct ibv_cq *plain, int entries)
{
        int refused;

        if (entries <= 0 || entries > MOST_COMPLETIONS)
                return EINVAL;
        if (opened_is_lost(plain->context))
                return EIO;
        refused = completions_resize(&cq_of(plain)->completions, (uint32_t)entries);
        if (!refused)
                plain->cqe = entries;
        return refused;
}

/* Moderation lets a device wait for more completions before it tells of them. Nothing is gained by
 * that here, where an event is a wake-up of a thread, so any wish is granted by not waiting. */
int cq_modify(struct ibv_cq *plain, struct ibv_modify_cq_attr *change)
{
        (void)plain;
        return change->attr_mask & ~(uint32_t)IBV_CQ_ATTR_MODERATE ? EOPNOTSUPP : 0;
}
