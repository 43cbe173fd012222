/* The device file of rdma_cm, as the program has it open. */
#ifndef FREEFLOW_CM_DEVICE_H
#define FREEFLOW_CM_DEVICE_H

#include <stdbool.h>

#define CM_DEVICE_FILE "/dev/infiniband/rdma_cm"

/* Connections can be made from now on: the device is there. */
void cm_start(void);

#endif
