/* The process does something after which the library must keep out of it: it confines itself to the system
 * calls that it makes itself (seccomp), loads code that is bound past the library, or gets an io_uring.
 */
#ifndef FREEFLOW_RETIRE_H
#define FREEFLOW_RETIRE_H

#include <stdbool.h>
#include <stdint.h>

/* Bring all connections of this process back to TCP, and do nothing more: afterwards each call is the C
 * library's own. What the process and its family hold of the library is given back. */
void retire(uint32_t reason);
/* The same as soon as no lock is held: the next call on a connection does it. */
void retire_soon(uint32_t reason);
void retire_now_if_due(void);
/* Programs that this one becomes or starts are confined as well. */
void retire_heirs(void);

#endif
