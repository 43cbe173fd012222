/* Descriptors that are closed and replaced by system calls which the library does not see. */
#include "pair.h"

#include <sched.h>

#if defined(__x86_64__)
static long call(long number, long a, long b, long c)
{
        long got;

        __asm__ volatile("syscall"
                         : "=a"(got)
                         : "a"(number), "D"(a), "S"(b), "d"(c)
                         : "rcx", "r11", "memory");
        return got;
}
#elif defined(__aarch64__)
static long call(long number, long a, long b, long c)
{
        register long x8 __asm__("x8") = number;
        register long x0 __asm__("x0") = a;
        register long x1 __asm__("x1") = b;
        register long x2 __asm__("x2") = c;

        __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
        return x0;
}
#endif

static int temporary(const char *text)
{
        char path[] = "/tmp/lost-XXXXXX";
        int file = mkstemp(path);

        CHECK(file >= 0 && unlink(path) == 0);
        put(file, text);
        CHECK(lseek(file, 0, SEEK_SET) == 0);
        return file;
}

/* Replace the connection by another file. */
static void becomes(int fd, int file)
{
        CHECK(call(SYS_close, fd, 0, 0) == 0);
        CHECK(call(SYS_dup3, file, fd, 0) == fd);
}

static void read_file(int fd)
{
        int file = temporary("file!");

        becomes(fd, file);
        get(fd, "file!");
        CHECK(read(fd, (char[1]){0}, 1) == 0);
}

/* The ring has bytes, and some have just been read. */
static void read_file_before_bytes(int fd)
{
        int file = temporary("file!");

        while (!ready(fd, POLLIN, 1000))
                continue;
        nap(200);
        get(fd, "ab");
        becomes(fd, file);
        get(fd, "file!");
        CHECK(read(fd, (char[1]){0}, 1) == 0);
}

static void write_file(int fd)
{
        int file = temporary("");

        put(fd, "last");
        becomes(fd, file);
        put(fd, "file!");
        CHECK(lseek(fd, 0, SEEK_SET) == 0);
        get(fd, "file!");
}

static void six(int fd)
{
        char byte;

        signal(SIGPIPE, SIG_IGN);
        (void)!write(fd, "abcdef", 6);
        while (read(fd, &byte, 1) > 0)
                continue;
}

static void hear_last(int fd)
{
        get(fd, "last");
        get_end(fd);
}

/* A pipe that replaced the connection is not reported as readable because of bytes in the ring. */
static void poll_pipe(int fd)
{
        int ends[2];

        CHECK(pipe(ends) == 0);
        while (!ready(fd, POLLIN, 1000))
                continue;
        nap(200);
        becomes(fd, ends[0]);
        CHECK(ready(fd, POLLIN, 50) == 0);
        put(ends[1], "pipe");
        CHECK(ready(fd, POLLIN, 5000) == POLLIN);
        get(fd, "pipe");
}

static void epoll_pipe(int fd)
{
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = 1}, got;
        int ends[2], epfd = epoll_create1(0);

        CHECK(pipe(ends) == 0);
        CHECK(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
        CHECK(epoll_wait(epfd, &got, 1, 5000) == 1);
        nap(200);
        becomes(fd, ends[0]);
        event.data.u64 = 2;
        CHECK(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
        CHECK(epoll_wait(epfd, &got, 1, 50) == 0);
        put(ends[1], "pipe");
        CHECK(epoll_wait(epfd, &got, 1, 5000) == 1 && got.data.u64 == 2);
        get(fd, "pipe");
}

/* One connection replaces another one. */
static void other_connection(int unused)
{
        int one = dial(), two = dial();

        (void)unused;
        warm_up(one);
        warm_up(two);
        becomes(one, two);
        for (int i = 0; i < 20; i++) {
                put(i % 2 ? one : two, "abc");
                get(i % 2 ? two : one, "abc");
        }
}

static void *echo_thread(void *given)
{
        int fd = (int)(intptr_t)given;
        char byte;

        warm_up_server(fd);
        while (read(fd, &byte, 1) == 1)
                put_all(fd, &byte, 1);
        close(fd);
        return NULL;
}

static void echo_two(int listener)
{
        pthread_t threads[2];

        for (int i = 0; i < 2; i++) {
                int fd = accept(listener, NULL, NULL);

                CHECK(fd >= 0);
                CHECK(pthread_create(&threads[i], NULL, echo_thread, (void *)(intptr_t)fd) == 0);
        }
        for (int i = 0; i < 2; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
}

/* Every descriptor but the connection is closed, the library's own too. */
static void all_others(int fd, int how)
{
        struct epoll_event event = {.events = EPOLLIN}, got;
        int epfd;

        put(fd, "g");
        get(fd, "abcdef");
        CHECK(call(SYS_close_range, fd + 1, ~0u, 0) == 0);
        epfd = epoll_create1(0);
        CHECK(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
        for (int i = 0; i < 3; i++) {
                put(fd, "k");
                if (how == 1)
                        CHECK(ready(fd, POLLIN, 10000) == POLLIN);
                if (how == 2)
                        CHECK(epoll_wait(epfd, &got, 1, 10000) == 1);
                get(fd, "z");
        }
        put(fd, "y");
}

static void all_others_read(int fd)
{
        all_others(fd, 0);
}

static void all_others_poll(int fd)
{
        all_others(fd, 1);
}

static void all_others_epoll(int fd)
{
        all_others(fd, 2);
}

static void told_z(int fd)
{
        get(fd, "g");
        nap(100);
        put(fd, "abcdef");
        for (int i = 0; i < 3; i++) {
                get(fd, "k");
                nap(200);
                put(fd, "z");
        }
        get(fd, "y");
}

/* A process that shares the descriptors but not the memory closes the connection. */
static int close_there(void *fd)
{
        close(*(int *)fd);
        _exit(0);
}

static void shared_table(int fd)
{
        static char stack[65536] __attribute__((aligned(16)));
        int file = temporary("file!"), status;
        pid_t child = clone(close_there, stack + sizeof stack, CLONE_FILES | SIGCHLD, &fd);

        CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
        CHECK(call(SYS_dup3, file, fd, 0) == fd);
        get(fd, "file!");
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"read_file", read_file, six, false},
            {"read_file_before_bytes", read_file_before_bytes, six, false},
            {"write_file", write_file, hear_last, false},
            {"poll_pipe", poll_pipe, six, false},
            {"epoll_pipe", epoll_pipe, six, false},
            {"other_connection", echo_two, other_connection, true},
            {"all_others_read", all_others_read, told_z, false},
            {"all_others_poll", all_others_poll, told_z, false},
            {"all_others_epoll", all_others_epoll, told_z, false},
            {"shared_table", shared_table, six, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
