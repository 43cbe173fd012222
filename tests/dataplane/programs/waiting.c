/* Waiting for a connection on a ring: epoll, poll, select, time-outs, signals. */
#include "pair.h"
#include "traced.h"

#include <limits.h>

/* The server of most scenarios: sends as many bytes as the client requests, until the client ends.
 */
static void obey(int fd)
{
        uint32_t size;

        for (;;) {
                ssize_t got = recv(fd, &size, sizeof size, MSG_WAITALL);

                /* A client that ends with something unread resets the connection. */
                if (got == 0 || (got < 0 && errno == ECONNRESET))
                        return;
                CHECK(got == sizeof size);
                nap(20);
                put_pattern(fd, size);
        }
}

static void order(int fd, uint32_t size)
{
        put_all(fd, &size, sizeof size);
}

static int watched(int fd, uint32_t events)
{
        struct epoll_event event = {.events = events, .data.u64 = UINT64_C(0x1234567890abcdef)};
        int instance = epoll_create1(EPOLL_CLOEXEC);

        CHECK(instance >= 0);
        CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event) == 0);
        return instance;
}

/* The events of the next report; 0: none. */
static uint32_t next_event(int instance, int milliseconds)
{
        struct epoll_event events[4];
        int count = epoll_wait(instance, events, 4, milliseconds);

        CHECK(count == 0 || count == 1);
        CHECK(count == 0 || events[0].data.u64 == UINT64_C(0x1234567890abcdef));
        return count ? events[0].events : 0;
}

static void epoll_level(int fd)
{
        int instance = watched(fd, EPOLLIN);
        char bytes[60];

        CHECK(next_event(instance, 0) == 0);
        order(fd, 100);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        CHECK(next_event(instance, 0) == EPOLLIN);
        get_all(fd, bytes, 60);
        CHECK(next_event(instance, 0) == EPOLLIN);
        get_all(fd, bytes, 40);
        CHECK(next_event(instance, 50) == 0);
        order(fd, 1);
        CHECK(next_event(instance, 5000) == EPOLLIN);
}

static void epoll_edge(int fd)
{
        int instance = watched(fd, EPOLLIN | EPOLLET);
        char bytes[60];

        CHECK(next_event(instance, 0) == 0);
        order(fd, 100);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        CHECK(next_event(instance, 50) == 0);
        get_all(fd, bytes, 60);
        CHECK(next_event(instance, 50) == 0);
        order(fd, 1);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        get_all(fd, bytes, 41);
        CHECK(next_event(instance, 50) == 0);
}

static void epoll_edge_both(int fd)
{
        int instance = watched(fd, EPOLLIN | EPOLLOUT | EPOLLET);

        CHECK(next_event(instance, 1000) == EPOLLOUT);
        CHECK(next_event(instance, 50) == 0);
        order(fd, 1);
        CHECK(next_event(instance, 5000) == (EPOLLIN | EPOLLOUT));
}

static void epoll_once(int fd)
{
        struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT,
                                    .data.u64 = UINT64_C(0x1234567890abcdef)};
        int instance = watched(fd, EPOLLIN | EPOLLONESHOT);

        order(fd, 1);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        CHECK(next_event(instance, 50) == 0);
        order(fd, 1);
        CHECK(next_event(instance, 100) == 0);
        CHECK(epoll_ctl(instance, EPOLL_CTL_MOD, fd, &event) == 0);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        CHECK(next_event(instance, 0) == 0);
}

static int shared_instance;

static void *change_interest(void *fd)
{
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = UINT64_C(0x1234567890abcdef)};

        nap(200);
        CHECK(epoll_ctl(shared_instance, EPOLL_CTL_MOD, *(int *)fd, &event) == 0);
        return NULL;
}

