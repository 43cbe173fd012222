/* The two calls on sockets that move bytes. Builds for tests put faults in their place
 * (tests/relay/tcp_faults.c). */
#ifndef FREEFLOW_RELAY_TCP_CALLS_H
#define FREEFLOW_RELAY_TCP_CALLS_H

#include <sys/socket.h>

#ifdef FREEFLOW_TEST
ssize_t tcp_sendmsg(int fd, const struct msghdr *header);
ssize_t tcp_recvmsg(int fd, struct msghdr *header);
#else
static inline ssize_t tcp_sendmsg(int fd, const struct msghdr *header)
{
        return sendmsg(fd, header, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static inline ssize_t tcp_recvmsg(int fd, struct msghdr *header)
{
        return recvmsg(fd, header, MSG_DONTWAIT);
}
#endif

#endif
