#include "own.h"

#include "hooks.h"
#include "sys.h"

#include <fcntl.h>
#include <sys/resource.h>

int own_descriptor(int fd)
{
        struct rlimit limit = {.rlim_cur = 1024};
        long floor, moved;
        int32_t high;

        if (fd < 0)
                return -1;
        sys_4(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, &limit);
        /* Not at the very top of a large table: the kernel's table, which fork copies, reaches to
         * the highest one. */
        floor = limit.rlim_cur > 4096 ? 3072 : (long)limit.rlim_cur / 4 * 3;
        moved = sys_3(SYS_fcntl, fd, F_DUPFD_CLOEXEC, floor);
        sys_1(SYS_close, fd);
        if (moved < 0)
                return -1;
        if (moved >= DESCRIPTORS) {
                sys_1(SYS_close, moved);
                return -1;
        }
        fd_set_word((int)moved, FD_OWN);
        high = atomic_load(&process.own_high);
        while (moved >= high && !atomic_compare_exchange_weak(&process.own_high, &high, (int32_t)moved + 1))
                ;
        return (int)moved;
}

bool is_own_descriptor(int fd)
{
        return process.on && (unsigned)fd < DESCRIPTORS && (uint32_t)load_relaxed(&process.fds[fd]) == FD_OWN;
}

void close_own(int fd)
{
        fd_set_word(fd, 0);
        sys_1(SYS_close, fd);
}

void own_lost(void)
{
        for (int fd = 0; fd < DESCRIPTORS && fd < atomic_load(&process.own_high); fd++)
                if (is_own_descriptor(fd) && sys_2(SYS_fcntl, fd, F_GETFD) < 0)
                        fd_set_word(fd, 0);
        hooks.descriptors_lost();
}

/* linux/dirent.h isn't given to programs. */
struct entry {
        uint64_t inode;
        int64_t offset;
        uint16_t size;
        uint8_t type;
        char name[];
};

static int number_named(const char *name)
{
        int number = 0;

        for (; *name >= '0' && *name <= '9'; name++)
                number = number * 10 + (*name - '0');
        return *name ? -1 : number;
}

enum visited each_descriptor(int first, bool (*visit)(int fd, const char *link))
{
        _Alignas(struct entry) char buffer[2048];
        long list = sys_4(SYS_openat, AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
        long got = 0;
        bool on = true;

        if (list < 0)
                return VISITED_NONE;
        while (on && (got = sys_3(SYS_getdents64, list, buffer, sizeof buffer)) > 0)
                for (long at = 0; on && at < got;) {
                        const struct entry *entry = (const struct entry *)(const void *)(buffer + at);
                        int fd = number_named(entry->name);
                        char link[64];
                        long size;

                        at += entry->size;
                        if (fd < first || fd == list || entry->name[0] == '.')
                                continue;
                        size = sys_4(SYS_readlinkat, list, entry->name, link, sizeof link - 1);
                        link[size > 0 ? size : 0] = 0;
                        on = visit(fd, link);
                }
        sys_1(SYS_close, list);
        return !on ? VISITED_SOME : got < 0 ? VISITED_NONE : VISITED_ALL;
}
