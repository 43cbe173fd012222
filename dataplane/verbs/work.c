#include "work.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint32_t power_of_two(uint32_t least)
{
        uint32_t size = 1;

        while (size < least)
                size *= 2;
        return size;
}

/* --- memory */

bool work_hold(const struct work_memory *memory, struct work_spot *spot, uint32_t size,
               struct work_held *held)
{
        uint32_t vecs = 0;

        held->count = 0;
        if (memory->inlined) {
                held->vec[0] = (struct iovec){.iov_base = (void *)(uintptr_t)(memory->inlined + spot->offset),
                                              .iov_len = size};
                spot->offset += size;
                return true;
        }
        for (; size && spot->piece < memory->count; spot->piece++, spot->offset = 0) {
                const struct ibv_sge *piece = &memory->pieces[spot->piece];
                uint32_t left = piece->length - spot->offset, part = left < size ? left : size;
                struct key_use use = {.key = piece->lkey,
                                      .domain = memory->domain,
                                      .access = memory->access,
                                      .address = piece->addr + spot->offset,
                                      .length = part};
                unsigned char *first;

                if (!part)
                        continue;
                if (key_hold(&memory_keys, &use, &first) != KEY_HELD) {
                        work_let_go(held);
                        return false;
                }
                held->keys[held->count++] = piece->lkey;
                held->vec[vecs++] = (struct iovec){.iov_base = first, .iov_len = part};
                size -= part;
                if (part < left) {
                        spot->offset += part;
                        break;
                }
        }
        return true;
}

void work_let_go(struct work_held *held)
{
        for (uint32_t i = 0; i < held->count; i++)
                key_release(&memory_keys, held->keys[i]);
        held->count = 0;
}

bool work_is_allowed(const struct work_memory *memory)
{
        for (uint32_t i = 0; !memory->inlined && i < memory->count; i++) {
                struct key_use use = {.key = memory->pieces[i].lkey,
                                      .domain = memory->domain,
                                      .access = memory->access,
                                      .address = memory->pieces[i].addr,
                                      .length = memory->pieces[i].length};
                unsigned char *first;

                if (!use.length)
                        continue;
                if (key_hold(&memory_keys, &use, &first) != KEY_HELD)
                        return false;
                key_release(&memory_keys, use.key);
        }
        return true;
}

/* --- send queues */

bool send_queue_start(struct send_queue *queue, uint32_t most, uint32_t pieces, uint32_t inlined)
{
        uint32_t size = power_of_two(most);

        *queue = (struct send_queue){
            .mask = size - 1, .most = most, .most_pieces = pieces, .most_inline = inlined};
        queue->works = calloc(size, sizeof *queue->works);
        queue->pieces = calloc((size_t)size * pieces + 1, sizeof *queue->pieces);
        queue->inlined = calloc((size_t)size * inlined + 1, 1);
        if (queue->works && queue->pieces && queue->inlined)
                return true;
        send_queue_end(queue);
        return false;
}

void send_queue_end(struct send_queue *queue)
{
        free(queue->works);
        free(queue->pieces);
        free(queue->inlined);
        *queue = (struct send_queue){0};
}

/* Copy the bytes of inline data, of as many pieces as there are. */
static void copy_inline(unsigned char *to, const struct ibv_send_wr *wr)
{
        for (int i = 0; i < wr->num_sge; i++) {
                memcpy(to, (const void *)(uintptr_t)wr->sg_list[i].addr, wr->sg_list[i].length);
                to += wr->sg_list[i].length;
        }
}

