/* Confines itself as the relay does (dataplane/relay/confine.c) and then makes one system call, by
 * its name. It prints the call's errno; 0: it succeeded. */
#include "../../dataplane/relay/confine.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static const struct {
        const char *name;
        long call, first, second, third;
} calls[] = {
    {"execve", SYS_execve, (long)"/bin/true", 0, 0},
    {"ptrace", SYS_ptrace, 0, 0, 0},
    {"setns", SYS_setns, 0, 0, 0},
    {"unshare", SYS_unshare, CLONE_NEWNET, 0, 0},
    {"mount", SYS_mount, (long)"none", (long)"/", (long)"tmpfs"},
    {"bpf", SYS_bpf, 0, 0, 0},
    {"connect", SYS_connect, 0, 0, 0},
    {"pidfd_getfd", SYS_pidfd_getfd, 0, 0, 0},
    {"inet", SYS_socket, AF_INET, SOCK_STREAM, 0},
    {"netlink", SYS_socket, AF_NETLINK, SOCK_RAW, 0},
    {"unlink", SYS_unlink, (long)"/nothing", 0, 0},
    {"create", SYS_openat, AT_FDCWD, (long)"/tmp/nothing", O_CREAT | O_WRONLY},
    {"look", SYS_openat, AT_FDCWD, (long)"/proc/self/status", O_RDONLY},
    {"unknown", 100000, 0, 0, 0},
};

int main(int count, char **arguments)
{
        int error = confine();

        if (error || count != 2)
                return 1;
        for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
                if (strcmp(calls[i].name, arguments[1]) == 0) {
                        errno = 0;
                        syscall(calls[i].call, calls[i].first, calls[i].second, calls[i].third, 0600, 0, 0);
                        printf("%d\n", errno);
                        return 0;
                }
        return 1;
}