static void epoll_changed(int fd)
{
        pthread_t thread;

        shared_instance = watched(fd, 0);
        order(fd, 1);
        CHECK(pthread_create(&thread, NULL, change_interest, &fd) == 0);
        CHECK(next_event(shared_instance, 5000) == EPOLLIN);
        pthread_join(thread, NULL);
        CHECK(epoll_ctl(shared_instance, EPOLL_CTL_DEL, fd, NULL) == 0);
        CHECK(next_event(shared_instance, 50) == 0);
        CHECK(epoll_ctl(shared_instance, EPOLL_CTL_DEL, fd, NULL) == -1 && errno == ENOENT);
}

static void epoll_twice(int fd)
{
        struct epoll_event event = {.events = EPOLLIN};
        int one = watched(fd, EPOLLIN), other = watched(fd, EPOLLIN);

        CHECK(epoll_ctl(one, EPOLL_CTL_ADD, fd, &event) == -1 && errno == EEXIST);
        order(fd, 1);
        CHECK(next_event(one, 5000) == EPOLLIN);
        CHECK(next_event(other, 0) == EPOLLIN);
}

/* A registration is valid as long as any descriptor of the connection is open. */
static void epoll_duplicate(int fd)
{
        int other = dup(fd), instance = watched(other, EPOLLIN);

        order(fd, 1);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        get_pattern(fd, 1);
        CHECK(close(other) == 0);
        order(fd, 1);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        get_pattern(fd, 1);
}

/* A bell that rang after its byte was read may wake once more. Then the inner instance has no
 * event, and the outer one has none afterwards. */
static bool says_nothing(int outer, int inner)
{
        return next_event(outer, 20) == 0 || (next_event(inner, 0) == 0 && next_event(outer, 20) == 0);
}

static void epoll_nested(int fd)
{
        int inner = watched(fd, EPOLLIN), outer = watched(inner, EPOLLIN);
        fd_set set;

        CHECK(next_event(outer, 20) == 0);
        CHECK(ready(inner, POLLIN, 0) == 0);
        for (int i = 0; i < 3; i++) {
                order(fd, 1);
                if (i == 0)
                        CHECK(next_event(outer, 5000) == EPOLLIN);
                if (i == 1)
                        CHECK(ready(inner, POLLIN, 5000) == POLLIN);
                FD_ZERO(&set);
                FD_SET(inner, &set);
                CHECK(select(inner + 1, &set, NULL, NULL, NULL) == 1);
                CHECK(next_event(inner, 0) == EPOLLIN);
                get_pattern(fd, 1);
                CHECK(next_event(inner, 0) == 0);
                CHECK(says_nothing(outer, inner));
        }
}

static void epoll_timed(int fd)
{
        struct timespec time = {0, 50 * 1000 * 1000};
        struct epoll_event event;
        int instance = watched(fd, EPOLLIN);
        double before = clock_now();
        sigset_t none;

        sigemptyset(&none);
        CHECK(epoll_pwait(instance, &event, 1, 50, &none) == 0);
        CHECK(clock_now() - before >= 0.049);
        before = clock_now();
        CHECK(epoll_pwait2(instance, &event, 1, &time, NULL) == 0);
        CHECK(clock_now() - before >= 0.049);
        order(fd, 1);
        CHECK(epoll_pwait2(instance, &event, 1, NULL, NULL) == 1);
        CHECK(event.events == EPOLLIN);
}

/* A registration made before the connection stays valid. */
static void serve_one(int listener)
{
        int fd = accept(listener, NULL, NULL);

        CHECK(fd >= 0);
        warm_up_server(fd);
        obey(fd);
}

static void epoll_before(int unused)
{
        int fd = socket(AF_INET, SOCK_STREAM, 0), instance = watched(fd, EPOLLIN);

        (void)unused;
        while (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
                CHECK(errno == ECONNREFUSED);
                nap(10);
        }
        warm_up(fd);
        CHECK(next_event(instance, 0) == 0);
        order(fd, 1);
        CHECK(next_event(instance, 5000) == EPOLLIN);
        get_pattern(fd, 1);
        CHECK(next_event(instance, 0) == 0);
}

