/* A connection in children that become another program, however they are made, and in many children
 * at once.
 */
#include "pair.h"

#include <sched.h>
#include <wordexp.h>

#ifdef __GLIBC__
#define GLIBC_IS(major, minor) __GLIBC_PREREQ(major, minor)
#else
#define GLIBC_IS(major, minor) 0
#endif

static char *hello[] = {"echo", "hello", NULL};

static void finish(pid_t child)
{
        int status;

        CHECK(waitpid(child, &status, 0) == child);
        CHECK(status == 0);
}

/* The peer in most scenarios: receives from the child, then from the parent, and answers. */
static void hear(int fd)
{
        get(fd, "hello\n");
        get(fd, "after");
        put(fd, "k");
        get(fd, "z");
        put(fd, "y");
}

/* The parent sends after its child. */
static void go_on(int fd)
{
        put(fd, "after");
        get(fd, "k");
        put(fd, "z");
        get(fd, "y");
}

static void closes_on_exec(int fd)
{
        CHECK(fcntl(fd, F_SETFD, FD_CLOEXEC) == 0);
}

static void vfork_dup2(int fd)
{
        pid_t child;

        closes_on_exec(fd);
        child = vfork();
        if (child == 0) {
                dup2(fd, 1);
                execv("/bin/echo", hello);
                _exit(1);
        }
        finish(child);
        go_on(fd);
}

static void vfork_dup3(int fd)
{
        pid_t child;

        closes_on_exec(fd);
        child = vfork();
        if (child == 0) {
                dup3(fd, 1, 0);
                execve("/bin/echo", hello, environ);
                _exit(1);
        }
        finish(child);
        go_on(fd);
}

/* By way of a second descriptor, as programs do that keep 0, 1 and 2 free for the standard streams.
 */
static void vfork_by_number(int fd)
{
        pid_t child;

        closes_on_exec(fd);
        child = vfork();
        if (child == 0) {
                int high = fcntl(fd, F_DUPFD_CLOEXEC, 60);

                close(fd);
                dup2(high, 1);
                execvp("echo", hello);
                _exit(1);
        }
        finish(child);
        go_on(fd);
}

static void vfork_flags(int fd)
{
        char command[32];
        char *shell[] = {"sh", "-c", command, NULL};
        pid_t child;

        closes_on_exec(fd);
        snprintf(command, sizeof command, "echo hello >&%d", fd);
        child = vfork();
        if (child == 0) {
                fcntl(fd, F_SETFD, 0);
                execv("/bin/sh", shell);
                _exit(1);
        }
        finish(child);
        go_on(fd);
}

/* In the child the connection's descriptor is a file: what the program writes there must not reach
 * the peer. */
static void vfork_number_again(int fd)
{
        char command[64];
        char *shell[] = {"sh", "-c", command, NULL};
        pid_t child;

        snprintf(command, sizeof command, "echo nothing >&%d", fd);
        child = vfork();
        if (child == 0) {
                int file = open("/dev/null", O_WRONLY);

                dup2(file, fd);
                execv("/bin/sh", shell);
                _exit(1);
        }
        finish(child);
        put(fd, "hello\n");
        go_on(fd);
}

static void clone_vfork_child(int *fd)
{
        dup2(*fd, 1);
        execv("/bin/echo", hello);
        _exit(1);
}

static int call_child(void *fd)
{
        clone_vfork_child(fd);
        return 1;
}

static void clone_vfork(int fd)
{
        static char stack[65536] __attribute__((aligned(16)));
        pid_t child;

        closes_on_exec(fd);
        child = clone(call_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, &fd);
        CHECK(child > 0);
        finish(child);
        go_on(fd);
}

static int call_copied(void *fd)
{
        put(*(int *)fd, "hello\n");
        close(*(int *)fd);
        _exit(0);
}

/* A child with its own memory that clone() makes, not fork(). */
static void clone_copied(int fd)
{
        static char stack[65536] __attribute__((aligned(16)));
        pid_t child = clone(call_copied, stack + sizeof stack, SIGCHLD, &fd);

        CHECK(child > 0);
        finish(child);
        go_on(fd);
}

/* The child reads the bytes that arrived before it began; then both use one stream. */
static void vfork_stdin(int fd)
{
        pid_t child;

        closes_on_exec(fd);
        while (!ready(fd, POLLIN, 1000))
                continue;
        nap(100);
        child = vfork();
        if (child == 0) {
                char *head[] = {"sh", "-c", "read line; echo \"heard $line\"", NULL};

                dup2(fd, 0);
                dup2(fd, 1);
                execv("/bin/sh", head);
                _exit(1);
        }
        finish(child);
        put(fd, "after");
        get(fd, "k");
        put(fd, "z");
        get(fd, "y");
}

