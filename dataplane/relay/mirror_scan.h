/* What the processes here do in their rings: the relay scans the rings of active connections, makes
 * those idle that have been quiet for long, and reports what processes take while their connection
 * is idle. */
#ifndef FREEFLOW_RELAY_MIRROR_SCAN_H
#define FREEFLOW_RELAY_MIRROR_SCAN_H

#include "mirror.h"

/* Reads both rings. Invalid values break the connection. */
void mirror_scan(struct mirror *mirror);
/* Reads the ring that the process sends. False: it holds invalid values. */
bool mirror_scan_sent(struct mirror *mirror);

/* Scans all active connections. True: one has something to send. */
bool mirrors_scan(void);
bool mirrors_are_active(void);
/* Makes all active connections idle. False: one has something to send after all. */
bool mirrors_make_idle(void);
/* Scans what is due by time. Returns when to call it again; 0: never. */
uint64_t mirrors_scan_tick(uint64_t present);

#endif
