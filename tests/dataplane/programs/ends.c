/* How connections end: closed in one direction, closed in both, reset, killed. */
#include "pair.h"

static volatile sig_atomic_t pipes;

static void count_pipe(int number)
{
        (void)number;
        pipes++;
}

static void half_close_server(int fd)
{
        get_pattern(fd, 3 << 20);
        get_end(fd);
        put_pattern(fd, 2 << 20);
}

static void half_close(int fd)
{
        put_pattern(fd, 3 << 20);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        get_pattern(fd, 2 << 20);
        get_end(fd);
        get_end(fd);
}

static void half_close_other(int fd)
{
        put_pattern(fd, 2 << 20);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        get_pattern(fd, 3 << 20);
        get_end(fd);
}

static void half_close_other_client(int fd)
{
        get_pattern(fd, 2 << 20);
        get_end(fd);
        put_pattern(fd, 3 << 20);
}

static void put_and_close(int fd)
{
        put_pattern(fd, 100000);
        CHECK(close(fd) == 0);
        nap(100);
}

static void get_after_close(int fd)
{
        nap(50);
        get_pattern(fd, 100000);
        get_end(fd);
        get_end(fd);
}

static void close_it(int fd)
{
        get(fd, "c");
        CHECK(close(fd) == 0);
        nap(300);
}

static void broken_pipe(int fd)
{
        signal(SIGPIPE, count_pipe);
        put(fd, "c");
        get_end(fd);
        CHECK(send(fd, "x", 1, 0) == 1);
        nap(50);
        CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
        CHECK(pipes == 0);
        CHECK(send(fd, "x", 1, 0) == -1 && errno == EPIPE);
        CHECK(pipes == 1);
        CHECK(write(fd, "x", 1) == -1 && errno == EPIPE);
        CHECK(pipes == 2);
}

static void own_shutdown(int fd)
{
        signal(SIGPIPE, count_pipe);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
        CHECK(pipes == 0);
        CHECK(write(fd, "x", 1) == -1 && errno == EPIPE);
        CHECK(pipes == 1);
        get(fd, "bye");
        get_end(fd);
}

static void see_shutdown(int fd)
{
        get_end(fd);
        put(fd, "bye");
}

static void shut_read(int fd)
{
        CHECK(shutdown(fd, SHUT_RD) == 0);
        get_end(fd);
        put(fd, "still");
}

static void get_still(int fd)
{
        get(fd, "still");
        get_end(fd);
}

/* A child has the connection and is killed, so that this process can exit normally. */
static void be_killed_after(int fd, size_t size, int milliseconds)
{
        int status;
        pid_t child = fork();

        CHECK(child >= 0);
        if (!child) {
                put_pattern(fd, size);
                nap(milliseconds);
                kill(getpid(), SIGKILL);
        }
        close(fd);
        CHECK(waitpid(child, &status, 0) == child);
}

static void be_killed(int fd)
{
        be_killed_after(fd, 50000, 100);
}

static void be_killed_unread(int fd)
{
        be_killed_after(fd, 0, 300);
}

static void outlive(int fd)
{
        signal(SIGPIPE, count_pipe);
        get_pattern(fd, 50000);
        get_end(fd);
        CHECK(send(fd, "x", 1, 0) == 1);
        nap(50);
        CHECK(send(fd, "x", 1, 0) == -1 && errno == EPIPE);
        CHECK(pipes == 1);
}

static int poll_for_room(int fd, int timeout)
{
        return ready(fd, POLLOUT, timeout) != 0;
}

static int select_for_room(int fd, int timeout)
{
        struct timeval time = {timeout / 1000, timeout % 1000 * 1000};
        fd_set set;

        FD_ZERO(&set);
        FD_SET(fd, &set);
        return select(fd + 1, NULL, &set, NULL, &time);
}

static int instance_for_room;

static int epoll_for_room(int fd, int timeout)
{
        struct epoll_event event;

        (void)fd;
        return epoll_wait(instance_for_room, &event, 1, timeout);
}

static int nested_for_room(int fd, int timeout)
{
        (void)fd;
        return ready(instance_for_room, POLLIN, timeout) != 0;
}