/* Sets for more descriptors than FD_SETSIZE, which the kernel accepts. */
static void select_large(int fd)
{
        enum { NUMBER = 3000, WORDS = 4096 / 64 };
        static uint64_t set[WORDS];
        struct timeval soon = {0, 50 * 1000}, late = {5, 0};
        struct rlimit limit;

        CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
        limit.rlim_cur = limit.rlim_max;
        CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        CHECK(fcntl(fd, F_DUPFD, NUMBER) == NUMBER);
        set[NUMBER / 64] = UINT64_C(1) << NUMBER % 64;
        CHECK(select(NUMBER + 1, (fd_set *)(void *)set, NULL, NULL, &soon) == 0 && !set[NUMBER / 64]);
        order(fd, 3);
        set[NUMBER / 64] = UINT64_C(1) << NUMBER % 64;
        CHECK(select(NUMBER + 1, (fd_set *)(void *)set, NULL, NULL, &late) == 1);
        CHECK(set[NUMBER / 64] == UINT64_C(1) << NUMBER % 64);
        get_pattern(NUMBER, 3);
}

static void poll_and_select(int fd)
{
        struct timespec soon = {0, 50 * 1000 * 1000};
        struct timeval time = {0, 50 * 1000};
        struct pollfd one = {.fd = fd, .events = POLLIN};
        double before = clock_now();
        fd_set set;

        CHECK(poll(&one, 1, 50) == 0 && one.revents == 0);
        CHECK(ppoll(&one, 1, &soon, NULL) == 0 && one.revents == 0);
        FD_ZERO(&set);
        FD_SET(fd, &set);
        CHECK(select(fd + 1, &set, NULL, NULL, &time) == 0 && !FD_ISSET(fd, &set));
        FD_SET(fd, &set);
        CHECK(pselect(fd + 1, &set, NULL, NULL, &soon, NULL) == 0 && !FD_ISSET(fd, &set));
        CHECK(clock_now() - before >= 0.199);
        for (int i = 0; i < 4; i++) {
                order(fd, 10);
                if (i == 0)
                        CHECK(poll(&one, 1, -1) == 1 && one.revents == POLLIN);
                if (i == 1)
                        CHECK(ppoll(&one, 1, NULL, NULL) == 1 && one.revents == POLLIN);
                FD_ZERO(&set);
                FD_SET(fd, &set);
                if (i == 2)
                        CHECK(select(fd + 1, &set, NULL, NULL, NULL) == 1 && FD_ISSET(fd, &set));
                if (i == 3)
                        CHECK(pselect(fd + 1, &set, NULL, NULL, NULL, NULL) == 1 && FD_ISSET(fd, &set));
                get_pattern(fd, 10);
        }
        one.events = POLLIN | POLLOUT;
        CHECK(poll(&one, 1, 0) == 1 && one.revents == POLLOUT);
}

/* With descriptors that are no connections, and an invalid one. */
static void poll_among_others(int fd)
{
        int ends[2];
        struct pollfd all[4];

        CHECK(pipe(ends) == 0);
        all[0] = (struct pollfd){.fd = ends[0], .events = POLLIN};
        all[1] = (struct pollfd){.fd = fd, .events = POLLIN};
        all[2] = (struct pollfd){.fd = -1, .events = POLLIN};
        all[3] = (struct pollfd){.fd = ends[1], .events = POLLOUT};
        CHECK(poll(all, 3, 20) == 0);
        CHECK(poll(all, 4, -1) == 1 && all[3].revents == POLLOUT);
        order(fd, 1);
        CHECK(poll(all, 3, -1) == 1 && all[1].revents == POLLIN && all[0].revents == 0);
        CHECK(write(ends[1], "x", 1) == 1);
        CHECK(poll(all, 3, -1) == 2 && all[0].revents == POLLIN);
        all[2].fd = 900;
        CHECK(poll(all, 3, -1) == 3 && all[2].revents == POLLNVAL);
}

