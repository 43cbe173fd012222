/* Calls that receive. */
#ifndef FREEFLOW_RECEIVE_H
#define FREEFLOW_RECEIVE_H

#include "transfer.h"

ssize_t transfer_receive(struct operation *operation, struct end *end, uint64_t key);

#endif