static void say_line(int fd)
{
        put(fd, "line\n");
        get(fd, "heard line\n");
        get(fd, "after");
        put(fd, "k");
        get(fd, "z");
        put(fd, "y");
}

/* A command that a child runs does not read the parent's bytes. */
static void vfork_beside(int fd)
{
        pid_t child;

        while (!ready(fd, POLLIN, 1000))
                continue;
        nap(100);
        child = vfork();
        if (child == 0) {
                execlp("true", "true", (char *)NULL);
                _exit(1);
        }
        finish(child);
        get(fd, "line\n");
        put(fd, "heard line\n");
        go_on(fd);
}

enum by { SPAWN, SPAWNP, PIDFD, PIDFDP };

static void spawn(int by, const posix_spawn_file_actions_t *actions, char **arguments)
{
        pid_t child = 0;
        siginfo_t info;
        char path[32];
        int pidfd;

        snprintf(path, sizeof path, "/bin/%s", arguments[0]);
        if (by == SPAWN)
                CHECK(posix_spawn(&child, path, actions, NULL, arguments, environ) == 0);
        if (by == SPAWNP)
                CHECK(posix_spawnp(&child, arguments[0], actions, NULL, arguments, environ) == 0);
#if GLIBC_IS(2, 39)
        if (by == PIDFD)
                CHECK(pidfd_spawn(&pidfd, path, actions, NULL, arguments, environ) == 0);
        if (by == PIDFDP)
                CHECK(pidfd_spawnp(&pidfd, arguments[0], actions, NULL, arguments, environ) == 0);
        if (by >= PIDFD) {
                CHECK(waitid(P_PIDFD, (id_t)pidfd, &info, WEXITED) == 0 && info.si_status == 0);
                return;
        }
#else
        (void)info, (void)pidfd;
        if (by >= PIDFD)
                CHECK(posix_spawnp(&child, arguments[0], actions, NULL, arguments, environ) == 0);
#endif
        finish(child);
}

static void spawned_out(int fd, int by)
{
        posix_spawn_file_actions_t actions;

        closes_on_exec(fd);
        CHECK(posix_spawn_file_actions_init(&actions) == 0);
        CHECK(posix_spawn_file_actions_adddup2(&actions, fd, 1) == 0);
        CHECK(posix_spawn_file_actions_addclose(&actions, fd) == 0);
        spawn(by, &actions, hello);
        CHECK(posix_spawn_file_actions_destroy(&actions) == 0);
        go_on(fd);
}

static void spawn_dup2(int fd)
{
        spawned_out(fd, SPAWN);
}

static void spawnp_dup2(int fd)
{
        spawned_out(fd, SPAWNP);
}

static void pidfd_spawn_dup2(int fd)
{
        spawned_out(fd, PIDFD);
}

static void pidfd_spawnp_dup2(int fd)
{
        spawned_out(fd, PIDFDP);
}

/* dup2 of a descriptor onto itself: it stays open in the child. */
static void spawn_same(int fd)
{
        char command[32], *shell[] = {"sh", "-c", command, NULL};
        posix_spawn_file_actions_t actions;

        closes_on_exec(fd);
        snprintf(command, sizeof command, "echo hello >&%d", fd);
        CHECK(posix_spawn_file_actions_init(&actions) == 0);
        CHECK(posix_spawn_file_actions_adddup2(&actions, fd, fd) == 0);
        spawn(SPAWN, &actions, shell);
        go_on(fd);
}

/* No file action names the connection: it stays open in the child. */
static void spawn_left_open(int fd)
{
        char command[32], *shell[] = {"sh", "-c", command, NULL};
        posix_spawn_file_actions_t actions;

        snprintf(command, sizeof command, "echo hello >&%d", fd);
        CHECK(posix_spawn_file_actions_init(&actions) == 0);
        CHECK(posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0) == 0);
        spawn(SPAWN, &actions, shell);
        go_on(fd);
}

/* The file actions were made before a connection had this descriptor. */
static void spawn_made_before(int unused)
{
        posix_spawn_file_actions_t actions;
        int fd, wanted = dup(2);

        (void)unused;
        close(wanted);
        CHECK(posix_spawn_file_actions_init(&actions) == 0);
        CHECK(posix_spawn_file_actions_adddup2(&actions, wanted, 1) == 0);
        fd = dial();
        CHECK(fd == wanted);
        closes_on_exec(fd);
        warm_up(fd);
        spawn(SPAWN, &actions, hello);
        go_on(fd);
}

