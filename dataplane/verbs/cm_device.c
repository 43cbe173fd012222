#include "cm_device.h"

#include "agent.h"
#include "client.h"
#include "cm_command.h"
#include "cm_steps.h"
#include "cm_table.h"
#include "files.h"

#include <errno.h>
#include <fcntl.h>

#define NUMBER_FILE "/sys/class/misc/rdma_cm/dev"

/* --- the file */

static int open_device(int flags)
{
        const struct freeflow_services *here = client_services();
        int fd;

        if (!here)
                return -ENODEV;
        mutex_take(&cm_mutex);
        fd = cm_file_open();
        if (fd >= 0 && !here->claim(fd)) {
                cm_file_free(cm_file_drop(fd));
                sys_1(SYS_close, fd);
                fd = -EMFILE;
        }
        mutex_release(&cm_mutex);
        if (fd >= 0 && !(flags & O_CLOEXEC))
                sys_3(SYS_fcntl, fd, F_SETFD, 0);
        if (fd >= 0 && (flags & O_NONBLOCK))
                sys_3(SYS_fcntl, fd, F_SETFL, O_NONBLOCK);
        return fd;
}

static bool is_device(int fd)
{
        return cm_file_is(fd);
}

static void closing(int fd)
{
        struct cm_file *file;
        struct cm_id *id, *next;

        /* In a child of fork() nothing is its own. */
        client_services();
        mutex_take(&cm_mutex);
        file = cm_file_drop(fd);
        for (id = file ? cm_id_from(0) : NULL; id; id = next) {
                uint32_t place = id->place;

                /* Ending one may end others. */
                if (id->file == file)
                        cm_end(id);
                next = cm_id_from(place + 1);
        }
        if (file)
                cm_file_free(file);
        mutex_release(&cm_mutex);
}

static void duplicated(int fd, int other)
{
        mutex_take(&cm_mutex);
        cm_file_add(fd, other);
        mutex_release(&cm_mutex);
}

/* --- the process */

static ssize_t write_device(int fd, const void *buffer, size_t size)
{
        return client_services() ? cm_write(fd, buffer, size) : -EIO;
}

static bool handle(struct verbs_message *message)
{
        return cm_handle(message);
}

/* Its descriptors stay open, and nothing comes any more. */
static void retired(void)
{
}

void cm_start(void)
{
        static const struct client_user user = {.handle = handle,
                                                .forked = cm_table_forget,
                                                .retired = retired,
                                                .write = write_device,
                                                .closing = closing,
                                                .duplicated = duplicated};
        static const struct file_device device = {
            .path = CM_DEVICE_FILE, .open = open_device, .is = is_device, .number = NUMBER_FILE};

        client_serve(&user);
        agent_visit(cm_turn);
        files_serve(&device);
}
