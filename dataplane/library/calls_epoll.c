/* epoll: see poller.h. */
#include "calls.h"

#include "fallback.h"
#include "identity.h"
#include "poller.h"
#include "protocol.h"
#include "retire.h"
#include "sleep.h"

#include <errno.h>

static int made(int fd)
{
        if (fd >= 0)
                poller_made(fd);
        return fd;
}

CALL int epoll_create(int size)
{
        return made(real()->epoll_create(size));
}

CALL int epoll_create1(int flags)
{
        return made(real()->epoll_create1(flags));
}

CALL int epoll_ctl(int epfd, int operation, int fd, struct epoll_event *event)
{
        uint64_t key;
        struct end *end = operation == EPOLL_CTL_ADD ? end_of(fd, &key) : NULL;
        bool untracked;
        int outcome;

        if (end && atomic_load(&end->stage) == STAGE_ATTACHED && !identity_holds(fd, end))
                identity_lost(fd);
        outcome = poller_control(epfd, operation, fd, event, &untracked);
        if (untracked) {
                end = end_of(fd, &key);
                if (end)
                        fall_back(fd, end, key, REASON_RAW);
        }
        return outcome;
}

CALL int epoll_wait(int epfd, struct epoll_event *events, int size, int timeout)
{
        bool ours;
        int count;

        retire_if_io_uring();
        count = poller_wait(epfd, events, size, sleep_ms(timeout), NULL, &ours);
        return ours ? count : real()->epoll_wait(epfd, events, size, timeout);
}

CALL int epoll_pwait(int epfd, struct epoll_event *events, int size, int timeout, const sigset_t *mask)
{
        bool ours;
        int count;

        retire_if_io_uring();
        count = poller_wait(epfd, events, size, sleep_ms(timeout), mask, &ours);
        return ours ? count : real()->epoll_pwait(epfd, events, size, timeout, mask);
}

CALL int epoll_pwait2(int epfd, struct epoll_event *events, int size, const struct timespec *timeout,
                      const sigset_t *mask)
{
        bool ours = false;
        int count = 0;

        if (sleep_is_timespec(timeout))
                count = poller_wait(epfd, events, size, sleep_timespec(timeout), mask, &ours);
        if (ours)
                return count;
        if (real()->epoll_pwait2)
                return real()->epoll_pwait2(epfd, events, size, timeout, mask);
        return (int)result(-ENOSYS);
}