/* A sender that waits for room is woken when the last reader is gone. */
static void see_no_reader(int fd, int (*wait)(int fd, int timeout), uint32_t flags)
{
        static char bytes[65536];
        struct epoll_event event = {.events = EPOLLOUT | flags};
        double end = clock_now() + within(10);
        ssize_t sent;

        instance_for_room = epoll_create1(0);
        CHECK(epoll_ctl(instance_for_room, EPOLL_CTL_ADD, fd, &event) == 0);
        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        do {
                while ((sent = send(fd, bytes, sizeof bytes, MSG_NOSIGNAL)) > 0)
                        ;
                CHECK(sent == -1 && (errno == EAGAIN || errno == ECONNRESET || errno == EPIPE));
                CHECK(errno != EAGAIN || wait(fd, 10000) == 1);
        } while (errno == EAGAIN && clock_now() < end);
        CHECK(send(fd, bytes, 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
}

static void poll_without_reader(int fd)
{
        see_no_reader(fd, poll_for_room, 0);
}

static void select_without_reader(int fd)
{
        see_no_reader(fd, select_for_room, 0);
}

static void epoll_without_reader(int fd)
{
        see_no_reader(fd, epoll_for_room, 0);
}

static void edge_without_reader(int fd)
{
        see_no_reader(fd, epoll_for_room, EPOLLET);
}

static void nested_without_reader(int fd)
{
        see_no_reader(fd, nested_for_room, 0);
}

static void *end_by_signal(void *unused)
{
        (void)unused;
        nap(200);
        kill(getpid(), SIGKILL);
        return NULL;
}

static void be_killed_whole(int fd)
{
        pthread_t thread;
        char byte;

        put_pattern(fd, 50000);
        CHECK(pthread_create(&thread, NULL, end_by_signal, NULL) == 0);
        CHECK(read(fd, &byte, 1) <= 0);
}

static void reset_by_linger(int fd)
{
        struct linger now = {.l_onoff = 1, .l_linger = 0};

        get(fd, "c");
        CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
        CHECK(close(fd) == 0);
        nap(300);
}

static void see_reset(int fd)
{
        char byte;
        int error = -1;
        socklen_t size = sizeof error;

        put(fd, "c");
        CHECK(read(fd, &byte, 1) == -1 && errno == ECONNRESET);
        CHECK(read(fd, &byte, 1) == 0);
        CHECK(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0);
        CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
}

static void close_unread(int fd)
{
        CHECK(ready(fd, POLLIN, 5000) == POLLIN);
        CHECK(close(fd) == 0);
        nap(300);
}

static void exit_unread(int fd)
{
        CHECK(ready(fd, POLLIN, 5000) == POLLIN);
        exit(0);
}

static void see_events(int fd)
{
        struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP};
        int instance = epoll_create1(0);

        put(fd, "c");
        CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event) == 0);
        CHECK(epoll_wait(instance, &event, 1, (int)within(5000)) == 1);
        CHECK(event.events == (EPOLLIN | EPOLLRDHUP));
        CHECK(ready(fd, POLLIN | POLLRDHUP, 0) == (POLLIN | POLLRDHUP));
        CHECK(shutdown(fd, SHUT_WR) == 0);
        nap(50);
        CHECK(ready(fd, POLLIN | POLLRDHUP, 0) == (POLLIN | POLLRDHUP | POLLHUP));
        CHECK(epoll_wait(instance, &event, 1, 0) == 1);
        CHECK(event.events == (EPOLLIN | EPOLLRDHUP | EPOLLHUP));
}

static void close_lingering(int fd)
{
        struct linger patient = {.l_onoff = 1, .l_linger = 5};

        put_pattern(fd, 200000);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &patient, sizeof patient) == 0);
        CHECK(close(fd) == 0);
}

static void get_lingering(int fd)
{
        get_pattern(fd, 200000);
        get_end(fd);
}

static void *wait_by_read(void *fd)
{
        get_end(*(int *)fd);
        return NULL;
}

/* Another thread's shutdown ends a read that waits. */
static void shutdown_wakes(int fd)
{
        pthread_t thread;

        CHECK(pthread_create(&thread, NULL, wait_by_read, &fd) == 0);
        nap(100);
        CHECK(shutdown(fd, SHUT_RDWR) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
}

static void just_end(int fd)
{
        get_end(fd);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"half_close", half_close_server, half_close, false},
            {"half_close_other", half_close_other, half_close_other_client, false},
            {"data_then_end", put_and_close, get_after_close, false},
            {"broken_pipe", close_it, broken_pipe, false},
            {"own_shutdown", see_shutdown, own_shutdown, false},
            {"shut_read", get_still, shut_read, false},
            {"killed", be_killed, outlive, false},
            {"killed_whole", be_killed_whole, outlive, false},
            {"poll_without_reader", be_killed_unread, poll_without_reader, false},
            {"select_without_reader", be_killed_unread, select_without_reader, false},
            {"epoll_without_reader", be_killed_unread, epoll_without_reader, false},
            {"edge_without_reader", be_killed_unread, edge_without_reader, false},
            {"nested_without_reader", be_killed_unread, nested_without_reader, false},
            {"reset_by_linger", reset_by_linger, see_reset, false},
            {"reset_by_unread", close_unread, see_reset, false},
            {"reset_by_exit", exit_unread, see_reset, false},
            {"events_of_the_end", close_it, see_events, false},
            {"lingering_close", close_lingering, get_lingering, false},
            {"shutdown_wakes", just_end, shutdown_wakes, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
