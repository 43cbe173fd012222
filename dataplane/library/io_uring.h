/* What a program asks the kernel by an io_uring we don't see: it could wait there for what comes through a
 * ring of ours, or send past it. A program that makes one by the C library's syscall() is seen to
 * (calls_system.c); others make the call themselves, and only the list of descriptors says so.
 */
#ifndef FREEFLOW_IO_URING_H
#define FREEFLOW_IO_URING_H

#include <stdbool.h>
#include <stdint.h>

/* Look through the list, unless that was done less than `pause` ns ago, or as good as all the time is spent
 * with it. Who finds one has the process retire, at the next call on a connection. */
bool io_uring_is_there(uint64_t pause);
/* Before a thread sleeps, without a lock: now and then the same, and retire. */
void io_uring_check(void);

#endif
