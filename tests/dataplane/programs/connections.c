/* How connections begin, what they say of themselves, and many of them. */
#include "pair.h"

static void echo(int fd)
{
        static __thread char bytes[65536];
        ssize_t got;

        while ((got = read(fd, bytes, sizeof bytes)) > 0)
                put_all(fd, bytes, (size_t)got);
        CHECK(got == 0 || errno == ECONNRESET);
        close(fd);
}

static void *echo_warm(void *fd)
{
        warm_up_server((int)(intptr_t)fd);
        echo((int)(intptr_t)fd);
        return NULL;
}

static int error_of(int fd)
{
        int error = -1;
        socklen_t size = sizeof error;

        CHECK(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0);
        return error;
}

static void connect_later(int unused)
{
        (void)unused;
        close(dial());
        for (int i = 0; i < 1; i++) {
                int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

                CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) == -1 && errno == EINPROGRESS);
                CHECK(ready(fd, POLLOUT, 5000) == POLLOUT);
                CHECK(error_of(fd) == 0);
                CHECK(fcntl(fd, F_GETFL) & O_NONBLOCK);
                CHECK(fcntl(fd, F_SETFL, 0) == 0);
                warm_up(fd);
                put(fd, "hello");
                get(fd, "hello");
                CHECK(close(fd) == 0);
        }
}

static void echo_first_closed(int listener)
{
        int fd = accept(listener, NULL, NULL);

        CHECK(fd >= 0);
        get_end(fd);
        close(fd);
        fd = accept(listener, NULL, NULL);
        CHECK(fd >= 0);
        echo_warm((void *)(intptr_t)fd);
}

static void refused(int fd)
{
        struct sockaddr_in nobody = address;
        int one = socket(AF_INET, SOCK_STREAM, 0), other = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

        nobody.sin_port = htons(1);
        CHECK(connect(one, (struct sockaddr *)&nobody, sizeof nobody) == -1 && errno == ECONNREFUSED);
        CHECK(connect(other, (struct sockaddr *)&nobody, sizeof nobody) == -1);
        CHECK(errno == EINPROGRESS || errno == ECONNREFUSED);
        if (errno == EINPROGRESS) {
                CHECK(ready(other, POLLOUT, 5000) == (POLLOUT | POLLERR | POLLHUP));
                CHECK(error_of(other) == ECONNREFUSED);
        }
        CHECK(error_of(other) == 0);
        put(fd, "still");
        get(fd, "still");
}

static void names_server(int listener)
{
        struct sockaddr_in peer, local, other;
        socklen_t size = sizeof peer;
        int fd = accept(listener, (struct sockaddr *)&peer, &size);

        CHECK(fd >= 0 && size == sizeof peer);
        warm_up_server(fd);
        CHECK(getpeername(fd, (struct sockaddr *)&other, &size) == 0);
        CHECK(memcmp(&peer, &other, sizeof peer) == 0);
        CHECK(getsockname(fd, (struct sockaddr *)&local, &size) == 0);
        CHECK(local.sin_port == address.sin_port && local.sin_addr.s_addr == address.sin_addr.s_addr);
        put_all(fd, &peer, sizeof peer);
        echo(fd);
}

static void names(int unused)
{
        struct sockaddr_in local, seen, peer;
        socklen_t size = sizeof local;
        int fd = dial();

        (void)unused;
        warm_up(fd);
        get_all(fd, &seen, sizeof seen);
        CHECK(getsockname(fd, (struct sockaddr *)&local, &size) == 0);
        CHECK(local.sin_port == seen.sin_port && local.sin_addr.s_addr == seen.sin_addr.s_addr);
        CHECK(getpeername(fd, (struct sockaddr *)&peer, &size) == 0);
        CHECK(peer.sin_port == address.sin_port && peer.sin_addr.s_addr == address.sin_addr.s_addr);
}

static int option(int fd, int level, int name)
{
        int value = -1;
        socklen_t size = sizeof value;

        CHECK(getsockopt(fd, level, name, &value, &size) == 0);
        return value;
}

static void options(int fd)
{
        struct tcp_info info;
        socklen_t size = sizeof info;
        int one = 1;

        CHECK(option(fd, SOL_SOCKET, SO_TYPE) == SOCK_STREAM);
        CHECK(option(fd, SOL_SOCKET, SO_PROTOCOL) == IPPROTO_TCP);
        CHECK(option(fd, SOL_SOCKET, SO_ACCEPTCONN) == 0);
        CHECK(option(fd, SOL_SOCKET, SO_ERROR) == 0);
        CHECK(option(fd, SOL_SOCKET, SO_RCVBUF) > 0);
        CHECK(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0);
        CHECK(info.tcpi_state == 1);
        for (const int *name = (const int[]){TCP_NODELAY, TCP_CORK, TCP_QUICKACK, -1}; *name >= 0; name++) {
                CHECK(setsockopt(fd, IPPROTO_TCP, *name, &one, sizeof one) == 0);
                CHECK(option(fd, IPPROTO_TCP, *name) != 0);
                put(fd, "on");
                if (*name == TCP_CORK)
                        CHECK(setsockopt(fd, IPPROTO_TCP, TCP_CORK, &(int){0}, sizeof one) == 0);
                get(fd, "on");
        }
        CHECK(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one) == 0);
        CHECK(option(fd, SOL_SOCKET, SO_KEEPALIVE) == 1);
        CHECK(setsockopt(fd, SOL_SOCKET, 12345, &one, sizeof one) == -1 && errno == ENOPROTOOPT);
}

