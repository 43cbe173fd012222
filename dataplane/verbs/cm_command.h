/* The commands that librdmacm writes to its device. */
#ifndef FREEFLOW_CM_COMMAND_H
#define FREEFLOW_CM_COMMAND_H

#include <stddef.h>
#include <sys/types.h>

/* Execute what is written to a descriptor of the device. Returns `size` or a negative errno. Takes
 * cm_mutex. */
ssize_t cm_write(int fd, const void *buffer, size_t size);

#endif
