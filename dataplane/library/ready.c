#include "ready.h"

#include "sys.h"

#include <poll.h>

_Atomic uint32_t ready_kernel_reports;

bool ready_behind(const struct end *end)
{
        struct pollfd polled = {.fd = end_next_descriptor(end, -1), .events = POLLIN | POLLRDHUP};
        struct timespec at_once = {0};

        return polled.fd < 0 || sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0) != 0;
}
