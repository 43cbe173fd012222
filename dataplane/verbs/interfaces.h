/* The network interface that has an address. */
#ifndef FREEFLOW_INTERFACES_H
#define FREEFLOW_INTERFACES_H

#include "verb.h"

#include <net/if.h>
#include <stdbool.h>

/* The number of the interface that has a GID's address; 0: none, or the kernel doesn't tell. */
uint32_t interface_of(const union ibv_gid *gid);
/* Its name. False: there is none. */
bool interface_name(uint32_t number, char name[IFNAMSIZ]);

#endif
