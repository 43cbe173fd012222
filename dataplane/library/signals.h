/* Would the kernel have gone on with a blocking call after the signal that has just been handled?
 *
 * read() and its kin go on if the handler was installed with SA_RESTART, and fail with EINTR if not. We wait
 * in ppoll(), which always fails, and can't see which handler ran. If all handlers agree, that doesn't
 * matter. If they don't, the signals of those without SA_RESTART are blocked while we wait and a signalfd
 * wakes us instead: then the handler runs as soon as the wait is over, and the call fails.
 */
#ifndef FREEFLOW_SIGNALS_H
#define FREEFLOW_SIGNALS_H

#include <poll.h>
#include <signal.h>
#include <stdbool.h>

struct signals {
        bool mixed; /* `polled` and `mask` are to be used */
        sigset_t mask;
        int fd;
};

/* Before a wait. */
void signals_prepare(struct signals *signals);
/* After a wait that failed with EINTR: go on waiting? */
bool signals_restart(const struct signals *signals);

#endif
