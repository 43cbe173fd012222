#include "inherit.h"

#include "attach.h"
#include "fallback.h"
#include "guest.h"
#include "handover.h"
#include "mapping.h"
#include "protocol.h"
#include "real.h"
#include "sys.h"

#include <fcntl.h>

enum { SPAWNED = 64 };

/* Numbers that file actions duplicate. The actions themselves are opaque. */
static struct {
        struct lock lock;
        bool full; /* some aren't known: any number may be one */
        unsigned count;
        struct {
                const void *actions;
                int fd;
        } pairs[SPAWNED];
} spawned;

void inherit(int fd, struct end *end, uint64_t key)
{
        if (!end_is(end, key))
                return;
        if (atomic_load(&end->stage) != STAGE_ATTACHED)
                attach_refuse(end, key, REASON_PASSED);
        if (atomic_load(&end->stage) == STAGE_ATTACHED && end_is_behind(fd, end))
                hand_over(fd, end, key, REASON_PASSED);
        /* It has just left its slot, and may request another one. */
        if (atomic_load(&end->stage) != STAGE_ATTACHED)
                attach_refuse(end, key, REASON_PASSED);
}

static void inherit_some(bool (*does)(int fd))
{
        int saved = *__errno_location();
        struct end *end;
        uint64_t key;

        /* Peers on other hosts take a while: their fallback is requested before, all at the same
         * time. */
        for (int fd = -1; (fd = end_next(fd, &end, &key)) >= 0;)
                if (atomic_load(&end->stage) == STAGE_ATTACHED && end_is_remote(end) && does(fd))
                        fallback_announce(end);
        for (int fd = -1; (fd = end_next(fd, &end, &key)) >= 0;)
                if (atomic_load(&end->stage) != STAGE_CLOSED && does(fd))
                        inherit(fd, end, key);
        *__errno_location() = saved;
}

static bool stays_open(int fd)
{
        long flags = sys_2(SYS_fcntl, fd, F_GETFD);

        return flags >= 0 && !(flags & FD_CLOEXEC);
}

void inherit_all(void)
{
        inherit_some(stays_open);
}

static bool is_duplicated(int fd)
{
        for (unsigned i = 0; i < spawned.count; i++)
                if (spawned.pairs[i].fd == fd)
                        return true;
        return spawned.full || stays_open(fd);
}

void inherit_spawned(const posix_spawn_file_actions_t *actions)
{
        /* Actions may be copies of others, which isn't known: all numbers that are known count. */
        inherit_some(actions ? is_duplicated : stays_open);
}

void spawned_duplicates(const posix_spawn_file_actions_t *actions, int fd)
{
        enum taken taken = lock_take(&spawned.lock, self());
        unsigned i = 0;

        while (i < spawned.count && (spawned.pairs[i].actions != actions || spawned.pairs[i].fd != fd))
                i++;
        if (i == SPAWNED || taken == LOCK_NESTED) {
                spawned.full = true;
        } else if (i == spawned.count) {
                spawned.pairs[i].actions = actions;
                spawned.pairs[i].fd = fd;
                spawned.count++;
        }
        lock_release(&spawned.lock, taken);
}

void spawned_forgets(const posix_spawn_file_actions_t *actions)
{
        enum taken taken = lock_take(&spawned.lock, self());

        for (unsigned i = 0; i < spawned.count && taken == LOCK_TAKEN;)
                if (spawned.pairs[i].actions == actions)
                        spawned.pairs[i] = spawned.pairs[--spawned.count];
                else
                        i++;
        lock_release(&spawned.lock, taken);
}

void inherit_from_guest(void)
{
        int saved = *__errno_location(), program;
        struct end *end;
        uint64_t key;

        while (guest_receive(&end, &key, &program)) {
                int fd = end_next_descriptor(end, -1);

                if (fd >= 0 && end_is(end, key))
                        hand_over_to(fd, end, key, program, REASON_PASSED);
                else
                        sys_1(SYS_close, program);
        }
        *__errno_location() = saved;
}
