/* The list of devices, with the only one if the container has it, and fork support, which nothing
 * needs: a registered page is no page that a device pins.
 */
#include "client.h"
#include "cm_device.h"
#include "direct_files.h"
#include "files.h"
#include "pair.h"
#include "port.h"

#include <errno.h>
#include <stdlib.h>

/* Its number among the devices of the host, of which no other is seen. */
enum { DEVICE_INDEX = 0 };

/* How long a program waits for the router's answer: a router that is there takes milliseconds. */
enum { PATIENCE = 2000 /* ms */ };

/* Libraries of cards ask whose a device is by what is behind the structure in their own: nobody's.
 */
static struct {
        struct ibv_device device;
        char nothing[1024];
} only = {.device = {.node_type = IBV_NODE_CA,
                     .transport_type = IBV_TRANSPORT_IB,
                     .name = DEVICE_NAME,
                     .dev_name = DEVICE_NAME,
                     .dev_path = SYSFS_VERBS,
                     .ibdev_path = SYSFS_DEVICE}};

VERB struct ibv_device **ibv_get_device_list(int *number)
{
        struct ibv_device **list = calloc(2, sizeof *list);
        bool there;

        if (client_open(PATIENCE)) {
                pair_start();
                cm_start();
                direct_files_start();
        }
        there = list && client_services() && port_is_active();
        if (there)
                list[0] = &only.device;
        if (number)
                *number = there;
        if (!list)
                errno = ENOMEM;
        return list;
}

VERB void ibv_free_device_list(struct ibv_device **list)
{
        free(list);
}

VERB const char *ibv_get_device_name(struct ibv_device *device)
{
        return device->name;
}

VERB __be64 ibv_get_device_guid(struct ibv_device *device)
{
        (void)device;
        return port_guid();
}

VERB int ibv_get_device_index(struct ibv_device *device)
{
        (void)device;
        return DEVICE_INDEX;
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
