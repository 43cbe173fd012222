/* epoll instances of this process, and what is registered in them.
 *
 * The kernel's own registrations stay: they say when TCP has news (the connection's end, bytes before the
 * ring or after it). What the ring says is found here. A registration whose connection receives or sends
 * through a ring is
 *
 *      ACTIVE   looked at by every epoll_wait(), on the instance's list
 *      ARMED    the instance's bell for this arena rings when something happens; then it is ACTIVE again
 *      OFF      EPOLLONESHOT has fired
 *
 * Nobody sleeps in the kernel while a registration is ACTIVE and not looked at: before a thread sleeps it
 * arms all, and who leaves with events while others sleep wakes one of them to do that.
 *
 * The bell is itself registered in the epoll instance, so an instance inside another one, or in poll(), wakes
 * those too.
 */
#ifndef FREEFLOW_POLLER_H
#define FREEFLOW_POLLER_H

#include "family.h"

#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>

/* Before any thread: false if there is no memory. */
/* How much zeroed memory it needs, and where to take it from: first the table that has one entry per end. */
size_t poller_memory(void);
void poller_start_ends(char **place);
void poller_start(char **place);
void poller_made(int epfd);
void poller_alias(int old, int new);
/* Does the call and keeps our part of it. */
int poller_control(int epfd, int operation, int fd, struct epoll_event *event);
/* timeout in ns, negative: for ever. `*ours` false: not an instance that we know, nothing was done. */
int poller_wait(int epfd, struct epoll_event *events, int size, int64_t timeout, const sigset_t *mask,
                bool *ours);
/* Under the receiver's lock, before `ready`: all registrations of this end are looked at from now on. */
bool poller_attach(struct end *end);
/* A sender went to the ring or left it: whose word on EPOLLOUT counts has changed. */
void poller_sender_changed(struct end *end);
void poller_sender_full(struct end *end);
/* The connection isn't looked at any more; the kernel's registrations stay. */
void poller_leave(int fd, uint64_t key);
/* The descriptor becomes one of another file, as by dup3(), which takes its place in all instances. */
void poller_replace(int fd, uint64_t key, int file, int flags);
/* The descriptor is about to be closed. */
void poller_closed(int fd);
void poller_forked(void);
/* The end's number means another connection from now on. */
void poller_forget_end(uint32_t number);
bool poller_is(int fd);
/* For poll() and select() of an epoll instance: would epoll_wait() return something; arm what isn't. Returns
 * whether something may come of which nobody tells: then it is to be looked at now and then. */
bool poller_ready(int epfd);
bool poller_arm(int epfd);

#endif
