/* Several processes, programs and descriptors of one connection. */
#include "pair.h"

/* The server of most scenarios: echoes until the end. */
static void echo(int fd)
{
        static char bytes[65536];
        ssize_t got;

        while ((got = read(fd, bytes, sizeof bytes)) > 0)
                put_all(fd, bytes, (size_t)got);
        CHECK(got == 0 || errno == ECONNRESET);
}

static void talk(int fd, int times)
{
        for (int i = 0; i < times; i++) {
                char line[64];

                snprintf(line, sizeof line, "message %d of process %d\n", i, getpid());
                put(fd, line);
                get(fd, line);
        }
}

static void finish(pid_t child)
{
        int status;

        CHECK(waitpid(child, &status, 0) == child);
        CHECK(status == 0);
}

/* Parent and child use the connection in turn, and the child's exit does not end it. */
static void fork_in_turn(int fd)
{
        for (int i = 0; i < 5; i++) {
                pid_t child = fork();

                CHECK(child >= 0);
                if (!child) {
                        talk(fd, 20);
                        if (i & 1)
                                exit(0);
                        _exit(0);
                }
                finish(child);
                talk(fd, 20);
        }
}

/* The parent writes while the child reads. */
static void fork_at_once(int fd)
{
        pid_t child = fork();

        CHECK(child >= 0);
        if (!child) {
                get_pattern(fd, 4 << 20);
                _exit(0);
        }
        put_pattern(fd, 4 << 20);
        finish(child);
        talk(fd, 20);
}

enum { SHARED = 6, ROUNDS = 400 };

/* Echoes bytes of all connections, until all have ended. */
static void answer_all(int epoll, const int *fds, _Atomic int *ended)
{
        while (*ended < SHARED) {
                struct epoll_event event;
                char byte;

                if (!epoll_wait(epoll, &event, 1, 1000))
                        continue;
                switch (recv(fds[event.data.u32], &byte, 1, MSG_DONTWAIT)) {
                case 1:
                        if (byte % 5 == 0)
                                nap(1);
                        CHECK(send(fds[event.data.u32], &byte, 1, 0) == 1);
                        break;
                case 0:
                        if (epoll_ctl(epoll, EPOLL_CTL_DEL, fds[event.data.u32], NULL) == 0)
                                (*ended)++;
                        break;
                default:
                        CHECK(errno == EAGAIN);
                }
        }
}

/* Parent and child wait in one epoll instance, which the kernel shares between them. */
static void share_epoll(int listener)
{
        _Atomic int *ended =
            mmap(NULL, sizeof *ended, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        int fds[SHARED], epoll = epoll_create1(0);
        pid_t child;

        CHECK(ended != MAP_FAILED);
        for (uint32_t i = 0; i < SHARED; i++) {
                struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};

                CHECK((fds[i] = accept(listener, NULL, NULL)) >= 0);
                warm_up_server(fds[i]);
                CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event) == 0);
        }
        CHECK((child = fork()) >= 0);
        answer_all(epoll, fds, ended);
        if (!child)
                _exit(0);
        finish(child);
}

static void ask_any(int listener)
{
        int fds[SHARED];

        (void)listener;
        for (int i = 0; i < SHARED; i++) {
                fds[i] = dial();
                warm_up(fds[i]);
        }
        for (int round = 0; round < ROUNDS; round++)
                for (int step = 0; step < 2; step++)
                        for (int i = 0; i < 1 + round % SHARED; i++) {
                                char byte = (char)round, got;
                                int fd = fds[(round + i) % SHARED];

                                if (!step)
                                        CHECK(send(fd, &byte, 1, 0) == 1);
                                else
                                        CHECK(recv(fd, &got, 1, 0) == 1 && got == byte);
                        }
        for (int i = 0; i < SHARED; i++)
                close(fds[i]);
}

/* A child that waits after its parent has exited. */
static void orphan(int fd)
{
        pid_t child = fork();

        CHECK(child >= 0);
        if (child)
                _exit(0);
        nap(100);
        talk(fd, 50);
}

static void fork_and_echo(int listener)
{
        for (int i = 0; i < 20; i++) {
                int fd = accept(listener, NULL, NULL);
                pid_t child;

                CHECK(fd >= 0);
                CHECK((child = fork()) >= 0);
                if (!child) {
                        close(listener);
                        warm_up_server(fd);
                        echo(fd);
                        exit(0);
                }
                close(fd);
        }
        for (int i = 0, status; i < 20; i++)
                CHECK(wait(&status) > 0 && status == 0);
}

static void talk_to_many(int unused)
{
        int fds[20];

        (void)unused;
        for (int i = 0; i < 20; i++)
                fds[i] = dial();
        for (int i = 0; i < 20; i++)
                warm_up(fds[i]);
        for (int i = 0; i < 20; i++) {
                talk(fds[i], 10);
                close(fds[i]);
        }
}

/* A program that takes the connection over as its standard input and output. */
static void become(int fd, char *const *arguments)
{
        CHECK(dup2(fd, 0) == 0);
        CHECK(dup2(fd, 1) == 1);
        if (fd > 1)
                close(fd);
        execvp(arguments[0], arguments);
        CHECK(!"execvp");
}

