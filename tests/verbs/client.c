/* A program that asks for devices, as it is told on its standard input. Each line is a command, and
 * is answered by one:
 *
 *      list            the devices' names
 *      open            0, or an errno
 *      gids            the last byte of each GID and its place, or an errno
 *      event           the type of the next asynchronous event; -1: none
 *      fork            the child answers from now on: 0
 *      confine         give up system calls, by a filter that allows all: 0
 */
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static struct ibv_context *context;

static void list(void)
{
        int count;
        struct ibv_device **devices = ibv_get_device_list(&count);

        for (int i = 0; i < count; i++)
                printf("%s ", ibv_get_device_name(devices[i]));
        puts(devices ? "" : "none");
        ibv_free_device_list(devices);
}

static void open_first(void)
{
        struct ibv_device **devices = ibv_get_device_list(NULL);

        errno = 0;
        context = devices && devices[0] ? ibv_open_device(devices[0]) : NULL;
        if (context)
                fcntl(context->async_fd, F_SETFL, O_NONBLOCK);
        printf("%d\n", context ? 0 : errno ? errno : ENODEV);
        ibv_free_device_list(devices);
}

static void gids(void)
{
        union ibv_gid gid;

        for (int i = 0; i < 200; i++) {
                if (ibv_query_gid(context, 1, i, &gid) < 0) {
                        printf("%s\n", errno == EINVAL ? "" : strerror(errno));
                        return;
                }
                if (gid.global.interface_id)
                        printf("%d=%u ", i, gid.raw[15]);
        }
}

static void event(void)
{
        struct ibv_async_event found = {.event_type = -1};

        if (ibv_get_async_event(context, &found) == 0)
                ibv_ack_async_event(&found);
        printf("%d\n", (int)found.event_type);
}

static void become_child(void)
{
        int status;
        pid_t child = fork();

        if (child) {
                waitpid(child, &status, 0);
                _exit(WEXITSTATUS(status));
        }
        puts("0");
}

static void confine(void)
{
        struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog filter = {.len = 1, .filter = &all};

        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        printf("%d\n", prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) < 0 ? errno : 0);
}

int main(void)
{
        static const struct {
                const char *name;
                void (*run)(void);
        } commands[] = {
            {"list", list},   {"open", open_first},   {"gids", gids},
            {"event", event}, {"fork", become_child}, {"confine", confine},
        };
        char line[32];

        /* No line of the parent's is read by a child. */
        setvbuf(stdin, NULL, _IONBF, 0);
        while (fgets(line, sizeof line, stdin)) {
                line[strcspn(line, "\n")] = 0;
                for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
                        if (strcmp(line, commands[i].name) == 0)
                                commands[i].run();
                fflush(stdout);
        }
        return 0;
}
