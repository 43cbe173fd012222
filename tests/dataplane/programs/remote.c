/* A connection over relays: TCP's events may arrive before bytes of the rings, and the relays may
 * fail. They are those of `relay.c`, which the client controls. */
#include "pair.h"

#include <sys/un.h>

#define IN_TIME 3.0 /* s: far less than any time-out behind it */

static void tell(const char *order)
{
        struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "/run/freeflow/relay.sock"};
        char answer[8] = "";
        int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);

        CHECK(fd >= 0);
        CHECK(connect(fd, (struct sockaddr *)&name, sizeof name) == 0);
        CHECK(send(fd, order, strlen(order), 0) == (ssize_t)strlen(order));
        if (strcmp(order, "die") == 0)
                CHECK(recv(fd, answer, sizeof answer, 0) <= 0);
        else
                CHECK(recv(fd, answer, sizeof answer, 0) == 3 && memcmp(answer, "yes", 3) == 0);
        close(fd);
}

static double cpu_now(void)
{
        struct timespec time;

        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
        return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* --- ways to wait: each returns the events that came in time, as poll reports them */

static int instance = -1, outer = -1;
static short wanted;

static short by_poll(int fd, int time)
{
        return ready(fd, wanted, time);
}

static short by_select(int fd, int time)
{
        struct timeval left = {time / 1000, time % 1000 * 1000};
        fd_set in, out;
        short got = 0;

        FD_ZERO(&in);
        FD_ZERO(&out);
        if (wanted & POLLIN)
                FD_SET(fd, &in);
        if (wanted & POLLOUT)
                FD_SET(fd, &out);
        CHECK(select(fd + 1, &in, &out, NULL, &left) >= 0);
        if (FD_ISSET(fd, &in))
                got |= POLLIN;
        if (FD_ISSET(fd, &out))
                got |= POLLOUT;
        return got;
}

static short by_epoll(int fd, uint32_t flags, int time)
{
        struct epoll_event event = {.events = (uint32_t)wanted | flags};

        if (instance < 0) {
                CHECK((instance = epoll_create1(0)) >= 0);
                CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event) == 0);
        } else if (flags & EPOLLONESHOT) {
                CHECK(epoll_ctl(instance, EPOLL_CTL_MOD, fd, &event) == 0);
        }
        return epoll_wait(instance, &event, 1, time) == 1 ? (short)event.events : 0;
}

static short by_level(int fd, int time)
{
        return by_epoll(fd, 0, time);
}

static short by_edge(int fd, int time)
{
        return by_epoll(fd, EPOLLET, time);
}

static short by_once(int fd, int time)
{
        return by_epoll(fd, EPOLLONESHOT, time);
}

/* A nested instance may wake without an event: the inner one's events count. */
static short by_nested(int fd, int time)
{
        double end = clock_now() + time / 1e3;
        struct epoll_event event = {.events = EPOLLIN};
        short got;

        got = by_epoll(fd, 0, 0);
        if (outer < 0) {
                CHECK((outer = epoll_create1(0)) >= 0);
                CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, instance, &event) == 0);
        }
        while (!got && clock_now() < end) {
                int left = (int)((end - clock_now()) * 1000) + 1;

                CHECK(epoll_wait(outer, &event, 1, left) >= 0);
                got = by_epoll(fd, 0, 0);
        }
        return got;
}

static short by_nested_poll(int fd, int time)
{
        double end = clock_now() + time / 1e3;
        short got = by_epoll(fd, 0, 0);

        while (!got && clock_now() < end) {
                ready(instance, POLLIN, (int)((end - clock_now()) * 1000) + 1);
                got = by_epoll(fd, 0, 0);
        }
        return got;
}

typedef short (*waits)(int fd, int time);

static const struct {
        const char *name;
        waits wait;
} means[] = {{"poll", by_poll},
             {"select", by_select},
             {"level", by_level},
             {"edge", by_edge},
             {"once", by_once},
             {"nested", by_nested},
             {"nested_poll", by_nested_poll}};

static waits chosen(void)
{
        const char *name = getenv("MEANS");

        for (size_t i = 0; name && i < sizeof means / sizeof *means; i++)
                if (strcmp(means[i].name, name) == 0)
                        return means[i].wait;
        CHECK(!"MEANS");
        return NULL;
}

/* --- a FIN that arrives before bytes that were sent before it */

static void put_close(int fd)
{
        get(fd, "c");
        put(fd, "before the end");
        nap(50);
        tell("hold");
        CHECK(close(fd) == 0);
        nap(700);
}

/* The kernel has the FIN already: the wait does not report it and takes no CPU time, until the
 * bytes before it have arrived. */