static void hear_one(int listener)
{
        int fd = accept(listener, NULL, NULL);

        CHECK(fd >= 0);
        warm_up_server(fd);
        hear(fd);
}

/* One action replaces the connection, and one closes all descriptors above it. */
static void spawn_replaced(int fd)
{
        char command[32], *shell[] = {"sh", "-c", command, NULL};
        posix_spawn_file_actions_t actions;

        snprintf(command, sizeof command, "echo no >&%d", fd);
        CHECK(posix_spawn_file_actions_init(&actions) == 0);
        CHECK(posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_WRONLY, 0) == 0);
#if GLIBC_IS(2, 34)
        CHECK(posix_spawn_file_actions_addclosefrom_np(&actions, fd + 1) == 0);
#endif
        spawn(SPAWN, &actions, shell);
        put(fd, "hello\n");
        go_on(fd);
}

static void fork_execl(int fd)
{
        char number[16];
        pid_t child = fork();

        snprintf(number, sizeof number, "%d", fd);
        if (child == 0) {
                execl("/bin/sh", "sh", "-c", "echo hello >&$0", number, (char *)NULL);
                _exit(1);
        }
        finish(child);
        go_on(fd);
}

static void fork_execlp(int fd)
{
        char number[16];
        pid_t child = fork();

        snprintf(number, sizeof number, "%d", fd);
        if (child == 0) {
                execlp("sh", "sh", "-c", "echo hello >&$0", number, (char *)NULL);
                _exit(1);
        }
        finish(child);
        go_on(fd);
}

static void fork_execle(int fd)
{
        char *variables[] = {"WORD=hello", NULL}, number[16];
        pid_t child = fork();

        snprintf(number, sizeof number, "%d", fd);
        if (child == 0) {
                execle("/bin/sh", "sh", "-c", "echo $WORD >&$0", number, (char *)NULL, variables);
                _exit(1);
        }
        finish(child);
        go_on(fd);
}

/* _Fork() runs no fork handlers. */
static void raw_fork(int fd)
{
#if GLIBC_IS(2, 34)
        pid_t child = _Fork();
#else
        pid_t child = fork();
#endif

        if (child == 0) {
                put(fd, "hello\n");
                close(fd);
                _exit(0);
        }
        finish(child);
        go_on(fd);
}

static void by_system(int fd)
{
        char command[32];

        snprintf(command, sizeof command, "echo hello >&%d", fd);
        CHECK(system(command) == 0);
        go_on(fd);
}

static void by_popen(int fd)
{
        char command[32];
        FILE *stream;

        snprintf(command, sizeof command, "cat >&%d", fd);
        CHECK(stream = popen(command, "w"));
        CHECK(fputs("hello\n", stream) >= 0);
        CHECK(pclose(stream) == 0);
        go_on(fd);
}

static void by_wordexp(int fd)
{
        char words[32];
        wordexp_t found;

        snprintf(words, sizeof words, "$(echo hello >&%d)", fd);
        CHECK(wordexp(words, &found, 0) == 0);
        wordfree(&found);
        go_on(fd);
}

/* A new connection: if it moves, it does so when the child already has it. */
static void hear_young(int listener)
{
        int fd = accept(listener, NULL, NULL);

        CHECK(fd >= 0);
        for (int i = 0; i < 200; i++) {
                get(fd, "x");
                put(fd, "x");
        }
        hear(fd);
}

static void young(int unused)
{
        int ends[2], fd = dial();
        char command[64];
        FILE *stream;

        (void)unused;
        CHECK(pipe2(ends, O_CLOEXEC) == 0);
        snprintf(command, sizeof command, "read word; echo $word >&%d", fd);
        CHECK(stream = popen(command, "w"));
        for (int i = 0; i < 200; i++) {
                nap(i < 30);
                put(fd, "x");
                get(fd, "x");
        }
        CHECK(fputs("hello\n", stream) >= 0);
        CHECK(pclose(stream) == 0);
        go_on(fd);
}

/* Many children that close what they inherited. */
static void many(int fd, int count, bool kills)
{
        pid_t *children = calloc((size_t)count, sizeof *children);
        int ends[2];

        CHECK(children && pipe(ends) == 0);
        for (int i = 0; i < count; i++) {
                CHECK((children[i] = fork()) >= 0);
                if (children[i])
                        continue;
                close(ends[1]);
                (void)!read(ends[0], (char[1]){0}, 1);
                if (kills && i % 2)
                        raise(SIGKILL);
                close(fd);
                if (i % 3)
                        _exit(0);
                exit(0);
        }
        for (int i = 0; i < 20; i++) {
                put(fd, "x");
                get(fd, "x");
        }
        close(ends[0]);
        close(ends[1]);
        for (int i = 0; i < count; i++) {
                int status;

                CHECK(waitpid(children[i], &status, 0) == children[i]);
                CHECK(status == (kills && i % 2 ? SIGKILL : 0));
        }
        for (int i = 0; i < 20; i++) {
                put(fd, "x");
                get(fd, "x");
        }
        free(children);
}

