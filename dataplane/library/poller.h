/* The process's epoll instances, and the registrations in them.
 *
 * The kernel's own registrations stay. They report events of TCP: the connection's end, and bytes
 * before or after the ring. Events of rings are found here. A registration whose connection
 * receives or sends through a ring is in one of these states:
 *
 *      ACTIVE   every epoll_wait() checks its ring; it is on the instance's list
 *      ARMED    the bell of the instance for this arena rings when something happens: then ACTIVE
 *      OFF      EPOLLONESHOT has fired
 *
 * The bell is itself registered in the epoll instance. So it also wakes a thread that waits for
 * this instance in another one, or in poll().
 *
 * Several threads may wait in one instance while others use its connections. No wake-up is lost,
 * because of this invariant: while a thread sleeps in an instance, or elsewhere because of it, no
 * registration of the instance is ACTIVE, unless
 *
 *      - a wake-up is pending (the instance's eventfd is readable, which wakes one sleeper), or
 *      - a thread is awake in poller_wait() and has not returned to the program.
 *
 * Everything happens under the poller's lock. These files keep the invariant, each with its rules
 * at the top:
 *
 *      poller_wait.c      a thread goes to sleep, or leaves
 *      poller_arm.c       ACTIVE becomes ARMED, and a sleeper is woken to take over
 *      poller_control.c   ACTIVE because the program or the connection changed something
 *      poller_harvest.c   ACTIVE because the kernel or a bell reported something
 */
#ifndef FREEFLOW_POLLER_H
#define FREEFLOW_POLLER_H

#include "family.h"

#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>

/* How much zeroed memory the tables need. They are taken from the memory at `*place`, before there
 * are other threads: first the table that has one entry per end, then the rest. */
size_t poller_memory(void);
void poller_start_ends(char **place);
void poller_start(char **place);
/* A child of fork shares the kernel's instances with its parent, but has no bells in them yet. */
void poller_forked(void);

/* An epoll instance was made; it got one more descriptor. */
void poller_made(int epfd);
void poller_alias(int old, int new);
bool poller_is(int fd);

/* epoll_ctl() in the kernel and here. `*untracked`: the kernel has a registration of a connection
 * that isn't tracked here, so its ring would be missed. */
int poller_control(int epfd, int operation, int fd, struct epoll_event *event, bool *untracked);
/* epoll_pwait2() with a timeout in ns; negative: without a time limit. `*ours` is false for an
 * instance that isn't tracked; then nothing was done. */
int poller_wait(int epfd, struct epoll_event *events, int size, int64_t timeout, const sigset_t *mask,
                bool *ours);
/* For poll() and select() of an epoll instance: whether epoll_wait() would return something. */
bool poller_ready(int epfd);
/* Before a sleep in poll() or select(): arm the instance. Returns whether something may come that
 * no bell and no descriptor reports; then the sleep must be short. */
bool poller_arm(int epfd);

/* Under the receiver's lock, after the phase was set and before `ready`: check the ring for all
 * registrations of this end from now on. Returns false if that can't be. */
bool poller_attach(struct end *end);
/* A sender went to the ring or left it, so EPOLLOUT comes from elsewhere. */
void poller_sender_changed(struct end *end);
/* A receiver has reached the ring's first byte, or passed its last. There may be bytes that nothing
 * reports any more, and a read has returned EAGAIN. */
void poller_receiver_changed(struct end *end);
/* Neither direction uses a ring any more, and the slot goes: the kernel reports to the program from
 * now on. False: not now. */
bool poller_detach(struct end *end);
/* Under the sender's lock: a sender has found no room. */
void poller_sender_full(struct end *end);

/* The connection is no longer tracked: drop its registrations. `key` 0: all of the descriptor. The
 * kernel's own stay, or go with the descriptor. */
void poller_leave(int fd, uint64_t key);
/* As dup3(file, fd, flags): the new file takes the connection's place in all instances. */
void poller_replace(int fd, uint64_t key, int file, int flags);
/* The descriptor is about to be closed. */
void poller_closed(int fd);
/* The end's number means another connection from now on. */
void poller_forget_end(uint32_t number);

#endif
