/* Calls that send. */
#ifndef FREEFLOW_SEND_H
#define FREEFLOW_SEND_H

#include "transfer.h"

ssize_t transfer_send(struct operation *operation, struct end *end, uint64_t key);

#endif
