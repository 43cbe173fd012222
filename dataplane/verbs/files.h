/* What the files of the device in /sys and /dev say, for programs that read them. */
#ifndef FREEFLOW_FILES_H
#define FREEFLOW_FILES_H

#include <stdbool.h>
#include <stddef.h>

enum { FILE_TEXT = 128 /* bytes of the longest text, with its end */ };

#define DEVICE_NAME "freeflow0"
#define SYSFS_DEVICE "/sys/class/infiniband/" DEVICE_NAME
#define SYSFS_VERBS "/sys/class/infiniband_verbs/" DEVICE_NAME

/* The text of a file of sysfs, whose path has no unnecessary parts: one line. False: the device has
 * no such file. */
bool file_text(const char *path, char text[FILE_TEXT]);

#endif
