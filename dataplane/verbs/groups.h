/* Multicast groups: which queue pairs of this process are in one, and which other processes have
 * some. A sender to a group puts one record into the ring of each such process, which gives it to
 * all of its own.
 *
 * From the first datagram to a group on, the router says where the group's members are.
 */
#ifndef FREEFLOW_GROUPS_H
#define FREEFLOW_GROUPS_H

#include "datagram_peers.h"
#include "queue_pair.h"

enum { MOST_GROUPS = 1024 /* to which a process sends */ };

static inline bool is_group(const union ibv_gid *gid)
{
        /* FF00::/8, or 224.0.0.0/4 as an IPv6 address. */
        static const unsigned char ipv4[12] = {[10] = 0xff, [11] = 0xff};

        return gid->raw[0] == 0xff || (!memcmp(gid->raw, ipv4, sizeof ipv4) && gid->raw[12] >> 4 == 0xe);
}

/* The queue pair gets what is sent to the group. Returns 0, or ENOMEM. */
int group_join(struct queue_pair *queue, const union ibv_gid *group);
/* No longer; `group` NULL: nor what is sent to others. Returns 0, or EINVAL if it did not. */
int group_leave(struct queue_pair *queue, const union ibv_gid *group);
/* Call `use` for each queue pair in the group. Called without mutexes of queue pairs. */
void group_each(const union ibv_gid *group, void (*use)(struct queue_pair *queue, const void *argument),
                const void *argument);
/* Call `use` for each group that the queue pair is in. */
void groups_of(const struct queue_pair *queue,
               void (*use)(const struct queue_pair *queue, const union ibv_gid *group));

/* Send to all that are in the group. */
enum datagram_outcome group_send(const struct datagram *datagram);
/* The router says that the process with this slot has members, or no more. */
void group_change(const union ibv_gid *from, const union ibv_gid *group, uint32_t number, bool on);
/* It has said all that it was asked, or nothing. */
void group_answered(uint32_t request);
/* In a child of fork(): there are none. */
void groups_forget(void);

#endif