static void high_descriptor(int fd)
{
        struct rlimit limit;
        int high;

        CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
        if (limit.rlim_max < 100000)
                limit.rlim_max = 100000;
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
                printf("missing: the right to have 100000 descriptors\n");
                exit(77);
        }
        CHECK(fcntl(fd, F_DUPFD, 1500) == 1500);
        high = fcntl(fd, F_DUPFD, 70000);
        CHECK(high == 70000);
        CHECK(close(fd) == 0);
        for (int i = 0; i < 2; i++) {
                int used = i ? high : 1500, instance = watched(used, EPOLLIN);

                order(used, 5);
                CHECK(ready(used, POLLIN, 5000) == POLLIN);
                CHECK(next_event(instance, 0) == EPOLLIN);
                get_pattern(used, 5);
        }
}

static void drain_late(int fd)
{
        uint64_t got = 0;
        static char bytes[65536];

        get(fd, "full");
        nap(50);
        for (;;) {
                ssize_t part = read(fd, bytes, sizeof bytes);

                CHECK(part >= 0);
                for (ssize_t i = 0; i < part; i++)
                        CHECK((uint8_t)bytes[i] == pattern(got + (uint64_t)i));
                got += (uint64_t)part;
                if (!part)
                        break;
        }
        put_all(fd, &got, sizeof got);
}

/* A full connection: EAGAIN and no POLLOUT. With room again: writes succeed, and POLLOUT. */
static void back_pressure(int fd)
{
        static uint8_t bytes[100000];
        uint64_t sent = 0, got;
        int instance;

        put(fd, "full");
        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        instance = watched(fd, EPOLLOUT);
        CHECK(next_event(instance, 0) == EPOLLOUT);
        for (int i = 0; i < 40; i++) {
                for (;;) {
                        ssize_t part;

                        for (size_t j = 0; j < sizeof bytes; j++)
                                bytes[j] = pattern(sent + j);
                        part = write(fd, bytes, sizeof bytes);
                        if (part < 0)
                                break;
                        sent += (uint64_t)part;
                }
                CHECK(errno == EAGAIN);
                if (i & 1)
                        CHECK(ready(fd, POLLOUT, 5000) == POLLOUT);
                else
                        CHECK(next_event(instance, 5000) == EPOLLOUT);
        }
        CHECK(shutdown(fd, SHUT_WR) == 0);
        CHECK(fcntl(fd, F_SETFL, 0) == 0);
        get_all(fd, &got, sizeof got);
        CHECK(got == sent);
}

static void *wait_a_second(void *instance)
{
        struct epoll_event event;
        double begin = clock_now();

        CHECK(epoll_wait(*(int *)instance, &event, 1, 1000) == 0);
        CHECK(clock_now() - begin > 0.99 && clock_now() - begin < within(2.5));
        return NULL;
}

/* A wait that began on TCP ends at its time-out on a ring. */
static void timeout_later(int unused)
{
        struct epoll_event event = {.events = EPOLLPRI};
        int fd = dial(), instance = epoll_create1(0);
        pthread_t thread;

        (void)unused;
        CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event) == 0);
        CHECK(pthread_create(&thread, NULL, wait_a_second, &instance) == 0);
        warm_up(fd);
        CHECK(pthread_join(thread, NULL) == 0);
}

static void timeouts(int fd)
{
        struct timeval time = {0, 200 * 1000};
        double before = clock_now();
        char byte;

        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time) == 0);
        CHECK(read(fd, &byte, 1) == -1 && errno == EAGAIN);
        CHECK(clock_now() - before >= 0.19 && clock_now() - before < within(2));
        order(fd, 1);
        get_pattern(fd, 1);
}