static void exec_cat(int fd)
{
        become(fd, (char *[]){"cat", NULL});
}

static void exec_static(int fd)
{
        become(fd, (char *[]){getenv("STATIC_CAT"), NULL});
}

static void fork_exec_cat(int fd)
{
        pid_t child = fork();

        CHECK(child >= 0);
        if (!child)
                exec_cat(fd);
        close(fd);
        finish(child);
}

static void vfork_exec_cat(int fd)
{
        pid_t child;

        CHECK(dup2(fd, 0) == 0);
        CHECK(dup2(fd, 1) == 1);
        close(fd);
        child = vfork();
        if (!child) {
                execlp("cat", "cat", (char *)NULL);
                _exit(1);
        }
        CHECK(child > 0);
        close(0);
        close(1);
        finish(child);
}

static void spawn_cat(int fd)
{
        char *arguments[] = {"cat", NULL};
        posix_spawn_file_actions_t actions;
        pid_t child;

        CHECK(posix_spawn_file_actions_init(&actions) == 0);
        CHECK(posix_spawn_file_actions_adddup2(&actions, fd, 0) == 0);
        CHECK(posix_spawn_file_actions_adddup2(&actions, fd, 1) == 0);
        CHECK(posix_spawn_file_actions_addclose(&actions, fd) == 0);
        CHECK(posix_spawnp(&child, "cat", &actions, NULL, arguments, environ) == 0);
        close(fd);
        finish(child);
}

static void talk_and_end(int fd)
{
        talk(fd, 100);
        put_pattern(fd, 50000);
        get_pattern(fd, 50000);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        get_end(fd);
}

/* Bytes that came before the program was replaced are read by the new one. */
static void exec_late(int fd)
{
        while (!ready(fd, POLLIN, 1000))
                continue;
        nap(100);
        exec_cat(fd);
}

/* A command that system() starts must not have the connection. */
static void system_beside(int fd)
{
        char command[128];

        CHECK(fcntl(fd, F_SETFD, FD_CLOEXEC) == 0);
        CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
        snprintf(command, sizeof command, "! test -e /proc/self/fd/%d", fd);
        CHECK(system(command) == 0);
        talk(fd, 20);
        CHECK(fcntl(fd, F_SETFD, 0) == 0);
        snprintf(command, sizeof command, "test -e /proc/self/fd/%d", fd);
        CHECK(system(command) == 0);
        talk(fd, 20);
}

static void pass(int over, int fd)
{
        char byte = 'x', control[CMSG_SPACE(sizeof fd)] = {0};
        struct iovec part = {&byte, 1};
        struct msghdr message = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);

        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
        CHECK(sendmsg(over, &message, 0) == 1);
}

static int take(int over)
{
        char byte, control[CMSG_SPACE(sizeof(int))];
        struct iovec part = {&byte, 1};
        struct msghdr message = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        int fd;

        CHECK(recvmsg(over, &message, 0) == 1);
        CHECK(CMSG_FIRSTHDR(&message));
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
        return fd;
}

/* The process that receives the descriptor is older than the connection. */
static void pass_away(int unused)
{
        int ends[2], fd;
        pid_t child;

        (void)unused;
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
        CHECK((child = fork()) >= 0);
        if (!child) {
                fd = take(ends[1]);
                talk(fd, 50);
                pass(ends[1], fd);
                exit(0);
        }
        fd = dial();
        warm_up(fd);
        talk(fd, 50);
        pass(ends[0], fd);
        CHECK(close(fd) == 0);
        fd = take(ends[0]);
        finish(child);
        talk(fd, 50);
        put_pattern(fd, 100000);
        get_pattern(fd, 100000);
}

/* The sender of the descriptor keeps its own, and both processes use the connection. */
static void pass_and_keep(int unused)
{
        int ends[2], fd;
        pid_t child;

        (void)unused;
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
        CHECK((child = fork()) >= 0);
        if (!child) {
                fd = take(ends[1]);
                talk(fd, 50);
                exit(0);
        }
        fd = dial();
        warm_up(fd);
        pass(ends[0], fd);
        finish(child);
        talk(fd, 50);
}

static void echo_one(int listener)
{
        int fd = accept(listener, NULL, NULL);

        CHECK(fd >= 0);
        warm_up_server(fd);
        echo(fd);
}

