/* The library doesn't see what a program requests of the kernel by an io_uring: it could wait there
 * for what comes through a ring, or send past it. A program that makes one by the C library's
 * syscall() is noticed at once (calls_system.c). Others make the system call themselves, and only
 * the list of descriptors shows it.
 */
#ifndef FREEFLOW_IO_URING_H
#define FREEFLOW_IO_URING_H

#include <stdbool.h>
#include <stdint.h>

/* Scan the list, unless the last scan was less than `pause` ns ago, or scans have taken more than
 * 1/20 of the time. If the process has an io_uring, it will retire at the next call on a
 * connection. */
bool io_uring_is_there(uint64_t pause);
/* A connection has moved, so that the list is worth scanning from time to time. */
bool io_uring_matters(void);

#endif