static void sleep_over(int fd)
{
        nap(1500);
        (void)fd;
}

static void send_timeout(int fd)
{
        static char bytes[1 << 20];
        struct timeval time = {0, 200 * 1000};
        double before = 0;
        ssize_t sent;

        CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time) == 0);
        do {
                before = clock_now();
                sent = write(fd, bytes, sizeof bytes);
        } while (sent > 0);
        CHECK(sent == -1 && errno == EAGAIN);
        CHECK(clock_now() - before >= 0.19 && clock_now() - before < within(1.2));
}

static volatile sig_atomic_t alarms;

static void count_alarm(int number)
{
        (void)number;
        alarms++;
}

static void alarm_soon(int flags)
{
        struct sigaction action = {.sa_handler = count_alarm, .sa_flags = flags};
        struct itimerval timer = {.it_value = {0, 100 * 1000}};

        CHECK(sigaction(SIGALRM, &action, NULL) == 0);
        CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
}

static void interrupted(int fd)
{
        int instance = watched(fd, EPOLLIN);
        struct pollfd one = {.fd = fd, .events = POLLIN};
        struct epoll_event event;
        fd_set set;
        char byte;

        alarm_soon(0);
        CHECK(read(fd, &byte, 1) == -1 && errno == EINTR);
        CHECK(alarms == 1);
        alarm_soon(0);
        CHECK(recv(fd, &byte, 1, MSG_WAITALL) == -1 && errno == EINTR);
        /* These are never restarted. */
        alarm_soon(SA_RESTART);
        CHECK(poll(&one, 1, -1) == -1 && errno == EINTR);
        alarm_soon(SA_RESTART);
        CHECK(epoll_wait(instance, &event, 1, -1) == -1 && errno == EINTR);
        alarm_soon(SA_RESTART);
        FD_ZERO(&set);
        FD_SET(fd, &set);
        CHECK(select(fd + 1, &set, NULL, NULL, NULL) == -1 && errno == EINTR);
        CHECK(alarms == 5);
}

static void answer_late(int fd)
{
        get(fd, "?");
        nap(300);
        put(fd, "x");
        get_end(fd);
}

static void restarted(int fd)
{
        put(fd, "?");
        alarm_soon(SA_RESTART);
        get(fd, "x");
        CHECK(alarms == 1);
}

static void masked(int fd)
{
        struct pollfd one = {.fd = fd, .events = POLLIN};
        struct timespec second = {1, 0};
        sigset_t blocked, none;

        sigemptyset(&none);
        sigemptyset(&blocked);
        sigaddset(&blocked, SIGALRM);
        CHECK(sigprocmask(SIG_BLOCK, &blocked, NULL) == 0);
        alarm_soon(0);
        nap(150);
        CHECK(alarms == 0);
        /* One that is pending is delivered although there is something to read. */
        CHECK(ppoll(&one, 1, &second, &none) == -1 && errno == EINTR);
        CHECK(alarms == 1);
        order(fd, 1);
        CHECK(ppoll(&one, 1, NULL, &none) == 1);
}

static sigjmp_buf back;

static void jump(int number)
{
        (void)number;
        siglongjmp(back, 1);
}

static void jumped(int fd)
{
        char byte;

        for (volatile int i = 0; i < 5; i++) {
                signal(SIGALRM, jump);
                if (sigsetjmp(back, 1) == 0) {
                        struct itimerval timer = {.it_value = {0, 50 * 1000}};
                        struct pollfd one = {.fd = fd, .events = POLLIN};

                        CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
                        if (i & 1)
                                (void)!read(fd, &byte, 1);
                        else
                                poll(&one, 1, -1);
                        CHECK(!"came back");
                }
                order(fd, 1);
                get_pattern(fd, 1);
        }
}

static void *read_for_ever(void *fd)
{
        char byte;

        (void)!read(*(int *)fd, &byte, 1);
        return NULL;
}

