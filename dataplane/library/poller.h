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
 * The bell is itself registered in the epoll instance, so an instance inside another one, or in poll(), wakes
 * those too.
 *
 * Several threads may wait in one instance, and others may use its connections meanwhile. No wake-up is lost,
 * because of this: while a thread sleeps in an instance, or outside of it because of it, no registration of
 * the instance is ACTIVE, unless
 *
 *      - a nudge is there (an eventfd in the instance, which wakes one sleeper), or
 *      - a thread is awake in poller_wait() and hasn't returned to the program.
 *
 * All of it happens under the poller's lock, and this keeps it so:
 *
 *      - A thread that is about to sleep arms all that is ACTIVE, looks at each once more, and counts
 *        itself as a sleeper before it lets the lock go. One that found no ring at all counts itself
 *        first, then looks whether there is one.
 *      - The kernel tells one thread of a bell, a nudge or news of TCP, even one that doesn't wait. What
 *        that thread leaves ACTIVE when it returns, with events or without, it arms; if there is
 *        something to report, or the other side can't ring yet, it nudges (watch()).
 *      - So does whoever makes a registration ACTIVE: by epoll_ctl(), or because its connection has
 *        moved, or left a ring.
 *      - ARMED means that the bell will ring for all that the registration wants and that isn't there. An
 *        edge-triggered one that has been told of room isn't to hear of it again before a sender has
 *        found none: that sender makes it ACTIVE (poller_sender_full()).
 *
 * A thread may be late with what the kernel told it. By then the registration may have been changed, moved or
 * replaced; each time it gets another name, and what comes under an old one is dropped. Nothing is lost by
 * that: the change made the kernel look again.
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
/* Under the receiver's lock, after the phase and before `ready`: all registrations of this end are looked at
 * from now on. False: that can't be. */
bool poller_attach(struct end *end);
/* A sender went to the ring or left it: whose word on EPOLLOUT counts has changed. */
void poller_sender_changed(struct end *end);
/* A receiver has come to the ring's first byte, or behind its last: there may be more of which nobody tells
 * any more, and a read has said that there is none. */
void poller_receiver_changed(struct end *end);
/* Under the sender's lock: a sender has found no room. */
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
