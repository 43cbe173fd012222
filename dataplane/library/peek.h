/* Receives that take nothing: with MSG_PEEK, or of no bytes, which wait all the same until there is
 * one. */
#ifndef FREEFLOW_PEEK_H
#define FREEFLOW_PEEK_H

#include "transfer.h"

ssize_t transfer_peek(struct operation *operation, struct end *end, uint64_t key);

#endif