/* The fields that depend on the operation. */
static void copy_operation(struct send_work *work, const struct ibv_send_wr *wr, bool datagram)
{
        switch (wr->opcode) {
        case IBV_WR_ATOMIC_CMP_AND_SWP:
        case IBV_WR_ATOMIC_FETCH_AND_ADD:
                work->total = sizeof work->operands[0];
                work->address = wr->wr.atomic.remote_addr;
                work->operands[0] = wr->wr.atomic.compare_add;
                work->operands[1] = wr->wr.atomic.swap;
                work->rkey = wr->wr.atomic.rkey;
                break;
        case IBV_WR_BIND_MW:
                work->window = wr->bind_mw.mw;
                work->bind = wr->bind_mw.bind_info;
                work->rkey = wr->bind_mw.rkey;
                break;
        default:
                if (datagram) {
                        work->from = handle_of(wr->wr.ud.ah)->from;
                        work->to = handle_of(wr->wr.ud.ah)->to;
                        work->number = wr->wr.ud.remote_qpn;
                        work->rkey = wr->wr.ud.remote_qkey;
                        break;
                }
                work->address = wr->wr.rdma.remote_addr;
                work->rkey = wr->wr.rdma.rkey;
        }
        if (wr->opcode == IBV_WR_SEND_WITH_IMM || wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
                work->immediate = wr->imm_data;
        else if (wr->opcode == IBV_WR_SEND_WITH_INV || wr->opcode == IBV_WR_LOCAL_INV)
                work->immediate = wr->invalidate_rkey;
}

int send_queue_add(struct send_queue *queue, const struct ibv_send_wr *wr, bool datagram)
{
        struct send_work *work = send_at(queue, queue->tail);
        size_t slot = queue->tail & queue->mask;
        uint64_t total = 0;

        if (queue->tail - queue->head >= queue->most)
                return ENOMEM;
        if (wr->num_sge < 0 || (uint32_t)wr->num_sge > queue->most_pieces)
                return EINVAL;
        for (int i = 0; i < wr->num_sge; i++)
                total += wr->sg_list[i].length;
        if (total > (wr->send_flags & IBV_SEND_INLINE ? queue->most_inline : MOST_MESSAGE))
                return EINVAL;
        *work = (struct send_work){.id = wr->wr_id,
                                   .total = (uint32_t)total,
                                   .opcode = (uint8_t)wr->opcode,
                                   .flags = (uint8_t)wr->send_flags};
        copy_operation(work, wr, datagram);
        if (wr->send_flags & IBV_SEND_INLINE) {
                copy_inline(queue->inlined + slot * queue->most_inline, wr);
        } else {
                work->count = (uint32_t)wr->num_sge;
                for (uint32_t i = 0; i < work->count; i++)
                        queue->pieces[slot * queue->most_pieces + i] = wr->sg_list[i];
        }
        queue->tail++;
        return 0;
}

struct work_memory send_memory(const struct send_queue *queue, const struct send_work *work, uint32_t domain)
{
        size_t slot = (size_t)(work - queue->works);

        return (struct work_memory){
            .pieces = queue->pieces + slot * queue->most_pieces,
            .count = work->count,
            .domain = domain,
            .access = send_is_asking(work) ? KEY_LOCAL_WRITE : KEY_LOCAL_READ,
            .inlined = work->flags & IBV_SEND_INLINE ? queue->inlined + slot * queue->most_inline : NULL};
}

/* --- receive queues */

bool receive_queue_start(struct receive_queue *queue, uint32_t most, uint32_t pieces)
{
        uint32_t size = power_of_two(most);

        *queue = (struct receive_queue){.mask = size - 1, .most = most, .most_pieces = pieces};
        queue->slots = calloc(size, sizeof *queue->slots);
        queue->pieces = calloc((size_t)size * pieces + 1, sizeof *queue->pieces);
        if (queue->slots && queue->pieces)
                return true;
        receive_queue_end(queue);
        return false;
}

void receive_queue_end(struct receive_queue *queue)
{
        free(queue->slots);
        free(queue->pieces);
        *queue = (struct receive_queue){0};
}

int receive_queue_add(struct receive_queue *queue, const struct ibv_recv_wr *wr)
{
        uint32_t tail;
        size_t slot;

        if (wr->num_sge < 0 || (uint32_t)wr->num_sge > queue->most_pieces)
                return EINVAL;
        mutex_take(&queue->mutex);
        if (receives_in(queue) >= queue->most) {
                mutex_release(&queue->mutex);
                return ENOMEM;
        }
        tail = atomic_load_explicit(&queue->tail, memory_order_relaxed);
        slot = tail & queue->mask;
        queue->slots[slot] = (struct receive_slot){.id = wr->wr_id, .count = (uint32_t)wr->num_sge};
        for (int i = 0; i < wr->num_sge; i++)
                queue->pieces[slot * queue->most_pieces + (size_t)i] = wr->sg_list[i];
        atomic_store_explicit(&queue->tail, tail + 1, memory_order_relaxed);
        mutex_release(&queue->mutex);
        return 0;
}

bool receive_queue_take(struct receive_queue *queue, struct receive_work *work)
{
        const struct receive_slot *slot;
        uint32_t head;

        if (!receives_in(queue))
                return false;
        mutex_take(&queue->mutex);
        if (!receives_in(queue)) {
                mutex_release(&queue->mutex);
                return false;
        }
        head = atomic_load_explicit(&queue->head, memory_order_relaxed);
        slot = &queue->slots[head & queue->mask];
        work->id = slot->id;
        work->count = slot->count;
        memcpy(work->pieces, queue->pieces + (size_t)(head & queue->mask) * queue->most_pieces,
               slot->count * sizeof *work->pieces);
        atomic_store_explicit(&queue->head, head + 1, memory_order_relaxed);
        mutex_release(&queue->mutex);
        work->room = 0;
        for (uint32_t i = 0; i < work->count; i++)
                work->room += work->pieces[i].length;
        return true;
}

/* Under the mutex: into arrays for more or fewer of them. */
static void move_receives(struct receive_queue *queue, struct receive_queue *to)
{
        uint32_t head = atomic_load_explicit(&queue->head, memory_order_relaxed);
        uint32_t count = receives_in(queue);

        for (uint32_t i = 0; i < count; i++) {
                size_t from = (head + i) & queue->mask, at = i & to->mask;

                to->slots[at] = queue->slots[from];
                memcpy(to->pieces + at * to->most_pieces, queue->pieces + from * queue->most_pieces,
                       queue->slots[from].count * sizeof *to->pieces);
        }
        free(queue->slots);
        free(queue->pieces);
        queue->slots = to->slots;
        queue->pieces = to->pieces;
        queue->mask = to->mask;
        queue->most = to->most;
        atomic_store_explicit(&queue->head, 0, memory_order_relaxed);
        atomic_store_explicit(&queue->tail, count, memory_order_relaxed);
}

int receive_queue_resize(struct receive_queue *queue, uint32_t most)
{
        struct receive_queue to;
        bool fits;

        if (!receive_queue_start(&to, most, queue->most_pieces))
                return ENOMEM;
        mutex_take(&queue->mutex);
        fits = receives_in(queue) <= most;
        if (fits)
                move_receives(queue, &to);
        mutex_release(&queue->mutex);
        if (!fits)
                receive_queue_end(&to);
        return fits ? 0 : EINVAL;
}

void receive_queue_clear(struct receive_queue *queue)
{
        mutex_take(&queue->mutex);
        atomic_store_explicit(&queue->head, 0, memory_order_relaxed);
        atomic_store_explicit(&queue->tail, 0, memory_order_relaxed);
        mutex_release(&queue->mutex);
}
