/* Would the kernel have restarted a blocking call after the signal that has just been handled?
 *
 * The kernel restarts read() and similar calls if the handler was installed with SA_RESTART;
 * otherwise they fail with EINTR. The library waits in ppoll(), which always fails, and can't see
 * which handler ran. If all handlers have the flag, or none has, that doesn't matter. Otherwise the
 * library blocks the signals without SA_RESTART while it waits, and a signalfd ends the wait
 * instead: the handler runs as soon as the wait is over, and the call fails.
 */
#ifndef FREEFLOW_SIGNALS_H
#define FREEFLOW_SIGNALS_H

#include <signal.h>
#include <stdbool.h>

struct signals {
        bool mixed; /* some handlers have SA_RESTART and some don't: use `mask` and `fd` */
        sigset_t mask;
        int fd;
};

/* Before a wait. */
void signals_prepare(struct signals *signals);
/* After a wait that failed with EINTR: would the kernel have restarted the call? */
bool signals_restart(const struct signals *signals);

#endif
