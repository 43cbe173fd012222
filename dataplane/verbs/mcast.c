/* Multicast groups as programs join and leave them. */
#include "datagrams.h"
#include "groups.h"

#include <errno.h>

static int check(struct ibv_qp *plain, const union ibv_gid *group)
{
        if (opened_is_lost(plain->context))
                return EIO;
        return queue_has_datagrams(queue_of(plain)) && is_group(group) ? 0 : EINVAL;
}

/* The router hears of it once the queue pair takes datagrams. */
VERB int ibv_attach_mcast(struct ibv_qp *plain, const union ibv_gid *group, uint16_t lid)
{
        struct queue_pair *queue = queue_of(plain);
        int error = check(plain, group);

        (void)lid;
        if (!error)
                error = group_join(queue, group);
        if (!error && queue_paired(queue) == QUEUE_PAIRED)
                datagram_router->join(queue, group, true);
        return error;
}

VERB int ibv_detach_mcast(struct ibv_qp *plain, const union ibv_gid *group, uint16_t lid)
{
        struct queue_pair *queue = queue_of(plain);
        int error = check(plain, group);

        (void)lid;
        if (!error)
                error = group_leave(queue, group);
        if (!error && queue_paired(queue) == QUEUE_PAIRED)
                datagram_router->join(queue, group, false);
        return error;
}
