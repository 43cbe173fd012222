/* How poll() and select() wait for several descriptors, of which some are connections that use a
 * ring or epoll instances with such connections in them: see sleep.h.
 *
 * A call without such descriptors goes to the kernel. While it is there, none of its connections
 * may move to a ring, since the call wouldn't check it: poll_kernel_begin() counts it in
 * flow.kernel. A call that sleeps with bells knows them for the present slots: it is counted in
 * end.waits.
 */
#ifndef FREEFLOW_POLL_WAIT_H
#define FREEFLOW_POLL_WAIT_H

#include "family.h"

#include <poll.h>
#include <signal.h>

enum { POLL_FEW = 64 }; /* descriptors for which the stack has room */

/* How to poll the descriptors. */
enum poll_needs {
        POLL_KERNEL,         /* in the kernel */
        POLL_KERNEL_COUNTED, /* in the kernel, between poll_kernel_begin() and poll_kernel_end() */
        POLL_RINGS,          /* with poll_wait() */
};

/* `fds` isn't const: glibc declares poll() to write to it only, so gcc would warn. */
enum poll_needs poll_needs(struct pollfd *fds, nfds_t count);

/* `keys` has room for `count`. Returns false if one of the connections has moved to a ring by now,
 * or left one; then poll_wait() has to be called, after poll_kernel_end(). */
bool poll_kernel_begin(const struct pollfd *fds, nfds_t count, uint64_t *keys);
void poll_kernel_end(nfds_t count, const uint64_t *keys);

/* As ppoll(), with a timeout in ns; negative: without a time limit. */
int poll_wait(struct pollfd *fds, nfds_t count, int64_t timeout, const sigset_t *mask);

#endif