static void overtaken_by(int fd, waits wait, bool both)
{
        double cpu;
        short got;

        wanted = POLLIN | POLLRDHUP;
        if (wait == by_edge)
                wait(fd, 0);
        put(fd, "c");
        nap(100);
        get(fd, "before the end");
        if (wait == by_edge)
                wait(fd, 0);
        if (both)
                CHECK(shutdown(fd, SHUT_WR) == 0);
        cpu = cpu_now();
        CHECK(wait(fd, 200) == 0);
        CHECK(recv(fd, (char[1]){0}, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
        CHECK(cpu_now() - cpu < 0.1);
        tell("go");
        got = wait(fd, (int)(IN_TIME * 1000));
        CHECK(got & (POLLIN | POLLRDHUP));
        get_end(fd);
        get_end(fd);
}

static void overtaken(int fd)
{
        overtaken_by(fd, chosen(), false);
}

static void overtaken_twice(int fd)
{
        overtaken_by(fd, chosen(), true);
}

static void tell_go(int milliseconds)
{
        pid_t child = fork();

        CHECK(child >= 0);
        if (child)
                return;
        nap(milliseconds);
        tell("go");
        _exit(0);
}

static void put_held_close(int fd)
{
        get(fd, "c");
        tell("hold");
        put(fd, "before the end");
        CHECK(close(fd) == 0);
        tell_go(300);
        nap(700);
}

static void get_held(int fd)
{
        double begin, cpu;

        put(fd, "c");
        nap(100);
        begin = clock_now();
        cpu = cpu_now();
        get(fd, "before the end");
        get_end(fd);
        CHECK(clock_now() - begin > 0.1);
        CHECK(cpu_now() - cpu < 0.1);
}

static void put_held_half(int fd)
{
        get(fd, "c");
        tell("hold");
        put(fd, "before the end");
        CHECK(shutdown(fd, SHUT_WR) == 0);
        tell_go(300);
        get(fd, "still");
        get_end(fd);
}

static void get_held_half(int fd)
{
        put(fd, "c");
        get(fd, "before the end");
        get_end(fd);
        put(fd, "still");
        CHECK(shutdown(fd, SHUT_WR) == 0);
        nap(100);
}

/* --- bytes over TCP that arrive before earlier bytes of the ring */

static void put_urgent(int fd)
{
        get(fd, "c");
        tell("hold");
        put(fd, "through the ring, ");
        /* Rings can't carry urgent data: this end falls back to TCP. */
        CHECK(send(fd, "!", 1, MSG_OOB) == 1);
        put(fd, "and after it");
        tell_go(300);
        get_end(fd);
}

static void get_urgent(int fd)
{
        double cpu;

        put(fd, "c");
        nap(100);
        cpu = cpu_now();
        CHECK(ready(fd, POLLIN, 50) == 0);
        get(fd, "through the ring, and after it");
        CHECK(cpu_now() - cpu < 0.1);
}

/* --- a ring that nobody used */

static void shut_unused(int listener)
{
        int fd = accept(listener, NULL, NULL);
        double begin;

        CHECK(fd >= 0);
        for (int i = 0; i < 8; i++) {
                get(fd, "x");
                put(fd, "y");
        }
        begin = clock_now();
        get_end(fd);
        CHECK(clock_now() - begin < within(IN_TIME));
        put(fd, "bye");
}

static void unused(int unused)
{
        int fd = dial();

        (void)unused;
        for (int i = 0; i < 8; i++) {
                put(fd, "x");
                get(fd, "y");
                nap(2);
        }
        CHECK(shutdown(fd, SHUT_WR) == 0);
        get(fd, "bye");
        get_end(fd);
}

/* --- resets */

static void reset_held(int fd)
{
        struct linger now = {.l_onoff = 1, .l_linger = 0};

        get(fd, "c");
        tell("hold");
        CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
        CHECK(close(fd) == 0);
        tell_go(600);
        nap(300);
}

/* A reset is reported at once, whatever the relays do. */
static void see_reset(int fd)
{
        double begin = clock_now();
        short got;

        wanted = POLLIN;
        put(fd, "c");
        got = chosen()(fd, 5000);
        CHECK(got & (POLLIN | POLLERR | POLLHUP));
        CHECK(read(fd, (char[1]){0}, 1) == -1 && errno == ECONNRESET);
        CHECK(read(fd, (char[1]){0}, 1) == 0);
        CHECK(clock_now() - begin < within(0.5));
}

/* --- the loss of the path */

static const char *loss(void)
{
        const char *order = getenv("LOSS");

        CHECK(order);
        return order;
}

static void sit(int fd)
{
        char byte;

        /* Until the other end is gone, by a reset or a FIN. */
        while (read(fd, &byte, 1) > 0)
                ;
}

static void *tell_later(void *order)
{
        nap(200);
        tell(order);
        return NULL;
}

static void later(const char *order)
{
        pthread_t thread;

        CHECK(pthread_create(&thread, NULL, tell_later, (void *)(uintptr_t)order) == 0);
        CHECK(pthread_detach(thread) == 0);
}

static void ends_as_reset(int fd)
{
        CHECK(read(fd, (char[1]){0}, 1) == -1 && errno == ECONNRESET);
        CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == -1 && (errno == EPIPE || errno == ECONNRESET));
        CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
}

static void lost(int fd)
{
        double begin;
        short got;

        wanted = POLLIN;
        later(loss());
        begin = clock_now();
        got = chosen()(fd, 6000);
        CHECK(got & (POLLIN | POLLERR | POLLHUP));
        CHECK(clock_now() - begin < within(IN_TIME));
        ends_as_reset(fd);
}

/* A waiter that has registered for no event is told of the error too. */
static void lost_alone(int fd)
{
        double begin = clock_now();

        wanted = 0;
        later(loss());
        CHECK(chosen()(fd, 6000) & (POLLERR | POLLHUP));
        CHECK(clock_now() - begin < within(IN_TIME));
        ends_as_reset(fd);
}

static void fill(int fd)
{
        static char bytes[65536];

        while (send(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0)
                nap(1);
        CHECK(errno == EAGAIN);
}

static void never_read(int fd)
{
        CHECK(ready(fd, POLLHUP | POLLERR, 8000) & (POLLHUP | POLLERR));
}

static void lost_writer(int fd)
{
        double begin;

        wanted = POLLOUT;
        fill(fd);
        nap(50);
        fill(fd);
        later(loss());
        begin = clock_now();
        CHECK(chosen()(fd, 6000) & (POLLOUT | POLLERR | POLLHUP));
        CHECK(clock_now() - begin < within(IN_TIME));
        ends_as_reset(fd);
}

static void lost_in_read(int fd)
{
        double begin = clock_now();

        later(loss());
        ends_as_reset(fd);
        CHECK(clock_now() - begin < within(IN_TIME));
}

static void lost_in_write(int fd)
{
        static char bytes[1 << 20];
        double begin = clock_now();
        ssize_t sent;

        later(loss());
        sent = send(fd, bytes, sizeof bytes, MSG_NOSIGNAL);
        CHECK(sent < (ssize_t)sizeof bytes);
        CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == -1 && (errno == EPIPE || errno == ECONNRESET));
        CHECK(clock_now() - begin < within(IN_TIME));
}

static void put_some(int fd)
{
        get(fd, "c");
        put_pattern(fd, 5000);
        sit(fd);
}

/* The bytes that have arrived come before the error. */
static void lost_behind(int fd)
{
        put(fd, "c");
        nap(100);
        tell(loss());
        /* A writer gets the error first, and the reader still gets all bytes. */
        CHECK(send(fd, "x", 1, MSG_NOSIGNAL) == -1 && (errno == EPIPE || errno == ECONNRESET));
        get_pattern(fd, 5000);
        CHECK(read(fd, (char[1]){0}, 1) == -1 && errno == ECONNRESET);
        CHECK(read(fd, (char[1]){0}, 1) == 0);
}

/* --- corrupt values in the shared memory */

static void be_spoiled(int fd)
{
        static char bytes[8192];
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP};
        double end = clock_now() + 0.5;

        signal(SIGPIPE, SIG_IGN);
        CHECK((instance = epoll_create1(0)) >= 0);
        CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event) == 0);
        while (clock_now() < end) {
                ssize_t got = send(fd, bytes, 100, MSG_DONTWAIT);

                got = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
                got += ready(fd, POLLIN | POLLOUT | POLLRDHUP, 1);
                got += epoll_wait(instance, &event, 1, 1);
                if (strcmp(role, "client") == 0)
                        tell("spoil");
        }
        CHECK(close(fd) == 0);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"overtaken", put_close, overtaken, false},
            {"overtaken_twice", put_close, overtaken_twice, false},
            {"held", put_held_close, get_held, false},
            {"held_half", put_held_half, get_held_half, false},
            {"urgent", put_urgent, get_urgent, false},
            {"unused", shut_unused, unused, true},
            {"reset", reset_held, see_reset, false},
            {"lost", sit, lost, false},
            {"lost_alone", sit, lost_alone, false},
            {"lost_writer", never_read, lost_writer, false},
            {"lost_in_read", sit, lost_in_read, false},
            {"lost_in_write", never_read, lost_in_write, false},
            {"lost_behind", put_some, lost_behind, false},
            {"spoiled", be_spoiled, be_spoiled, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
