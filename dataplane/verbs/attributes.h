/* What the device says of itself: its limits, its port, its GIDs and its only partition. */
#ifndef FREEFLOW_ATTRIBUTES_H
#define FREEFLOW_ATTRIBUTES_H

#include "verb.h"

/* For the operations of a context. Each writes no more than `size` bytes. */
int attributes_device(struct ibv_context *context, const struct ibv_query_device_ex_input *wanted,
                      struct ibv_device_attr_ex *to, size_t size);
int attributes_port(struct ibv_context *context, uint8_t number, struct ibv_port_attr *to, size_t size);

#endif