/* SO_RCVLOWAT, time stamps: a ring can't carry them, so the connection continues on TCP. */
static void options_apart(int fd)
{
        int many = 100, one = 1;

        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &many, sizeof many) == 0);
        CHECK(option(fd, SOL_SOCKET, SO_RCVLOWAT) == 100);
        put_pattern(fd, 50);
        CHECK(ready(fd, POLLIN, 100) == 0);
        put_pattern(fd, 50);
        CHECK(ready(fd, POLLIN, 5000) == POLLIN);
        get_pattern(fd, 50);
        get_pattern(fd, 50);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof one) == 0);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_TIMESTAMP, &one, sizeof one) == 0);
        put_pattern(fd, 5000);
        get_pattern(fd, 5000);
}

/* connect() and listen() on a connected socket fail as without the library. */
static void wrong_calls(int fd)
{
        struct sockaddr_in any = {.sin_family = AF_INET};

        CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) == -1 && errno == EISCONN);
        CHECK(listen(fd, 1) == -1 && errno == EINVAL);
        CHECK(accept(fd, NULL, NULL) == -1 && errno == EINVAL);
        CHECK(bind(fd, (struct sockaddr *)&any, sizeof any) == -1 && errno == EINVAL);
        CHECK(lseek(fd, 0, SEEK_CUR) == -1 && errno == ESPIPE);
        CHECK(pread(fd, (char[1]){0}, 1, 0) == -1 && errno == ESPIPE);
        CHECK(sendto(fd, "x", 1, 0, (struct sockaddr *)&address, sizeof address) == 1);
        get(fd, "x");
}

enum { LISTENERS = 4, REUSED = 40 };

static void *serve_listener(void *argument)
{
        for (;;) {
                int fd = accept((int)(intptr_t)argument, NULL, NULL);
                pthread_t thread;

                if (fd < 0)
                        return NULL;
                CHECK(pthread_create(&thread, NULL, echo_warm, (void *)(intptr_t)fd) == 0);
                CHECK(pthread_detach(thread) == 0);
        }
}

/* Several threads accept on one port; each connection works, whichever thread has accepted it. */
static void several_listeners(int listener)
{
        pthread_t threads[LISTENERS];
        struct sockaddr_in shared = address;
        int one = 1, fds[LISTENERS], fd;

        shared.sin_port = htons((uint16_t)(ntohs(address.sin_port) + 10000));
        for (int i = 0; i < LISTENERS; i++) {
                fds[i] = socket(AF_INET, SOCK_STREAM, 0);
                CHECK(setsockopt(fds[i], SOL_SOCKET, SO_REUSEPORT, &one, sizeof one) == 0);
                CHECK(bind(fds[i], (struct sockaddr *)&shared, sizeof shared) == 0);
                CHECK(listen(fds[i], 100) == 0);
                CHECK(pthread_create(&threads[i], NULL, serve_listener, (void *)(intptr_t)fds[i]) == 0);
        }
        fd = accept(listener, NULL, NULL);
        CHECK(fd >= 0);
        put(fd, "k");
        get(fd, "e");
}

static void use_listeners(int unused)
{
        int fds[REUSED], control = dial();

        (void)unused;
        get(control, "k");
        address.sin_port = htons((uint16_t)(ntohs(address.sin_port) + 10000));
        for (int i = 0; i < REUSED; i++)
                fds[i] = dial();
        for (int i = 0; i < REUSED; i++) {
                char text[32];

                warm_up(fds[i]);
                snprintf(text, sizeof text, "connection %d", i);
                put(fds[i], text);
        }
        for (int i = REUSED - 1; i >= 0; i--) {
                char text[32];

                snprintf(text, sizeof text, "connection %d", i);
                get(fds[i], text);
        }
        put(control, "e");
}

static void serve_again(int listener)
{
        for (int i = 0; i < 20; i++) {
                int fd = accept(listener, NULL, NULL);

                CHECK(fd >= 0);
                close(listener);
                warm_up_server(fd);
                get(fd, "again");
                put(fd, "again");
                close(fd);
                listener = listen_there();
        }
}

