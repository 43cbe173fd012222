/* Files of sysfs, which librdmacm and programs read through libibverbs. Those of the device are
 * none of the kernel's.
 */
#include "files.h"
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

/* Read a file whole. Returns its length or -1. */
static ssize_t read_whole(const char *path, char *text, size_t size)
{
        char own[FILE_TEXT];
        ssize_t got;
        int fd;

        if (file_text(path, own)) {
                size_t length = strlen(own);

                length = length < size ? length : size;
                memcpy(text, own, length);
                return (ssize_t)length;
        }
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return -1;
        got = read(fd, text, size);
        close(fd);
        return got;
}

/* Read a file whole, without its last line's end. Returns its length or -1. */
VERB int ibv_read_sysfs_file(const char *folder, const char *file, char *text, size_t size);
VERB int ibv_read_sysfs_file(const char *folder, const char *file, char *text, size_t size)
{
        size_t before = strlen(folder), after = strlen(file);
        char path[PATH_MAX];
        ssize_t got;

        if (before + after + 2 > sizeof path)
                return -1;
        memcpy(path, folder, before);
        path[before] = '/';
        memcpy(path + before + 1, file, after + 1);
        got = read_whole(path, text, size);
        if (got > 0 && text[got - 1] == '\n')
                text[--got] = 0;
        else if (got >= 0 && (size_t)got < size)
                text[got] = 0;
        return (int)got;
}
