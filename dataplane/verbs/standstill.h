/* A moment in which no other thread of the process runs.
 *
 * Pages can't be replaced by others while some thread may write to them: what it stores between the
 * copy and the switch would be lost. So all other threads are stopped meanwhile, wherever they are,
 * by a helper that shares the process's memory and traces them (ptrace(2), PTRACE_INTERRUPT). No
 * signal is sent: it makes no difference what signals a thread blocks, or waits for. A system call
 * that is interrupted by this is restarted by the kernel, but for those that are never restarted
 * (signal(7)), of which epoll_wait() is the common one.
 *
 * It does not work where the kernel forbids tracing (seccomp, Yama, another tracer), nor while a
 * thread can't be interrupted. Then nothing has happened.
 */
#ifndef FREEFLOW_STANDSTILL_H
#define FREEFLOW_STANDSTILL_H

#include <stdbool.h>
#include <stdint.h>

/* Call `act` while all other threads stand still, on a stack of its own; the caller's signals are
 * blocked. It may make system calls, but use no function of a C library and no lock that another
 * thread may hold. False: they do not, and it was not called. */
bool standstill(void (*act)(void *argument), void *argument);
/* In a child of fork(): nobody is at it. */
void standstill_forget(void);
/* Called by `act`: has a thread its stack, or the block that its thread pointer leads to, between
 * these addresses? True also if that is not known. */
bool standstill_has_stack(uintptr_t first, uintptr_t end);

#endif
