/* Files of sysfs, which librdmacm and programs read through libibverbs. */
#include "verb.h"

#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

VERB const char *ibv_get_sysfs_path(void);
VERB const char *ibv_get_sysfs_path(void)
{
        return "/sys";
}

/* Read a file whole, without its last line's end. Returns its length or -1. */
VERB int ibv_read_sysfs_file(const char *folder, const char *file, char *text, size_t size);
VERB int ibv_read_sysfs_file(const char *folder, const char *file, char *text, size_t size)
{
        size_t before = strlen(folder), after = strlen(file);
        char path[PATH_MAX];
        ssize_t got;
        int fd;

        if (before + after + 2 > sizeof path)
                return -1;
        memcpy(path, folder, before);
        path[before] = '/';
        memcpy(path + before + 1, file, after + 1);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return -1;
        got = read(fd, text, size);
        close(fd);
        if (got > 0 && text[got - 1] == '\n')
                text[--got] = 0;
        else if (got >= 0 && (size_t)got < size)
                text[got] = 0;
        return (int)got;
}
