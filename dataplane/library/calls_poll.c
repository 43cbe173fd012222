/* poll(): see poll_wait.h. */
#include "calls.h"

#include "poll_wait.h"
#include "scratch.h"
#include "sleep.h"

/* The program's own call, while its connections can't move to rings. */
static int call_kernel(struct pollfd *fds, nfds_t count, int ms, const struct timespec *timeout,
                       const sigset_t *mask, bool precise)
{
        uint64_t few[POLL_FEW], *keys = few;
        struct scratch own;
        bool all_on_tcp;
        int ready = 0;

        if (count > POLL_FEW)
                keys = scratch_take(SCRATCH_KERNEL, count * sizeof *keys, &own);
        if (!keys)
                return -1;
        all_on_tcp = poll_kernel_begin(fds, count, keys);
        if (all_on_tcp)
                ready = precise ? real()->ppoll(fds, count, timeout, mask) : real()->poll(fds, count, ms);
        poll_kernel_end(count, keys);
        if (count > POLL_FEW)
                scratch_return(SCRATCH_KERNEL, &own);
        return all_on_tcp ? ready
                          : poll_wait(fds, count, precise ? sleep_timespec(timeout) : sleep_ms(ms), mask);
}

/* Inlined: programs call it often. */
static inline __attribute__((always_inline)) int wait_or_call(struct pollfd *fds, nfds_t count, int ms,
                                                              const struct timespec *timeout,
                                                              const sigset_t *mask, bool precise)
{
        switch (process.on && fds ? poll_needs(fds, count) : POLL_KERNEL) {
        case POLL_RINGS:
                return poll_wait(fds, count, precise ? sleep_timespec(timeout) : sleep_ms(ms), mask);
        case POLL_KERNEL_COUNTED:
                return call_kernel(fds, count, ms, timeout, mask, precise);
        case POLL_KERNEL:
                break;
        }
        return precise ? real()->ppoll(fds, count, timeout, mask) : real()->poll(fds, count, ms);
}

CALL int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
        return sleep_is_timespec(timeout) ? wait_or_call(fds, count, 0, timeout, mask, true)
                                          : real()->ppoll(fds, count, timeout, mask);
}

CALL int poll(struct pollfd *fds, nfds_t count, int timeout)
{
        return wait_or_call(fds, count, timeout, NULL, NULL, false);
}

CALL int __poll_chk(struct pollfd *fds, nfds_t count, int timeout, size_t room)
{
        call_check(count, room / sizeof *fds);
        return poll(fds, count, timeout);
}

CALL int __ppoll_chk(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask,
                     size_t room)
{
        call_check(count, room / sizeof *fds);
        return ppoll(fds, count, timeout, mask);
}

ALSO(poll) int __poll(struct pollfd *, nfds_t, int);