/* A connection with the same two ports as the one before, as soon as the kernel permits it. */
static void ports_again(int unused)
{
        struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons(45678)};
        struct linger now = {.l_onoff = 1, .l_linger = 0};
        int one = 1;

        (void)unused;
        for (int i = 0; i < 20; i++) {
                int fd = -1;

                for (int tries = 0;; tries++) {
                        fd = socket(AF_INET, SOCK_STREAM, 0);
                        CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
                        CHECK(bind(fd, (struct sockaddr *)&local, sizeof local) == 0);
                        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
                                break;
                        CHECK(tries < 500);
                        close(fd);
                        nap(5);
                }
                warm_up(fd);
                put(fd, "again");
                get(fd, "again");
                get_end(fd);
                CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
                CHECK(close(fd) == 0);
        }
}

/* Both ends in one thread of one process. */
static void itself(int listener)
{
        int one = dial(), other = accept(listener, NULL, NULL);

        CHECK(other >= 0);
        for (int i = 0; i < 1000; i++) {
                put(one, "there");
                get(other, "there");
                put(other, "back");
                get(one, "back");
        }
        close(one);
        get_end(other);
}

static void nobody(int unused)
{
        (void)unused;
}

enum { THOUSANDS = 3000 };

static void serve_thousands(int listener)
{
        static int fds[THOUSANDS];

        for (int i = 0; i < THOUSANDS; i++)
                CHECK((fds[i] = accept(listener, NULL, NULL)) >= 0);
        for (int round = 0; round < 8; round++)
                for (int i = 0; i < THOUSANDS; i++) {
                        int number;

                        get_all(fds[i], &number, sizeof number);
                        CHECK(number == i + round);
                        put_all(fds[i], &number, sizeof number);
                }
}

static void thousands(int unused)
{
        static int fds[THOUSANDS];

        (void)unused;
        for (int i = 0; i < THOUSANDS; i++)
                fds[i] = dial();
        for (int round = 0; round < 8; round++) {
                for (int i = 0; i < THOUSANDS; i++)
                        put_all(fds[i], &(int){i + round}, sizeof(int));
                for (int i = 0; i < THOUSANDS; i++) {
                        int number;

                        get_all(fds[i], &number, sizeof number);
                        CHECK(number == i + round);
                }
        }
}

enum { CHURNS = 4, SHORT = 300 };

static void *serve_short(void *listener)
{
        for (int i = 0; i < SHORT; i++) {
                int fd = accept((int)(intptr_t)listener, NULL, NULL);
                uint32_t size;

                CHECK(fd >= 0);
                get_all(fd, &size, sizeof size);
                get_pattern(fd, size);
                put_pattern(fd, size);
                close(fd);
        }
        return NULL;
}

static void *call_short(void *number)
{
        for (uint32_t i = 0; i < SHORT; i++) {
                uint32_t size = 1 + (i * 7919 + (uint32_t)(intptr_t)number * 104729) % 70000;
                int fd = dial();

                put_all(fd, &size, sizeof size);
                put_pattern(fd, size);
                get_pattern(fd, size);
                get_end(fd);
                close(fd);
        }
        return NULL;
}

static void in_threads(void *(*function)(void *), int argument, bool counts)
{
        pthread_t threads[CHURNS];

        for (int i = 0; i < CHURNS; i++)
                CHECK(pthread_create(&threads[i], NULL, function,
                                     (void *)(intptr_t)(counts ? i : argument)) == 0);
        for (int i = 0; i < CHURNS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
}

static void serve_churn(int listener)
{
        in_threads(serve_short, listener, false);
}

static void churn(int unused)
{
        in_threads(call_short, unused, true);
}

/* No call holds a lock while it waits: one thread waits in accept and one in connect, and a third
 * works. */
static void *wait_in_accept(void *listener)
{
        int fd = accept((int)(intptr_t)listener, NULL, NULL);

        CHECK(fd >= 0);
        close(fd);
        return NULL;
}

static void not_held_up(int fd)
{
        struct sockaddr_in here = {.sin_family = AF_INET};
        socklen_t size = sizeof here;
        int listener = socket(AF_INET, SOCK_STREAM, 0), caller = socket(AF_INET, SOCK_STREAM, 0);
        pthread_t thread;

        CHECK(bind(listener, (struct sockaddr *)&here, sizeof here) == 0);
        CHECK(listen(listener, 1) == 0);
        CHECK(listen(listener, 1) == 0);
        CHECK(getsockname(listener, (struct sockaddr *)&here, &size) == 0);
        CHECK(pthread_create(&thread, NULL, wait_in_accept, (void *)(intptr_t)listener) == 0);
        nap(50);
        for (int i = 0; i < 1000; i++) {
                put(fd, "ping");
                get(fd, "ping");
        }
        here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        CHECK(connect(caller, (struct sockaddr *)&here, sizeof here) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
}

enum { ORDERED = 8 };

/* Answers with the order in which the connections' events were reported. */
static void tell_order(int listener)
{
        int instance = epoll_create1(0), fds[ORDERED], heard = 0;
        char order[ORDERED + 1] = "";

        for (int i = 0; i < ORDERED; i++) {
                /* Edge-triggered: the kernel reports level-triggered connections again before new
                 * events. */
                struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = (uint32_t)i};

                fds[i] = accept(listener, NULL, NULL);
                CHECK(fds[i] >= 0);
                warm_up_server(fds[i]);
                CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, fds[i], &event) == 0);
        }
        for (;;) {
                struct epoll_event events[16];
                int got = epoll_wait(instance, events, 16, -1);

                for (int i = 0; i < got; i++) {
                        char byte;
                        ssize_t size = recv(fds[events[i].data.u32], &byte, 1, 0);

                        CHECK(size >= 0);
                        if (size == 0)
                                return;
                        order[heard++] = (char)('0' + events[i].data.u32);
                        CHECK(byte == order[heard - 1]);
                }
                if (heard == ORDERED) {
                        put(fds[0], order);
                        heard = 0;
                }
        }
}

