/* An eventfd that programs poll, or block in. It counts what is queued for them, as a semaphore:
 * whoever has read one from it takes one from the queue, or reads again if there is none.
 */
#ifndef FREEFLOW_COUNTER_H
#define FREEFLOW_COUNTER_H

#include "../library/sys.h"

#include <linux/fs.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

/* Returns the descriptor, or a negative errno. */
static inline int counter_make(void)
{
        return (int)sys_2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_SEMAPHORE);
}

static inline void counter_add(int fd)
{
        uint64_t one = 1;

        sys_3(SYS_write, fd, &one, sizeof one);
}

/* Wait for one as the program has chosen: read() may block, or be interrupted by a signal. False:
 * errno says why. */
static inline bool counter_wait(int fd)
{
        uint64_t one;

        return read(fd, &one, sizeof one) == sizeof one;
}

/* Something was dropped. If somebody has just read the eventfd for it, there is nothing to take. */
static inline void counter_drop(int fd)
{
        uint64_t one;
        struct iovec to = {.iov_base = &one, .iov_len = sizeof one};

        sys_6(SYS_preadv2, fd, &to, 1, -1, -1, RWF_NOWAIT);
}

#endif