static void children8(int fd)
{
        many(fd, 8, false);
        many(fd, 8, true);
        many(fd, 64, false);
}

static void children300(int fd)
{
        many(fd, 300, true);
        many(fd, 8, false);
}

static void echo(int fd)
{
        char bytes[4096];
        ssize_t got;

        while ((got = read(fd, bytes, sizeof bytes)) > 0)
                put_all(fd, bytes, (size_t)got);
        CHECK(got == 0);
}

/* The connection ends when the last of its holders closes it, whichever that is, and not before. */
static void last_of_many(int fd)
{
        int ends[2];

        CHECK(pipe(ends) == 0);
        for (int i = 0; i < 6; i++) {
                pid_t child = fork();

                CHECK(child >= 0);
                if (child)
                        continue;
                close(ends[1]);
                (void)!read(ends[0], (char[1]){0}, 1);
                if (i < 5)
                        _exit(0);
                nap(200);
                put(fd, "last");
                get(fd, "last");
                CHECK(shutdown(fd, SHUT_WR) == 0);
                get_end(fd);
                exit(0);
        }
        close(fd);
        close(ends[0]);
        close(ends[1]);
        for (int i = 0, status; i < 6; i++)
                CHECK(wait(&status) > 0 && status == 0);
}

/* A process that makes itself a daemon keeps its connection. */
static void made_daemon(int fd)
{
        int ends[2];
        pid_t child;
        char byte;

        CHECK(pipe(ends) == 0);
        CHECK((child = fork()) >= 0);
        if (child == 0) {
                CHECK(daemon(1, 1) == 0);
                put(fd, "hello\n");
                go_on(fd);
                CHECK(write(ends[1], "x", 1) == 1);
                _exit(0);
        }
        close(fd);
        close(ends[1]);
        CHECK(read(ends[0], &byte, 1) == 1);
        finish(child);
}

/* A child in a new PID namespace closes its copy, and does not take its parent for dead. */
static void counted_anew(int fd)
{
        pid_t child;

        if (unshare(CLONE_NEWPID) < 0) {
                fprintf(stderr, "missing: the right to have a namespace of process IDs\n");
                _exit(77);
        }
        CHECK((child = fork()) >= 0);
        if (!child) {
                close(fd);
                _exit(0);
        }
        finish(child);
        put(fd, "hello\n");
        go_on(fd);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"vfork_dup2", hear, vfork_dup2, false},
            {"vfork_dup3", hear, vfork_dup3, false},
            {"vfork_by_number", hear, vfork_by_number, false},
            {"vfork_flags", hear, vfork_flags, false},
            {"vfork_number_again", hear, vfork_number_again, false},
            {"vfork_stdin", say_line, vfork_stdin, false},
            {"vfork_beside", say_line, vfork_beside, false},
            {"clone_vfork", hear, clone_vfork, false},
            {"clone_copied", hear, clone_copied, false},
            {"spawn_dup2", hear, spawn_dup2, false},
            {"spawnp_dup2", hear, spawnp_dup2, false},
            {"pidfd_spawn_dup2", hear, pidfd_spawn_dup2, false},
            {"pidfd_spawnp_dup2", hear, pidfd_spawnp_dup2, false},
            {"spawn_same", hear, spawn_same, false},
            {"spawn_left_open", hear, spawn_left_open, false},
            {"spawn_made_before", hear_one, spawn_made_before, true},
            {"spawn_replaced", hear, spawn_replaced, false},
            {"fork_execl", hear, fork_execl, false},
            {"fork_execlp", hear, fork_execlp, false},
            {"fork_execle", hear, fork_execle, false},
            {"raw_fork", hear, raw_fork, false},
            {"by_system", hear, by_system, false},
            {"by_popen", hear, by_popen, false},
            {"by_wordexp", hear, by_wordexp, false},
            {"young", hear_young, young, true},
            {"children8", echo, children8, false},
            {"children300", echo, children300, false},
            {"last_of_many", echo, last_of_many, false},
            {"counted_anew", hear, counted_anew, false},
            {"made_daemon", hear, made_daemon, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