/* Messages on several connections are reported in the order in which they were sent. */
static void in_order(int unused)
{
        int fds[ORDERED];

        (void)unused;
        for (int i = 0; i < ORDERED; i++) {
                fds[i] = dial();
                warm_up(fds[i]);
        }
        srand(7);
        for (int round = 0; round < 300; round++) {
                char order[ORDERED + 1] = "01234567";

                for (int i = ORDERED - 1; i > 0; i--) {
                        int other = rand() % (i + 1);
                        char byte = order[i];

                        order[i] = order[other];
                        order[other] = byte;
                }
                if (round % 3 == 0)
                        nap(1);
                for (int i = 0; i < ORDERED; i++)
                        put_all(fds[order[i] - '0'], &order[i], 1);
                get(fds[0], order);
        }
}

/* Answers '?' with the number of open connections, and echoes any other byte. */
static void count_open(int listener)
{
        int instance = epoll_create1(0), open = 0;
        struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
        char byte;

        CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, listener, &event) == 0);
        do {
                struct epoll_event events[16];
                int got = epoll_wait(instance, events, 16, -1);

                /* Ends of connections first, as a program would see them that checks all
                 * connections. */
                for (int i = 0; i < got; i++)
                        if (events[i].data.fd != listener &&
                            recv(events[i].data.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0) {
                                close(events[i].data.fd);
                                events[i].data.fd = -1;
                                open--;
                        }
                for (int i = 0; i < got; i++) {
                        if (events[i].data.fd == listener) {
                                event.data.fd = accept(listener, NULL, NULL);
                                CHECK(event.data.fd >= 0);
                                CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, event.data.fd, &event) == 0);
                                open++;
                        } else if (events[i].data.fd >= 0 &&
                                   recv(events[i].data.fd, &byte, 1, MSG_DONTWAIT) == 1) {
                                if (byte == '?')
                                        byte = (char)('0' + open);
                                CHECK(send(events[i].data.fd, &byte, 1, 0) == 1);
                        }
                }
        } while (open);
}

/* A byte that is sent on one connection after another one was closed arrives after that end, also
 * if the closed connection is on TCP. */
static void closed_before(int unused)
{
        int stays = dial(), one = 1;

        (void)unused;
        warm_up(stays);
        for (int i = 0; i < 60; i++) {
                int goes = dial();

                if (i % 3 == 0) {
                        CHECK(setsockopt(goes, SOL_SOCKET, SO_OOBINLINE, &one, sizeof one) == 0);
                        put(goes, "c");
                        get(goes, "c");
                } else {
                        warm_up(goes);
                }
                for (int j = 0; j < 20; j++) {
                        put(stays, "?");
                        get(stays, "2");
                }
                CHECK((i % 3 == 2 ? shutdown(goes, SHUT_WR) : close(goes)) == 0);
                put(stays, "?");
                get(stays, "1");
                if (i % 3 == 2)
                        close(goes);
        }
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"connect_later", echo_first_closed, connect_later, true},
            {"refused", echo, refused, false},
            {"names", names_server, names, true},
            {"options", echo, options, false},
            {"options_apart", echo, options_apart, false},
            {"wrong_calls", echo, wrong_calls, false},
            {"several_listeners", several_listeners, use_listeners, true},
            {"ports_again", serve_again, ports_again, true},
            {"itself", itself, nobody, true},
            {"thousands", serve_thousands, thousands, true},
            {"churn", serve_churn, churn, true},
            {"in_order", tell_order, in_order, true},
            {"closed_before", count_open, closed_before, true},
            {"not_held_up", echo, not_held_up, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
