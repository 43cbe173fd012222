/* Two ends of one connection, each a process: what all programs here are made of.
 *
 *      PROGRAM server|client ADDRESS PORT SCENARIO
 *
 * A scenario is what each end does once there is a connection. With FREEFLOW_EXPECTED=1 the
 * connection is used until the kernel sees no more of its bytes, so that the scenario runs on a
 * ring.
 */
#ifndef PAIR_H
#define PAIR_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

#ifndef __GLIBC__
/* musl does not have these calls; they are tested with glibc. */
static inline int epoll_pwait2(int epfd, struct epoll_event *events, int size, const struct timespec *time,
                               const sigset_t *mask)
{
        int ms = time && time->tv_sec < 1000000
                     ? (int)(time->tv_sec * 1000 + (time->tv_nsec + 999999) / 1000000)
                     : -1;

        return epoll_pwait(epfd, events, size, ms, mask);
}

static inline int close_range(unsigned first, unsigned last, int flags)
{
        (void)flags;
        for (unsigned fd = first; fd <= last && fd < 4096; fd++)
                close((int)fd);
        return 0;
}

static inline void closefrom(int first)
{
        close_range((unsigned)first, ~0u, 0);
}
#endif

struct scenario {
        const char *name;
        void (*server)(int fd);
        void (*client)(int fd);
        bool alone; /* makes its connections itself: the server gets the listener, the client -1 */
};

static struct sockaddr_in address;
static const char *role;

#define CHECK(condition)                                                                                     \
        do {                                                                                                 \
                if (!(condition)) {                                                                          \
                        fprintf(stderr, "%s, line %d: %s (%s)\n", role, __LINE__, #condition,                \
                                strerror(errno));                                                            \
                        _exit(1);                                                                            \
                }                                                                                            \
        } while (0)

static inline void nap(int milliseconds)
{
        struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000L};

        nanosleep(&time, NULL);
}

static inline double clock_now(void)
{
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* How long something takes here that takes `seconds` on an idle machine: testbed/patience.py
 * measures how busy this one is. */
static inline double within(double seconds)
{
        const char *slowness = getenv("SLOWNESS");

        return seconds * (slowness ? atof(slowness) : 1);
}

static inline void put_all(int fd, const void *from, size_t size)
{
        for (size_t done = 0; done < size;) {
                ssize_t sent = write(fd, (const char *)from + done, size - done);

                if (sent < 0 && errno == EINTR)
                        continue;
                CHECK(sent > 0);
                done += (size_t)sent;
        }
}

static inline void get_all(int fd, void *to, size_t size)
{
        for (size_t done = 0; done < size;) {
                ssize_t got = read(fd, (char *)to + done, size - done);

                if (got < 0 && errno == EINTR)
                        continue;
                CHECK(got > 0);
                done += (size_t)got;
        }
}

static inline void put(int fd, const char *text)
{
        put_all(fd, text, strlen(text));
}

static inline void get(int fd, const char *text)
{
        char got[256] = "";

        get_all(fd, got, strlen(text));
        CHECK(memcmp(got, text, strlen(text)) == 0);
}

static inline uint8_t pattern(uint64_t place)
{
        return (uint8_t)((place * UINT64_C(0x9e3779b97f4a7c15)) >> 56);
}

static inline void put_pattern(int fd, size_t size)
{
        uint8_t *bytes = malloc(size);

        CHECK(bytes);
        for (size_t i = 0; i < size; i++)
                bytes[i] = pattern(i);
        put_all(fd, bytes, size);
        free(bytes);
}

static inline void get_pattern(int fd, size_t size)
{
        uint8_t *bytes = malloc(size);

        CHECK(bytes);
        get_all(fd, bytes, size);
        for (size_t i = 0; i < size; i++)
                CHECK(bytes[i] == pattern(i));
        free(bytes);
}

static inline void get_end(int fd)
{
        char byte;

        CHECK(read(fd, &byte, 1) == 0);
}

/* Whether it can be read, or written, within the time. */
static inline short ready(int fd, short events, int milliseconds)
{
        struct pollfd one = {.fd = fd, .events = events};

        CHECK(poll(&one, 1, milliseconds) >= 0);
        return one.revents;
}

/* The bytes that the kernel has counted on the connection; by syscall(), which the library does not
 * change. */
static inline uint64_t kernel_bytes(int fd)
{
        struct tcp_info info;
        socklen_t size = sizeof info;

        memset(&info, 0, sizeof info);
        CHECK(syscall(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0);
        return info.tcpi_bytes_sent + info.tcpi_bytes_received;
}

/* Client: ping-pong until the kernel counts no more bytes. */
static inline void warm_up(int fd)
{
        bool expected = getenv("FREEFLOW_EXPECTED") != NULL;

        for (int i = 0;; i++) {
                uint64_t before = kernel_bytes(fd);
                char byte = 'c';

                put_all(fd, &byte, 1);
                get_all(fd, &byte, 1);
                if (expected ? kernel_bytes(fd) == before : i == 10)
                        break;
                if (i > 3000) {
                        fprintf(stderr, "the connection was not upgraded\n");
                        _exit(1);
                }
                if (i > 3)
                        nap(1);
        }
        put(fd, "d");
        get(fd, "d");
}

static inline void warm_up_server(int fd)
{
        char byte;

        do {
                get_all(fd, &byte, 1);
                put_all(fd, &byte, 1);
        } while (byte != 'd');
}

static inline int dial(void)
{
        int fd;

        for (int tries = 0;; tries++) {
                fd = socket(AF_INET, SOCK_STREAM, 0);
                CHECK(fd >= 0);
                if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
                        return fd;
                CHECK(tries < 500);
                close(fd);
                nap(10);
        }
}

static inline int listen_there(void)
{
        int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

        CHECK(fd >= 0);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
        CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
        CHECK(listen(fd, 1024) == 0);
        return fd;
}

static inline int run_scenario(int count, char **arguments, const struct scenario *scenarios)
{
        if (count != 5)
                return 2;
        role = arguments[1];
        address.sin_family = AF_INET;
        address.sin_port = htons((uint16_t)atoi(arguments[3]));
        CHECK(inet_pton(AF_INET, arguments[2], &address.sin_addr) == 1);
        for (; scenarios->name; scenarios++) {
                int fd = -1;

                if (strcmp(scenarios->name, arguments[4]) != 0)
                        continue;
                if (strcmp(role, "server") == 0) {
                        int listener = listen_there();

                        if (!scenarios->alone) {
                                fd = accept(listener, NULL, NULL);
                                CHECK(fd >= 0);
                                close(listener);
                                warm_up_server(fd);
                        }
                        scenarios->server(scenarios->alone ? listener : fd);
                } else {
                        if (!scenarios->alone) {
                                fd = dial();
                                warm_up(fd);
                        }
                        scenarios->client(fd);
                }
                return 0;
        }
        fprintf(stderr, "no scenario %s\n", arguments[4]);
        return 2;
}

#endif
