/* Numbers that the kernel states in files below /proc and /sys. */
#ifndef FREEFLOW_KERNEL_FILE_H
#define FREEFLOW_KERNEL_FILE_H

#include <stdint.h>

/* The decimal number at the start of a file, or UINT64_MAX if there is none. */
uint64_t kernel_file_number(const char *path);
/* The memory limit of the process's control group in bytes, or UINT64_MAX (cgroup v2: memory.max;
 * v1: memory.limit_in_bytes). */
uint64_t kernel_file_memory_limit(void);

#endif
