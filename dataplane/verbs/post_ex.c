#include "post_ex.h"

#include "post.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* What a thread has written down since ibv_wr_start(), and nobody else sees before
 * ibv_wr_complete(). */
struct drafts {
        struct mutex mutex; /* from start to complete or abort */
        struct ibv_send_wr *wrs;
        struct ibv_sge *pieces;
        unsigned char *inlined;
        uint32_t count;
        int error; /* the first one since the start */
};

static struct queue_pair *queue_of_extended(struct ibv_qp_ex *plain)
{
        return queue_of(&plain->qp_base);
}

/* --- operations */

/* The next request; NULL: there are too many. */
static struct ibv_send_wr *begin(struct ibv_qp_ex *plain, enum ibv_wr_opcode opcode)
{
        struct queue_pair *queue = queue_of_extended(plain);
        struct drafts *drafts = queue->drafts;
        struct ibv_send_wr *wr = &drafts->wrs[drafts->count];

        if (drafts->count >= queue->sends.most) {
                drafts->error = drafts->error ? drafts->error : ENOMEM;
                return NULL;
        }
        *wr = (struct ibv_send_wr){.wr_id = plain->wr_id,
                                   .sg_list = drafts->pieces + (size_t)drafts->count * MOST_PIECES,
                                   .opcode = opcode,
                                   .send_flags = plain->wr_flags};
        drafts->count++;
        return wr;
}

static void begin_one_sided(struct ibv_qp_ex *plain, enum ibv_wr_opcode opcode, uint32_t rkey,
                            uint64_t address, __be32 immediate)
{
        struct ibv_send_wr *wr = begin(plain, opcode);

        if (!wr)
                return;
        wr->wr.rdma.rkey = rkey;
        wr->wr.rdma.remote_addr = address;
        wr->imm_data = immediate;
}

static void begin_atomic(struct ibv_qp_ex *plain, enum ibv_wr_opcode opcode, uint32_t rkey, uint64_t address,
                         uint64_t operand, uint64_t swap)
{
        struct ibv_send_wr *wr = begin(plain, opcode);

        if (!wr)
                return;
        wr->wr.atomic.rkey = rkey;
        wr->wr.atomic.remote_addr = address;
        wr->wr.atomic.compare_add = operand;
        wr->wr.atomic.swap = swap;
}

static void atomic_swap(struct ibv_qp_ex *plain, uint32_t rkey, uint64_t address, uint64_t compare,
                        uint64_t swap)
{
        begin_atomic(plain, IBV_WR_ATOMIC_CMP_AND_SWP, rkey, address, compare, swap);
}

static void atomic_add(struct ibv_qp_ex *plain, uint32_t rkey, uint64_t address, uint64_t add)
{
        begin_atomic(plain, IBV_WR_ATOMIC_FETCH_AND_ADD, rkey, address, add, 0);
}

static void bind_window(struct ibv_qp_ex *plain, struct ibv_mw *window, uint32_t rkey,
                        const struct ibv_mw_bind_info *info)
{
        struct ibv_send_wr *wr = begin(plain, IBV_WR_BIND_MW);

        if (!wr)
                return;
        wr->bind_mw.mw = window;
        wr->bind_mw.rkey = rkey;
        wr->bind_mw.bind_info = *info;
}

static void make_invalid(struct ibv_qp_ex *plain, uint32_t rkey)
{
        struct ibv_send_wr *wr = begin(plain, IBV_WR_LOCAL_INV);

        if (wr)
                wr->invalidate_rkey = rkey;
}

static void rdma_read(struct ibv_qp_ex *plain, uint32_t rkey, uint64_t address)
{
        begin_one_sided(plain, IBV_WR_RDMA_READ, rkey, address, 0);
}

static void rdma_write(struct ibv_qp_ex *plain, uint32_t rkey, uint64_t address)
{
        begin_one_sided(plain, IBV_WR_RDMA_WRITE, rkey, address, 0);
}

static void rdma_write_immediate(struct ibv_qp_ex *plain, uint32_t rkey, uint64_t address, __be32 immediate)
{
        begin_one_sided(plain, IBV_WR_RDMA_WRITE_WITH_IMM, rkey, address, immediate);
}

static void send_plain(struct ibv_qp_ex *plain)
{
        begin(plain, IBV_WR_SEND);
}

static void send_immediate(struct ibv_qp_ex *plain, __be32 immediate)
{
        struct ibv_send_wr *wr = begin(plain, IBV_WR_SEND_WITH_IMM);

        if (wr)
                wr->imm_data = immediate;
}

static void send_invalid(struct ibv_qp_ex *plain, uint32_t rkey)
{
        struct ibv_send_wr *wr = begin(plain, IBV_WR_SEND_WITH_INV);

        if (wr)
                wr->invalidate_rkey = rkey;
}

/* The request that was begun last; NULL: there is none, or it failed. */
static struct ibv_send_wr *latest(struct queue_pair *queue)
{
        struct drafts *drafts = queue->drafts;

        return drafts->count && !drafts->error ? &drafts->wrs[drafts->count - 1] : NULL;
}

static void set_address(struct ibv_qp_ex *plain, struct ibv_ah *ah, uint32_t number, uint32_t key)
{
        struct ibv_send_wr *wr = latest(queue_of_extended(plain));

        if (!wr)
                return;
        wr->wr.ud.ah = ah;
        wr->wr.ud.remote_qpn = number;
        wr->wr.ud.remote_qkey = key;
}

