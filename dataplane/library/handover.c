#include "handover.h"

#include "arena.h"
#include "ends.h"
#include "fallback.h"
#include "flow.h"
#include "guest.h"
#include "poller.h"
#include "pump.h"
#include "ready.h"
#include "sparse.h"
#include "sys.h"

#include <fcntl.h>
#include <string.h>

/* Under both locks, after the sender has stopped: what is left in the ring, copied to memory of our
 * own. */
static bool take_rest(struct end *end, struct pump *pump)
{
        struct view view = end_receives(end);
        uint64_t head = atomic_load(&end->rx.edge), start = atomic_load(&view.ring->start),
                 position = atomic_load(&end->rx.position);
        int64_t left = fallback_left(end);
        unsigned char *bytes;
        size_t copied = 0;

        if (left <= 0 || !start || start - 1 < position)
                return false;
        bytes = reserve((size_t)left, MAP_PRIVATE);
        if (!bytes)
                return false;
        while (copied < (size_t)left) {
                size_t run;
                const unsigned char *place = ring_to_take(&view, head + copied, &run);

                run = run < (size_t)left - copied ? run : (size_t)left - copied;
                /* Reading a page of the mapping that nobody has written would make it (budget.h).
                 */
                if (view_remote(&view) || !arena_copy(end, place, bytes + copied, run))
                        memcpy(bytes + copied, place, run);
                copied += run;
        }
        /* While the receiver is ready, TCP's bytes come before the ring's. */
        pump->before = atomic_load(&end->rx.phase) == PHASE_READY ? start - 1 - position : 0;
        pump->bytes = bytes;
        pump->size = (size_t)left;
        return true;
}

/* All descriptors of the end become the program's end of the pump. A child in our memory may have
 * changed what its numbers mean. */
static void replace_descriptors(struct end *end, uint64_t key, int program)
{
        bool ours = in_this_process();

        for (int fd = end_next_descriptor(end, -1); fd >= 0 && end_is(end, key);
             fd = end_next_descriptor(end, fd)) {
                long flags = sys_2(SYS_fcntl, fd, F_GETFD);

                if (flags < 0 || !end_is_behind(fd, end))
                        continue;
                if (ours)
                        poller_replace(fd, key, program, flags & FD_CLOEXEC ? O_CLOEXEC : 0);
                else
                        sys_3(SYS_dup3, program, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0);
        }
}

void hand_over_to(int fd, struct end *end, uint64_t key, int program, uint32_t reason)
{
        replace_descriptors(end, key, program);
        if (in_this_process())
                end_leave(fd, end, key, reason);
        else
                guest_send(end, key, program);
        sys_1(SYS_close, program);
}

/* A remote sender that may not have stopped. */
static bool is_unanswered(struct end *end)
{
        struct view view = end_receives(end);

        return view_remote(&view) && end_has_rest(end) && !ready_over(&view);
}

/* Under both locks, after fallback_both() has left something: start a pump. False: there is none.
 */
static bool pump_rest(int fd, struct end *end, struct pump *pump)
{
        bool started;

        if (is_unanswered(end)) {
                /* Nobody would read what may still come, and what comes after it must not be taken
                 * for it. */
                reset_broken(fd, end, true);
                return false;
        }
        if (fallback_left(end) <= 0 || !take_rest(end, pump))
                return false;
        started = pump_start(pump);
        if (started) {
                long status = sys_2(SYS_fcntl, fd, F_GETFL);
                struct view view = end_receives(end);

                sys_3(SYS_fcntl, pump->program, F_SETFL, status & O_NONBLOCK);
                atomic_store(&end->rx.edge, atomic_load(&view.ring->tail));
                flow_become(&end->rx, PHASE_OVER);
        }
        sys_2(SYS_munmap, pump->bytes, pump->size);
        return started;
}

void hand_over(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        struct pump pump = {.tcp = fd};
        unsigned nested;
        bool pumped;

        if (atomic_load(&end->stage) != STAGE_ATTACHED) {
                fall_back(fd, end, key, reason);
                return;
        }
        nested = end_lock(end);
        /* Otherwise it has left its slot meanwhile. */
        pumped = end_is(end, key) && atomic_load(&end->stage) == STAGE_ATTACHED &&
                 !fallback_both(fd, end, reason) && pump_rest(fd, end, &pump);
        end_release(end, nested);
        if (pumped)
                hand_over_to(fd, end, key, pump.program, reason);
}
