/* The files of the device in /sys and /dev, for programs that read them. */
#ifndef FREEFLOW_FILES_H
#define FREEFLOW_FILES_H

#include <stdbool.h>
#include <stddef.h>

enum { FILE_TEXT = 128 /* bytes of the longest text, with its end */ };

#define DEVICE_NAME "freeflow0"
#define SYSFS_FOLDER "/sys/class/infiniband" /* that all paths begin with */
#define SYSFS_DEVICE SYSFS_FOLDER "/" DEVICE_NAME
#define SYSFS_VERBS SYSFS_FOLDER "_verbs/" DEVICE_NAME

/* The text of a file of sysfs, whose path has no unnecessary parts: one line. False: the device has
 * no such file. */
bool file_text(const char *path, char text[FILE_TEXT]);
/* From now on programs can open the files themselves. */
void files_show(void);

/* A file of /dev/infiniband. */
struct file_device {
        const char *path;
        /* A new descriptor, or a negative errno. */
        int (*open)(int flags);
        bool (*is)(int fd);
        /* The file in sysfs that has the number of the real device, on hosts with one. */
        const char *number;
};

/* Programs can open this one as well. */
void files_serve(const struct file_device *device);

#endif
