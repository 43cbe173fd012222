/* The mappings of this process, line by line as /proc/PID/maps has them (proc_pid_maps(5)), read
 * without the C library.
 */
#ifndef FREEFLOW_PROCESS_MAPS_H
#define FREEFLOW_PROCESS_MAPS_H

#include "sys.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct process_maps {
        long fd;
        long got; /* of the last read: 0 at the end, a negative errno after an error */
        long at;
        char buffer[2048];
};

/* False: the kernel does not list them. */
static inline bool process_maps_open(struct process_maps *maps, const char *path)
{
        maps->fd = sys_4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
        maps->got = maps->at = 0;
        return maps->fd >= 0;
}

static inline void process_maps_close(const struct process_maps *maps)
{
        sys_1(SYS_close, maps->fd);
}

/* The next line, as much of it as fits. False: there is none, for a reason that `got` tells. */
static inline bool process_maps_line(struct process_maps *maps, char *line, size_t size)
{
        size_t length = 0;

        for (;;) {
                if (maps->at >= maps->got) {
                        maps->at = 0;
                        maps->got = sys_3(SYS_read, maps->fd, maps->buffer, sizeof maps->buffer);
                        if (maps->got <= 0)
                                return false;
                }
                if (maps->buffer[maps->at] == '\n')
                        break;
                if (length < size - 1)
                        line[length++] = maps->buffer[maps->at];
                maps->at++;
        }
        maps->at++;
        line[length] = 0;
        return true;
}

/* The number at `text`, which is put behind it. */
static inline uint64_t process_maps_number(const char **text, unsigned base)
{
        uint64_t number = 0;

        for (;; (*text)++) {
                char c = **text;
                unsigned digit = c >= '0' && c <= '9'   ? (unsigned)(c - '0')
                                 : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a' + 10)
                                                        : base;

                if (digit >= base)
                        return number;
                number = number * base + digit;
        }
}

#endif
