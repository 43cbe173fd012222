#include "loop.h"

#include <string.h>
#include <sys/mman.h>

bool loop_is_wanted(const struct queue_pair *queue)
{
        const struct ibv_qp_attr *set = &queue->attributes;
        union ibv_gid to;
        uint32_t index;

        memcpy(&to, &set->ah_attr.grh.dgid, sizeof to);
        return set->dest_qp_num == queue->plain.qp_base.qp_num && port_find(&to, &index);
}

bool loop_up(struct queue_pair *queue)
{
        struct place nowhere = {0};
        struct view view;
        void *made;

        if (!queue->loop) {
                /* What lies in the ring is little, and at its beginning. */
                made = mmap(NULL, PAGE + RING_SIZE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
                if (made == MAP_FAILED)
                        return false;
                queue->loop = made;
        }
        memset(queue->loop, 0, sizeof *queue->loop);
        view = view_of(queue->loop, (unsigned char *)queue->loop + PAGE, RING_SHIFT);
        atomic_store_explicit(&queue->looped, true, memory_order_relaxed);
        return queue_pair_up(queue, view, view, &nowhere, false);
}

void loop_end(struct queue_pair *queue)
{
        if (queue->loop)
                munmap(queue->loop, PAGE + RING_SIZE);
        queue->loop = NULL;
}