/* --- their memory */

static void set_pieces(struct ibv_qp_ex *plain, size_t count, const struct ibv_sge *pieces)
{
        struct queue_pair *queue = queue_of_extended(plain);
        struct ibv_send_wr *wr = latest(queue);

        if (!wr)
                return;
        if (count > queue->sends.most_pieces) {
                queue->drafts->error = EINVAL;
                return;
        }
        for (size_t i = 0; i < count; i++)
                wr->sg_list[i] = pieces[i];
        wr->num_sge = (int)count;
}

static void set_piece(struct ibv_qp_ex *plain, uint32_t lkey, uint64_t address, uint32_t length)
{
        const struct ibv_sge piece = {.addr = address, .length = length, .lkey = lkey};

        set_pieces(plain, 1, &piece);
}

/* The bytes are copied at once, behind one another. */
static void set_inline_list(struct ibv_qp_ex *plain, size_t count, const struct ibv_data_buf *buffers)
{
        struct queue_pair *queue = queue_of_extended(plain);
        struct drafts *drafts = queue->drafts;
        struct ibv_send_wr *wr = latest(queue);
        unsigned char *to;
        size_t length = 0;

        if (!wr)
                return;
        to = drafts->inlined + (size_t)(drafts->count - 1) * queue->sends.most_inline;
        for (size_t i = 0; i < count; i++) {
                if (buffers[i].length > queue->sends.most_inline - length) {
                        drafts->error = EINVAL;
                        return;
                }
                memcpy(to + length, buffers[i].addr, buffers[i].length);
                length += buffers[i].length;
        }
        wr->sg_list[0] = (struct ibv_sge){.addr = (uintptr_t)to, .length = (uint32_t)length};
        wr->num_sge = 1;
        wr->send_flags |= IBV_SEND_INLINE;
}

static void set_inline(struct ibv_qp_ex *plain, void *address, size_t length)
{
        const struct ibv_data_buf buffer = {.addr = address, .length = length};

        set_inline_list(plain, 1, &buffer);
}

/* --- beginning and end */

static void start(struct ibv_qp_ex *plain)
{
        struct drafts *drafts = queue_of_extended(plain)->drafts;

        mutex_take(&drafts->mutex);
        drafts->count = 0;
        drafts->error = 0;
}

/* All of them are posted, or none is. */
static int complete(struct ibv_qp_ex *plain)
{
        struct queue_pair *queue = queue_of_extended(plain);
        struct drafts *drafts = queue->drafts;
        int error = opened_is_lost(plain->qp_base.context) ? EIO : drafts->error;
        uint32_t before;

        if (!error) {
                mutex_take(&queue->sending);
                before = queue->sends.tail;
                for (uint32_t i = 0; i < drafts->count && !error; i++)
                        error = post_add(queue, &drafts->wrs[i]);
                if (error)
                        queue->sends.tail = before;
                post_finish(queue);
        }
        mutex_release(&drafts->mutex);
        return error;
}

static void drop(struct ibv_qp_ex *plain)
{
        mutex_release(&queue_of_extended(plain)->drafts->mutex);
}

static void set_functions(struct ibv_qp_ex *plain)
{
        plain->wr_atomic_cmp_swp = atomic_swap;
        plain->wr_atomic_fetch_add = atomic_add;
        plain->wr_bind_mw = bind_window;
        plain->wr_local_inv = make_invalid;
        plain->wr_rdma_read = rdma_read;
        plain->wr_rdma_write = rdma_write;
        plain->wr_rdma_write_imm = rdma_write_immediate;
        plain->wr_send = send_plain;
        plain->wr_send_imm = send_immediate;
        plain->wr_send_inv = send_invalid;
        plain->wr_set_inline_data = set_inline;
        plain->wr_set_inline_data_list = set_inline_list;
        plain->wr_set_sge = set_piece;
        plain->wr_set_sge_list = set_pieces;
        plain->wr_set_ud_addr = set_address;
        plain->wr_start = start;
        plain->wr_complete = complete;
        plain->wr_abort = drop;
}

bool post_ex_start(struct queue_pair *queue)
{
        struct drafts *drafts = calloc(1, sizeof *drafts);
        size_t most = queue->sends.most;

        queue->drafts = drafts;
        if (!drafts)
                return false;
        drafts->wrs = calloc(most + 1, sizeof *drafts->wrs);
        drafts->pieces = calloc((most + 1) * MOST_PIECES, sizeof *drafts->pieces);
        drafts->inlined = calloc(most * queue->sends.most_inline + 1, 1);
        if (!drafts->wrs || !drafts->pieces || !drafts->inlined) {
                post_ex_end(queue);
                return false;
        }
        set_functions(&queue->plain);
        return true;
}

void post_ex_end(struct queue_pair *queue)
{
        struct drafts *drafts = queue->drafts;

        if (!drafts)
                return;
        free(drafts->wrs);
        free(drafts->pieces);
        free(drafts->inlined);
        free(drafts);
        queue->drafts = NULL;
}

VERB struct ibv_qp_ex *ibv_qp_to_qp_ex(struct ibv_qp *plain)
{
        struct queue_pair *queue = queue_of(plain);

        return queue->drafts ? &queue->plain : NULL;
}