static void *poll_for_ever(void *fd)
{
        ready(*(int *)fd, POLLIN, -1);
        return NULL;
}

static void cancelled(int fd)
{
        for (int i = 0; i < 4; i++) {
                pthread_t thread;
                void *result;

                CHECK(pthread_create(&thread, NULL, i & 1 ? poll_for_ever : read_for_ever, &fd) == 0);
                nap(50);
                CHECK(pthread_cancel(thread) == 0);
                CHECK(pthread_join(thread, &result) == 0);
                CHECK(result == PTHREAD_CANCELED);
                order(fd, 1);
                get_pattern(fd, 1);
        }
}

enum { HANDLED = 200 };
static int handled_fd;
static volatile sig_atomic_t handled;

static void write_in_handler(int number)
{
        (void)number;
        if (handled < HANDLED && write(handled_fd, "h", 1) == 1)
                handled++;
}

static void count_letters(int fd)
{
        uint32_t counts[256] = {0};
        uint8_t bytes[4096];
        ssize_t got;

        while ((got = read(fd, bytes, sizeof bytes)) > 0)
                for (ssize_t i = 0; i < got; i++)
                        counts[bytes[i]]++;
        CHECK(got == 0);
        put_all(fd, counts, sizeof counts);
}

/* A handler writes to the connection on which its thread is writing. */
static void handler_writes(int fd)
{
        struct itimerval timer = {{0, 500}, {0, 500}}, never = {0};
        struct sigaction action = {.sa_handler = write_in_handler, .sa_flags = SA_RESTART};
        uint32_t counts[256], sent = 0;
        char bytes[3000];

        handled_fd = fd;
        memset(bytes, 'm', sizeof bytes);
        CHECK(sigaction(SIGALRM, &action, NULL) == 0);
        CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
        while (handled < HANDLED) {
                put_all(fd, bytes, sizeof bytes);
                sent += sizeof bytes;
        }
        CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        get_all(fd, counts, sizeof counts);
        if (counts['m'] != sent || counts['h'] != HANDLED)
                fprintf(stderr, "%u of %u and %u of %u arrived\n", counts['m'], sent, counts['h'], HANDLED);
        CHECK(counts['m'] == sent && counts['h'] == HANDLED);
}

static void *wait_by_select(void *argument)
{
        int fd = *(int *)argument;
        fd_set set;

        FD_ZERO(&set);
        FD_SET(fd, &set);
        CHECK(select(fd + 1, &set, NULL, NULL, NULL) == 1);
        return NULL;
}

static void *wait_by_poll(void *fd)
{
        CHECK(ready(*(int *)fd, POLLIN, -1) == POLLIN);
        return NULL;
}

static void *wait_by_epoll(void *fd)
{
        CHECK(next_event(watched(*(int *)fd, EPOLLIN), -1) == EPOLLIN);
        return NULL;
}

static void *wait_by_edge(void *fd)
{
        CHECK(next_event(watched(*(int *)fd, EPOLLIN | EPOLLET), -1) == EPOLLIN);
        return NULL;
}

static void *wait_by_peek(void *fd)
{
        char byte;

        CHECK(recv(*(int *)fd, &byte, 1, MSG_PEEK) == 1);
        return NULL;
}

/* A byte wakes all waiting threads, each in another call. */
static void many_wait(int fd)
{
        static void *(*const means[])(void *) = {wait_by_select, wait_by_poll, wait_by_epoll, wait_by_edge,
                                                 wait_by_peek};
        enum { MEANS = 5, EACH = 4 };

        for (int round = 0; round < 10; round++) {
                pthread_t threads[MEANS * EACH];

                for (int i = 0; i < MEANS * EACH; i++)
                        CHECK(pthread_create(&threads[i], NULL, means[i % MEANS], &fd) == 0);
                order(fd, 1);
                for (int i = 0; i < MEANS * EACH; i++)
                        CHECK(pthread_join(threads[i], NULL) == 0);
                get_pattern(fd, 1);
        }
}

