/* Common to the load programs: addresses, whole reads and writes, clocks, CPU time, pinning to a
 * core. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static inline _Noreturn void fail(const char *what)
{
        fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(errno));
        exit(1);
}

/* A negative number: keep the affinity that this program was started with. */
static inline void pin(int cpu)
{
        cpu_set_t set;

        if (cpu < 0)
                return;
        CPU_ZERO(&set);
        CPU_SET((size_t)cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set) < 0)
                fail("sched_setaffinity");
}

struct endpoint {
        struct sockaddr_storage address;
        socklen_t length;
};

/* An address with a slash is the path of a unix socket. Others are numeric: getaddrinfo would ask
 * files of the place that the program runs in. */
static inline struct endpoint resolve(const char *address, const char *port)
{
        struct endpoint found = {.length = 0};
        struct sockaddr_in *v4 = (struct sockaddr_in *)&found.address;
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&found.address;
        struct sockaddr_un *local = (struct sockaddr_un *)&found.address;
        in_port_t number = htons((uint16_t)atoi(port));

        if (strchr(address, '/') && strlen(address) < sizeof local->sun_path) {
                local->sun_family = AF_UNIX;
                strcpy(local->sun_path, address);
                found.length = sizeof *local;
        } else if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
                v4->sin_family = AF_INET;
                v4->sin_port = number;
                found.length = sizeof *v4;
        } else if (inet_pton(AF_INET6, address, &v6->sin6_addr) == 1) {
                v6->sin6_family = AF_INET6;
                v6->sin6_port = number;
                found.length = sizeof *v6;
        } else {
                fprintf(stderr, "%s: %s is neither an IP address nor a path\n", program_invocation_short_name,
                        address);
                exit(2);
        }
        return found;
}

static inline int listen_at(const struct endpoint *where)
{
        int fd = socket(where->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

        if (fd < 0)
                fail("socket");
        if (where->address.ss_family == AF_UNIX)
                (void)unlink(((const struct sockaddr_un *)&where->address)->sun_path);
        else if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0)
                fail("SO_REUSEADDR");
        if (bind(fd, (const struct sockaddr *)&where->address, where->length) < 0)
                fail("bind");
        if (listen(fd, 1024) < 0)
                fail("listen");
        return fd;
}

static inline void no_delay(int fd)
{
        int one = 1;

        if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0 && errno != EOPNOTSUPP)
                fail("TCP_NODELAY");
}

static inline int connect_to(const struct endpoint *where)
{
        int fd = socket(where->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

        if (fd < 0)
                fail("socket");
        if (connect(fd, (const struct sockaddr *)&where->address, where->length) < 0)
                fail("connect");
        no_delay(fd);
        return fd;
}

/* Write all of it; false when the other end is gone. A full buffer of a socket that doesn't block
 * is waited for. */
static inline int write_all(int fd, const char *from, size_t size)
{
        while (size > 0) {
                ssize_t n = send(fd, from, size, MSG_NOSIGNAL);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0 && errno == EAGAIN) {
                        struct pollfd full = {.fd = fd, .events = POLLOUT};

                        if (poll(&full, 1, 5000) == 0)
                                return 0;
                        continue;
                }
                if (n <= 0)
                        return 0;
                from += n;
                size -= (size_t)n;
        }
        return 1;
}

static inline int read_all(int fd, char *to, size_t size)
{
        while (size > 0) {
                ssize_t n = recv(fd, to, size, 0);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n <= 0)
                        return 0;
                to += n;
                size -= (size_t)n;
        }
        return 1;
}

/* Nanoseconds. */
static inline uint64_t now(void)
{
        struct timespec t;

        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* CPU time of this process in microseconds. */
static inline double cpu_us(void)
{
        struct timespec t;

        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static inline int ascending(const void *a, const void *b)
{
        uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

        return (x > y) - (x < y);
}

/* Raises the limit of descriptors as far as the kernel allows. */
static inline void raise_limit(void)
{
        struct rlimit limit;

        if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
                fail("getrlimit");
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
                fail("setrlimit");
}

#endif