static void duplicates(int fd)
{
        int one = dup(fd), two, three, limited, closed;

        CHECK(one > fd);
        CHECK((two = dup2(fd, 40)) == 40);
        CHECK((three = dup3(fd, 41, O_CLOEXEC)) == 41 && fcntl(three, F_GETFD) == FD_CLOEXEC);
        CHECK((limited = fcntl(fd, F_DUPFD, 50)) == 50 && fcntl(limited, F_GETFD) == 0);
        CHECK((closed = fcntl(fd, F_DUPFD_CLOEXEC, 50)) == 51 && fcntl(closed, F_GETFD) == FD_CLOEXEC);
        CHECK(dup2(fd, fd) == fd);
        CHECK(dup3(fd, fd, 0) == -1 && errno == EINVAL);
        talk(one, 10);
        CHECK(close(fd) == 0);
        CHECK(write(fd, "x", 1) == -1 && errno == EBADF);
        for (int *each = (int[]){one, two, three, limited, closed, -1}; *each >= 0; each++) {
                talk(*each, 10);
                if (*each != closed)
                        CHECK(close(*each) == 0);
        }
        /* O_NONBLOCK belongs to the open file description, not to the descriptor. */
        one = dup(closed);
        CHECK(fcntl(one, F_SETFL, O_NONBLOCK) == 0);
        CHECK(read(closed, (char[1]){0}, 1) == -1 && errno == EAGAIN);
        CHECK(ioctl(closed, FIONBIO, &(int){0}) == 0);
        talk(one, 10);
}

/* A descriptor is reused for another connection, and then for a file. */
static void number_again(int fd)
{
        int file;

        talk(fd, 10);
        CHECK(close(fd) == 0);
        file = open("/dev/null", O_RDWR);
        CHECK(file == fd);
        CHECK(write(file, "x", 1) == 1);
        CHECK(read(file, (char[1]){0}, 1) == 0);
}

/* dup2 onto a connection closes it. */
static void written_over(int fd)
{
        int file = open("/dev/null", O_RDWR), kept = dup(fd);

        CHECK(dup2(file, fd) == fd);
        CHECK(write(fd, "x", 1) == 1);
        talk(kept, 10);
        CHECK(dup2(kept, fd) == fd);
        close(kept);
        talk(fd, 10);
}

static int lowest(void)
{
        int fd = open("/dev/null", O_RDONLY);

        CHECK(fd >= 0);
        CHECK(close(fd) == 0);
        return fd;
}

/* The library's own descriptors take no number that the program would have got. */
static void lowest_number(int unused)
{
        int before = lowest(), fd = dial();

        (void)unused;
        CHECK(fd == before);
        warm_up(fd);
        talk(fd, 10);
        CHECK(lowest() == before + 1);
        CHECK(close(fd) == 0);
        CHECK(lowest() == before);
}

static void close_others(int fd, int how)
{
        switch (how) {
        case 0:
                for (int i = 3; i < 20000; i++)
                        if (i != fd)
                                close(i);
                break;
        case 1:
                if (fd > 3)
                        CHECK(close_range(3, (unsigned)fd - 1, 0) == 0);
                CHECK(close_range((unsigned)fd + 1, ~0U, 0) == 0);
                break;
        default:
                closefrom(fd + 1);
        }
}

/* Some programs close every descriptor that they did not open, the library's too. */
static void close_unknown(int unused)
{
        (void)unused;
        for (int how = 0; how < 3; how++) {
                int fd = dial(), other;

                warm_up(fd);
                talk(fd, 10);
                close_others(fd, how);
                talk(fd, 100);
                other = dial();
                put(other, "d");
                get(other, "d");
                talk(other, 100);
                CHECK(close(fd) == 0);
                CHECK(close(other) == 0);
        }
}

static void *echo_thread(void *fd)
{
        warm_up_server((int)(intptr_t)fd);
        echo((int)(intptr_t)fd);
        close((int)(intptr_t)fd);
        return NULL;
}

static void echo_six(int listener)
{
        pthread_t threads[6];

        for (int i = 0; i < 6; i++) {
                int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

                CHECK(fd >= 0);
                CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
                CHECK(pthread_create(&threads[i], NULL, echo_thread, (void *)(intptr_t)fd) == 0);
        }
        for (int i = 0; i < 6; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
}

/* close_range() with CLOSE_RANGE_CLOEXEC: the range stays open until exec. */
static void range_at_exec(int fd)
{
        char command[128];

        CHECK(close_range(3, ~0U, CLOSE_RANGE_CLOEXEC) == 0);
        talk(fd, 20);
        snprintf(command, sizeof command, "! test -e /proc/self/fd/%d", fd);
        CHECK(system(command) == 0);
        talk(fd, 20);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"fork_in_turn", echo, fork_in_turn, false},
            {"fork_at_once", echo, fork_at_once, false},
            {"orphan", echo, orphan, false},
            {"share_epoll", share_epoll, ask_any, true},
            {"fork_per_connection", fork_and_echo, talk_to_many, true},
            {"exec", exec_cat, talk_and_end, false},
            {"exec_late", exec_late, talk_and_end, false},
            {"exec_static", exec_static, talk_and_end, false},
            {"fork_exec", fork_exec_cat, talk_and_end, false},
            {"vfork_exec", vfork_exec_cat, talk_and_end, false},
            {"spawn", spawn_cat, talk_and_end, false},
            {"system_beside", echo, system_beside, false},
            {"pass_away", echo_one, pass_away, true},
            {"pass_and_keep", echo_one, pass_and_keep, true},
            {"duplicates", echo, duplicates, false},
            {"number_again", echo, number_again, false},
            {"written_over", echo, written_over, false},
            {"lowest_number", echo_one, lowest_number, true},
            {"close_unknown", echo_six, close_unknown, true},
            {"range_at_exec", echo, range_at_exec, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