/* Waiting takes no CPU time. */
static void idle(int fd)
{
        struct timespec before, after;

        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
        CHECK(ready(fd, POLLIN, 1000) == 0);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
        CHECK(after.tv_sec - before.tv_sec + (double)(after.tv_nsec - before.tv_nsec) / 1e9 < 0.05);
}

/* Time-outs too long to express in ns. */
static void wait_for_ages(int fd)
{
        struct timespec age = {LONG_MAX, 999999999};
        struct epoll_event event;
        struct pollfd one = {.fd = fd, .events = POLLIN};
        int instance = watched(fd, EPOLLIN);
        struct timeval time;
        fd_set set;

        for (int i = 0; i < 6; i++) {
                time = (struct timeval){i & 1 ? LONG_MAX : LONG_MAX / 1000000000 + i, 999999};
                order(fd, 1);
                FD_ZERO(&set);
                FD_SET(fd, &set);
                switch (i) {
                case 0:
                case 1:
                        CHECK(select(fd + 1, &set, NULL, NULL, &time) == 1 && FD_ISSET(fd, &set));
                        CHECK(time.tv_sec > LONG_MAX / 1000000000 - 60);
                        break;
                case 2:
                        CHECK(pselect(fd + 1, &set, NULL, NULL, &age, NULL) == 1 && FD_ISSET(fd, &set));
                        break;
                case 3:
                        CHECK(ppoll(&one, 1, &age, NULL) == 1 && one.revents == POLLIN);
                        break;
                case 4:
                        CHECK(epoll_pwait2(instance, &event, 1, &age, NULL) == 1);
                        break;
                default:
                        CHECK(epoll_wait(instance, &event, 1, INT_MAX) == 1);
                }
                get_pattern(fd, 1);
        }
}

static int small_fd;

/* Each call that waits, on the smallest stack that a thread can have. */
static void *wait_in_little_room(void *unused)
{
        struct timeval soon = {0, 20 * 1000};
        struct epoll_event event;
        struct pollfd one = {.fd = small_fd, .events = POLLIN};
        int instance = watched(small_fd, EPOLLIN);
        fd_set set;

        (void)unused;
        FD_ZERO(&set);
        FD_SET(small_fd, &set);
        CHECK(select(small_fd + 1, &set, NULL, NULL, &soon) == 0);
        CHECK(poll(&one, 1, 20) == 0);
        CHECK(epoll_wait(instance, &event, 1, 20) == 0);
        order(small_fd, 3);
        FD_SET(small_fd, &set);
        CHECK(select(small_fd + 1, &set, NULL, NULL, NULL) == 1);
        CHECK(poll(&one, 1, -1) == 1);
        CHECK(epoll_wait(instance, &event, 1, -1) == 1);
        get_pattern(small_fd, 3);
        return NULL;
}

