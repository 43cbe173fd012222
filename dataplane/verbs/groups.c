#include "groups.h"

#include "monotonic.h"

#include <errno.h>
#include <stdlib.h>

/* A queue pair in a group. */
struct attachment {
        struct attachment *next;
        struct queue_pair *queue;
        union ibv_gid group;
};

/* Before the mutexes of queue pairs. */
static struct {
        struct mutex mutex;
        struct attachment *first;
        _Atomic uint32_t count;
} members;

/* A group that is sent to. */
struct target {
        struct target *next;
        union ibv_gid from, group;
        uint32_t request;
        uint32_t epoch;
        uint64_t since; /* ns: when it was asked for */
        bool answered;
        bool started;      /* nothing waits for members any more */
        uint32_t *numbers; /* of slots */
        uint32_t count, room;
};

/* Behind the mutexes of queue pairs. */
static struct {
        struct mutex mutex;
        struct target *first;
        uint32_t count;
} targets;

/* --- queue pairs in groups */

int group_leave(struct queue_pair *queue, const union ibv_gid *group)
{
        struct attachment **at = &members.first, *found;
        int error = EINVAL;

        mutex_take(&members.mutex);
        while ((found = *at)) {
                if (found->queue != queue || (group && memcmp(&found->group, group, sizeof *group) != 0)) {
                        at = &found->next;
                        continue;
                }
                *at = found->next;
                free(found);
                atomic_fetch_sub_explicit(&members.count, 1, memory_order_relaxed);
                error = 0;
        }
        mutex_release(&members.mutex);
        return error;
}

int group_join(struct queue_pair *queue, const union ibv_gid *group)
{
        struct attachment *made = calloc(1, sizeof *made);

        if (!made)
                return ENOMEM;
        group_leave(queue, group);
        made->queue = queue;
        made->group = *group;
        mutex_take(&members.mutex);
        made->next = members.first;
        members.first = made;
        atomic_fetch_add_explicit(&members.count, 1, memory_order_relaxed);
        mutex_release(&members.mutex);
        return 0;
}

void group_each(const union ibv_gid *group, void (*use)(struct queue_pair *queue, const void *argument),
                const void *argument)
{
        mutex_take(&members.mutex);
        for (struct attachment *at = members.first; at; at = at->next)
                if (memcmp(&at->group, group, sizeof *group) == 0)
                        use(at->queue, argument);
        mutex_release(&members.mutex);
}

void groups_of(const struct queue_pair *queue,
               void (*use)(const struct queue_pair *queue, const union ibv_gid *group))
{
        mutex_take(&members.mutex);
        for (struct attachment *at = members.first; at; at = at->next)
                if (at->queue == queue)
                        use(queue, &at->group);
        mutex_release(&members.mutex);
}

/* --- sending, under the mutex of the targets */

static struct target *find(const union ibv_gid *from, const union ibv_gid *group)
{
        struct target *at = targets.first;

        while (at &&
               (memcmp(&at->from, from, sizeof *from) != 0 || memcmp(&at->group, group, sizeof *group) != 0))
                at = at->next;
        return at;
}

static struct target *make(const struct datagram *datagram)
{
        struct target *made = targets.count < MOST_GROUPS ? calloc(1, sizeof *made) : NULL;

        if (!made)
                return NULL;
        made->from = datagram->from;
        made->group = datagram->to;
        made->next = targets.first;
        targets.first = made;
        targets.count++;
        return made;
}

/* Nothing is known of it, or only what an earlier router has said. */
static void ask(struct target *target, const struct datagram *datagram, uint32_t epoch)
{
        target->request = peer_request();
        target->epoch = epoch;
        target->since = monotonic();
        target->answered = target->started = false;
        target->count = 0;
        datagram_router->seek(&datagram->from, &datagram->to, datagram->from_number, DATAGRAM_GROUP,
                              target->request);
}

/* Are its members known, as far as they will be, and do those on other hosts have their slots? Only
 * the first datagrams wait for that: members that come later hold up nobody. */
static bool is_started(struct target *target)
{
        const uint64_t most = 10000000000; /* ns */
        bool waits = !target->answered;

        if (target->started)
                return true;
        for (uint32_t i = 0; i < target->count && !waits; i++)
                waits = peer_starts(target->numbers[i], target->epoch);
        target->started = !waits || monotonic() - target->since > most;
        return target->started;
}

/* A process whose ring is full gets it no more: the others would get it twice. */
enum datagram_outcome group_send(const struct datagram *datagram)
{
        uint32_t epoch = datagram_router->epoch();
        struct target *target;
        bool known;

        mutex_take(&targets.mutex);
        target = find(&datagram->from, &datagram->to);
        if (!target || target->epoch != epoch) {
                target = target ? target : make(datagram);
                if (target)
                        ask(target, datagram, epoch);
        }
        known = !target || is_started(target);
        for (uint32_t i = 0; known && target && i < target->count; i++)
                peers_send_to(target->numbers[i], epoch, datagram);
        mutex_release(&targets.mutex);
        if (known && atomic_load_explicit(&members.count, memory_order_relaxed))
                peers_send_here(datagram);
        return known ? DATAGRAM_DONE : DATAGRAM_WAIT;
}

static void add(struct target *target, uint32_t number)
{
        uint32_t room = target->room ? 2 * target->room : 8, *moved;

        if (target->count == target->room) {
                moved = calloc(room, sizeof *moved);
                if (!moved)
                        return;
                for (uint32_t i = 0; i < target->count; i++)
                        moved[i] = target->numbers[i];
                free(target->numbers);
                target->numbers = moved;
                target->room = room;
        }
        target->numbers[target->count++] = number;
}

void group_change(const union ibv_gid *from, const union ibv_gid *group, uint32_t number, bool on)
{
        struct target *target;

        mutex_take(&targets.mutex);
        target = find(from, group);
        for (uint32_t i = 0; target && i < target->count; i++)
                if (target->numbers[i] == number)
                        target->numbers[i--] = target->numbers[--target->count];
        if (target && on && target->count < MOST_DATAGRAM_PEERS)
                add(target, number);
        mutex_release(&targets.mutex);
}

void group_answered(uint32_t request)
{
        mutex_take(&targets.mutex);
        for (struct target *at = targets.first; at; at = at->next)
                at->answered |= at->request == request;
        mutex_release(&targets.mutex);
}

void groups_forget(void)
{
        members.mutex = targets.mutex = (struct mutex){0};
        members.first = NULL;
        targets.first = NULL;
        targets.count = 0;
        atomic_store_explicit(&members.count, 0, memory_order_relaxed);
}
