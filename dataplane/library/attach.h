/* The way of a connection to a slot: counted, requested, granted, compared.
 *
 * Every connection starts on TCP, and both directions count what goes over it. An end requests an
 * upgrade from the router once the rule is met (settings.h); an end that has fallen back is counted
 * anew (reentry.h). When it has a slot, its counters are
 * compared with the kernel's: a difference means that bytes have bypassed the library (io_uring,
 * raw system calls, the C library's streams), and the connection stays on TCP. Otherwise the end is
 * attached, and each direction moves as upgrade.h says.
 */
#ifndef FREEFLOW_ATTACH_H
#define FREEFLOW_ATTACH_H

#include "family.h"

struct timeval;

/* UNSURE: while other calls are in the kernel, or the connection isn't established, the figures
 * aren't exact. RAW: bytes have bypassed the library, or the kernel doesn't count them. */
enum verdict { EXACT, UNSURE, RAW };

/* Under both locks: compare the positions with the kernel's counters. */
enum verdict attach_compare(int fd, const struct end *end);

/* Once per call on a connection that isn't attached yet: count, request, take the answer. Returns
 * false if the connection isn't tracked any more. */
bool attach_step(int fd, struct end *end, uint64_t key, uint64_t bytes);
/* An end that isn't attached stays on TCP: another program got its descriptor. Each process of the
 * family untracks it at its next call. */
void attach_refuse(struct end *end, uint64_t key, uint32_t reason);
/* A socket option's time in ms; 0: none. */
uint32_t attach_timeout(const struct timeval *time);

#endif
