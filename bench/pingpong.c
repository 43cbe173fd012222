/* Round trips of small messages, one connection, both ends on a core of the caller's choice.
 *
 *   pingpong tcp|udp serve CPU ADDRESS PORT
 *   pingpong tcp|udp call  CPU ADDRESS PORT SIZE SECONDS
 *
 * Blocking calls on purpose: what is measured is send, the network's path, wake-up and receive. With both
 * ends on one core the figure doesn't depend on how long an idle core takes to wake. The caller prints one
 * JSON object; a datagram that isn't answered within 200 ms counts as lost and leaves no sample.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_MESSAGE = 65507, MAX_SAMPLES = 4 * 1000 * 1000, WARM_UP = 200 };

static _Noreturn void fail(const char *what)
{
        fprintf(stderr, "pingpong: %s: %s\n", what, strerror(errno));
        exit(1);
}

static _Noreturn void usage(void)
{
        fputs("usage: pingpong tcp|udp serve CPU ADDRESS PORT\n"
              "       pingpong tcp|udp call CPU ADDRESS PORT SIZE SECONDS\n",
              stderr);
        exit(2);
}

static void pin(int cpu)
{
        cpu_set_t set;

        CPU_ZERO(&set);
        CPU_SET((size_t)cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set) < 0)
                fail("sched_setaffinity");
}

struct endpoint {
        struct sockaddr_storage address;
        socklen_t length;
};

/* Numeric addresses only: getaddrinfo in a static program would need the C library of the place it runs in.
 */
static struct endpoint resolve(const char *address, const char *port)
{
        struct endpoint found = {.length = 0};
        struct sockaddr_in *v4 = (struct sockaddr_in *)&found.address;
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&found.address;
        in_port_t number = htons((uint16_t)atoi(port));

        if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
                v4->sin_family = AF_INET;
                v4->sin_port = number;
                found.length = sizeof *v4;
        } else if (inet_pton(AF_INET6, address, &v6->sin6_addr) == 1) {
                v6->sin6_family = AF_INET6;
                v6->sin6_port = number;
                found.length = sizeof *v6;
        } else {
                fprintf(stderr, "pingpong: %s is not an IP address\n", address);
                exit(2);
        }
        return found;
}

static void no_delay(int fd)
{
        int one = 1;

        if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0)
                fail("TCP_NODELAY");
}

/* Write all of it; false when the other end is gone. */
static int write_all(int fd, const char *from, size_t size)
{
        while (size > 0) {
                ssize_t n = send(fd, from, size, MSG_NOSIGNAL);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n <= 0)
                        return 0;
                from += n;
                size -= (size_t)n;
        }
        return 1;
}

static int read_all(int fd, char *to, size_t size)
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

static _Noreturn void serve_tcp(int listener)
{
        static char message[MAX_MESSAGE];

        if (listen(listener, 16) < 0)
                fail("listen");
        for (;;) {
                int fd = accept(listener, NULL, NULL);
                ssize_t n;

                if (fd < 0) {
                        if (errno == EINTR || errno == ECONNABORTED)
                                continue;
                        fail("accept");
                }
                no_delay(fd);
                while ((n = recv(fd, message, sizeof message, 0)) > 0)
                        if (!write_all(fd, message, (size_t)n))
                                break;
                close(fd);
        }
}

static _Noreturn void serve_udp(int fd)
{
        static char message[MAX_MESSAGE];

        for (;;) {
                struct sockaddr_storage from;
                socklen_t length = sizeof from;
                ssize_t n = recvfrom(fd, message, sizeof message, 0, (struct sockaddr *)&from, &length);

                if (n >= 0)
                        (void)sendto(fd, message, (size_t)n, 0, (struct sockaddr *)&from, length);
                else if (errno != EINTR && errno != ECONNREFUSED)
                        fail("recvfrom");
        }
}

static uint64_t now(void)
{
        struct timespec t;

        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* One datagram there and back. The number in its first bytes keeps a late answer from being taken for this
 * one's. */
static int exchange_udp(int fd, char *message, char *answer, size_t size, uint32_t number)
{
        ssize_t n;

        memcpy(message, &number, sizeof number);
        if (send(fd, message, size, 0) < 0)
                return 0;
        do {
                n = recv(fd, answer, size, 0);
                if (n < 0 && errno != EINTR)
                        return 0;
        } while (n != (ssize_t)size || memcmp(answer, &number, sizeof number) != 0);
        return 1;
}

static int ascending(const void *a, const void *b)
{
        uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

        return (x > y) - (x < y);
}

static void call(int fd, int tcp, size_t size, double seconds)
{
        static char message[MAX_MESSAGE], answer[MAX_MESSAGE];
        uint32_t *samples = calloc(MAX_SAMPLES, sizeof *samples);
        struct timeval patience = {.tv_sec = tcp ? 5 : 0, .tv_usec = tcp ? 0 : 200000};
        uint64_t start = now(), end = start + (uint64_t)(seconds * 1e9);
        size_t count = 0, lost = 0;
        uint32_t number = 0;

        if (!samples)
                fail("calloc");
        if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0)
                fail("SO_RCVTIMEO");
        while (count < MAX_SAMPLES) {
                uint64_t sent = now(), back;
                int ok;

                if (sent >= end)
                        break;
                if (tcp) {
                        if (!write_all(fd, message, size) || !read_all(fd, answer, size))
                                fail("connection lost");
                        ok = 1;
                } else {
                        ok = exchange_udp(fd, message, answer, size, number);
                }
                back = now();
                if (number++ < WARM_UP)
                        continue;
                if (ok)
                        samples[count++] = (uint32_t)(back - sent > UINT32_MAX ? UINT32_MAX : back - sent);
                else
                        lost++;
        }
        if (count == 0) {
                fprintf(stderr, "pingpong: no message came back in %.1f s\n", seconds);
                exit(1);
        }
        qsort(samples, count, sizeof *samples, ascending);
        printf("{\"count\": %zu, \"lost\": %zu, \"p50_us\": %.3f, \"p99_us\": %.3f}\n", count, lost,
               samples[count / 2] / 1e3, samples[count * 99 / 100] / 1e3);
        free(samples);
}

int main(int argc, char **argv)
{
        if (argc != 6 && argc != 8)
                usage();
        int tcp = strcmp(argv[1], "tcp") == 0, serve = strcmp(argv[2], "serve") == 0;
        if ((!tcp && strcmp(argv[1], "udp") != 0) || (!serve && strcmp(argv[2], "call") != 0))
                usage();
        if (serve ? argc != 6 : argc != 8)
                usage();

        struct endpoint where = resolve(argv[4], argv[5]);
        int fd = socket(where.address.ss_family, (tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0);
        if (fd < 0)
                fail("socket");
        pin(atoi(argv[3]));
        if (serve) {
                int one = 1;

                if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0)
                        fail("SO_REUSEADDR");
                if (bind(fd, (struct sockaddr *)&where.address, where.length) < 0)
                        fail("bind");
                if (tcp)
                        serve_tcp(fd);
                serve_udp(fd);
        }

        long size = atol(argv[6]);
        double seconds = atof(argv[7]);
        if (size < 4 || size > MAX_MESSAGE || seconds <= 0)
                usage();
        if (connect(fd, (struct sockaddr *)&where.address, where.length) < 0)
                fail("connect");
        if (tcp)
                no_delay(fd);
        call(fd, tcp, (size_t)size, seconds);
        close(fd);
        return 0;
}
