/* The list of devices, which is empty as long as there is no device to offer, and fork support,
 * which nothing needs: a registered page is no page that a device pins.
 */
#include "verb.h"

#include <errno.h>
#include <stdlib.h>

VERB struct ibv_device **ibv_get_device_list(int *number)
{
        struct ibv_device **list = calloc(1, sizeof *list);

        if (number)
                *number = 0;
        if (!list)
                errno = ENOMEM;
        return list;
}

VERB void ibv_free_device_list(struct ibv_device **list)
{
        free(list);
}

VERB int ibv_fork_init(void)
{
        return 0;
}

VERB enum ibv_fork_status ibv_is_fork_initialized(void)
{
        return IBV_FORK_UNNEEDED;
}

VERB int ibv_dontfork_range(void *base, size_t size);
VERB int ibv_dontfork_range(void *base, size_t size)
{
        (void)base;
        (void)size;
        return 0;
}

VERB int ibv_dofork_range(void *base, size_t size);
VERB int ibv_dofork_range(void *base, size_t size)
{
        (void)base;
        (void)size;
        return 0;
}
