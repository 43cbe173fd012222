#include "kernel_file.h"

#include "sys.h"

#include <fcntl.h>
#include <string.h>

uint64_t kernel_file_number(const char *path)
{
        char text[32];
        uint64_t number = 0;
        long fd = sys_4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0), size;

        if (fd < 0)
                return UINT64_MAX;
        size = sys_3(SYS_read, fd, text, sizeof text);
        sys_1(SYS_close, fd);
        if (size <= 0 || text[0] < '0' || text[0] > '9')
                return UINT64_MAX;
        for (long i = 0; i < size && text[i] >= '0' && text[i] <= '9'; i++)
                number = number * 10 + (uint64_t)(text[i] - '0');
        return number;
}

/* The path in the line of /proc/self/cgroup whose controllers are `kind`. An empty string if there
 * is no such line. */
static const char *group_of_kind(const char *text, const char *kind)
{
        for (size_t length = strlen(kind); *text; text += strcspn(text, "\n"), text += *text == '\n') {
                const char *line = text + strspn(text, "0123456789");

                if (strncmp(line, kind, length) == 0)
                        return line + length;
        }
        return text;
}

static char *append(char *end, const char *last, const char *text, size_t length)
{
        if (length >= (size_t)(last - end))
                length = (size_t)(last - end) - 1;
        memcpy(end, text, length);
        end[length] = 0;
        return end + length;
}

/* A file of the process's own control group. Where the group's path can't be seen from inside the
 * container, the file at the top of the hierarchy is the group's own. */
static uint64_t number_of_group(const char *top, const char *kind, const char *file)
{
        char path[1024], text[2048], *end, *last = path + sizeof path;
        long fd = sys_4(SYS_openat, AT_FDCWD, "/proc/self/cgroup", O_RDONLY | O_CLOEXEC, 0), size = 0;
        const char *group;
        uint64_t number;

        if (fd >= 0) {
                size = sys_3(SYS_read, fd, text, sizeof text - 1);
                sys_1(SYS_close, fd);
        }
        text[size > 0 ? size : 0] = 0;
        group = group_of_kind(text, kind);
        end = append(path, last, top, strlen(top));
        end = append(end, last, group, strcspn(group, "\n"));
        append(end, last, file, strlen(file));
        number = kernel_file_number(path);
        if (number != UINT64_MAX)
                return number;
        append(path + strlen(top), last, file, strlen(file));
        return kernel_file_number(path);
}

uint64_t kernel_file_memory_limit(void)
{
        uint64_t limit = number_of_group("/sys/fs/cgroup", "::", "/memory.max");

        return limit != UINT64_MAX
                   ? limit
                   : number_of_group("/sys/fs/cgroup/memory", ":memory:", "/memory.limit_in_bytes");
}