static void small_stack(int fd)
{
        pthread_attr_t attributes;
        pthread_t thread;

        small_fd = fd;
        CHECK(pthread_attr_init(&attributes) == 0);
        CHECK(pthread_attr_setstacksize(&attributes, 16384) == 0);
        CHECK(pthread_create(&thread, &attributes, wait_in_little_room, NULL) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
}

static void *poll_many(void *fd)
{
        struct pollfd many[100];
        fd_set set;

        for (int i = 0; i < 100; i++)
                many[i] = (struct pollfd){.fd = *(int *)fd, .events = POLLIN};
        CHECK(poll(many, 100, 0) == 0);
        FD_ZERO(&set);
        for (int i = 0; i < 3; i++)
                FD_SET(i, &set);
        FD_SET(*(int *)fd, &set);
        CHECK(select(*(int *)fd + 1, NULL, NULL, &set, &(struct timeval){0}) == 0);
        return NULL;
}

static long pages(void)
{
        FILE *file = fopen("/proc/self/statm", "r");
        long size = 0;

        CHECK(file && fscanf(file, "%ld", &size) == 1);
        fclose(file);
        return size;
}

/* Threads that have ended leave no memory behind. */
static void thread_memory(int fd)
{
        long before = 0;

        for (int i = 0; i < 500; i++) {
                pthread_t thread;

                if (i == 50)
                        before = pages();
                CHECK(pthread_create(&thread, NULL, poll_many, &fd) == 0);
                CHECK(pthread_join(thread, NULL) == 0);
        }
        CHECK(pages() - before < 100);
}

enum { ROUNDS = 300 };

static uint64_t waits_of(const struct traced *traced)
{
#ifdef SYS_epoll_wait
        return traced->calls[SYS_epoll_wait] + traced->calls[SYS_epoll_pwait] +
               traced->calls[SYS_epoll_pwait2];
#else
        return traced->calls[SYS_epoll_pwait] + traced->calls[SYS_epoll_pwait2];
#endif
}

/* One message at a time, on one of two connections. */
static void wait_for_two(int listener)
{
        struct traced *traced = traced_begin();
        int instance = epoll_create1(0);
        uint64_t before;

        for (int i = 0; i < 2; i++) {
                struct epoll_event event = {.events = EPOLLIN, .data.fd = accept(listener, NULL, NULL)};

                CHECK(event.data.fd >= 0);
                warm_up_server(event.data.fd);
                CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, event.data.fd, &event) == 0);
        }
        before = waits_of(traced);
        for (int i = 0; i < ROUNDS; i++) {
                struct epoll_event events[4];

                CHECK(epoll_wait(instance, events, 4, -1) == 1);
                get(events[0].data.fd, "?");
                put(events[0].data.fd, "!");
        }
        CHECK(waits_of(traced) - before <= ROUNDS * 3 / 2);
}

static void ask_in_turn(int unused)
{
        int fds[2];

        (void)unused;
        for (int i = 0; i < 2; i++) {
                fds[i] = dial();
                warm_up(fds[i]);
        }
        for (int i = 0; i < ROUNDS; i++) {
                nap(2);
                put(fds[i % 2], "?");
                get(fds[i % 2], "!");
        }
        get_end(fds[0]);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"epoll_level", obey, epoll_level, false},
            {"epoll_edge", obey, epoll_edge, false},
            {"epoll_edge_both", obey, epoll_edge_both, false},
            {"epoll_once", obey, epoll_once, false},
            {"epoll_changed", obey, epoll_changed, false},
            {"epoll_twice", obey, epoll_twice, false},
            {"epoll_duplicate", obey, epoll_duplicate, false},
            {"epoll_nested", obey, epoll_nested, false},
            {"epoll_timed", obey, epoll_timed, false},
            {"epoll_before", serve_one, epoll_before, true},
            {"epoll_calls", wait_for_two, ask_in_turn, true},
            {"poll_and_select", obey, poll_and_select, false},
            {"select_large", obey, select_large, false},
            {"poll_among_others", obey, poll_among_others, false},
            {"high_descriptor", obey, high_descriptor, false},
            {"back_pressure", drain_late, back_pressure, false},
            {"timeout_later", serve_one, timeout_later, true},
            {"receive_timeout", obey, timeouts, false},
            {"send_timeout", sleep_over, send_timeout, false},
            {"interrupted", obey, interrupted, false},
            {"restarted", answer_late, restarted, false},
            {"masked", obey, masked, false},
            {"jumped", obey, jumped, false},
            {"cancelled", obey, cancelled, false},
            {"handler_writes", count_letters, handler_writes, false},
            {"many_wait", obey, many_wait, false},
            {"idle", obey, idle, false},
            {"wait_for_ages", obey, wait_for_ages, false},
            {"small_stack", obey, small_stack, false},
            {"thread_memory", obey, thread_memory, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
