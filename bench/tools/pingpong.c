/* Round trips of messages of one size, both ends on a core of the caller's choice.
 *
 *   pingpong KIND serve CPU ADDRESS PORT
 *   pingpong KIND call  CPU ADDRESS PORT SIZE SECONDS
 *   pingpong KIND hold  CPU ADDRESS PORT SIZE COUNT
 *
 * KIND is stream (blocking calls), epoll (an event loop at each end) or udp; tcp is another word
 * for stream. ADDRESS may be the path of a unix socket, and CPU -1: not pinned. With both ends on
 * one core the figure does not depend on the time that an idle core takes to wake.
 *
 * The caller of a stream first sends the size. The server answers a message when it has all of it.
 * The caller prints one JSON object, with the CPU time of its own loop. A datagram without an
 * answer within 200 ms counts as lost and is not a sample. `hold` makes COUNT connections, sends
 * some messages over each, prints "ready" and leaves them idle until its standard input ends; then
 * it sends one more message over each.
 */

#include "common.h"
#include <fcntl.h>
#include <sys/epoll.h>

enum {
        MAX_MESSAGE = 1024 * 1024,
        MAX_DATAGRAM = 65507,
        MAX_SAMPLES = 4 * 1000 * 1000,
        WARM_UP = 1000,
        HELD_MESSAGES = 32,
        EVENTS = 64,
};

enum kind { STREAM, EPOLL, UDP };

static _Noreturn void usage(void)
{
        fputs("usage: pingpong stream|epoll|udp serve CPU ADDRESS PORT\n"
              "       pingpong stream|epoll|udp call CPU ADDRESS PORT SIZE SECONDS\n"
              "       pingpong stream|epoll hold CPU ADDRESS PORT SIZE COUNT\n",
              stderr);
        exit(2);
}

static char message[MAX_MESSAGE], answer[MAX_MESSAGE];

static _Noreturn void serve_stream(int listener)
{
        for (;;) {
                int fd = accept(listener, NULL, NULL);
                uint32_t size;

                if (fd < 0) {
                        if (errno == EINTR || errno == ECONNABORTED)
                                continue;
                        fail("accept");
                }
                no_delay(fd);
                if (read_all(fd, (char *)&size, sizeof size) && size <= MAX_MESSAGE)
                        while (read_all(fd, message, size) && write_all(fd, message, size))
                                continue;
                close(fd);
        }
}

/* One connection of the event loop. */
struct client {
        int fd;
        uint32_t size, got;
        char *message; /* NULL: its size has not arrived */
};

static void watch(int set, int fd, void *what)
{
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};

        if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) < 0)
                fail("epoll_ctl");
}

/* Read what has arrived. False: the connection has ended. */
static int serve_client(struct client *client)
{
        ssize_t n;

        if (!client->message) {
                /* Four bytes, sent in one piece, arrive in one piece. */
                n = recv(client->fd, &client->size, sizeof client->size, 0);
                if (n != sizeof client->size || client->size == 0 || client->size > MAX_MESSAGE)
                        return 0;
                client->message = malloc(client->size);
                return client->message != NULL;
        }
        n = recv(client->fd, client->message + client->got, client->size - client->got, 0);
        if (n < 0)
                return errno == EAGAIN || errno == EINTR;
        client->got += (uint32_t)n;
        if (n > 0 && client->got == client->size) {
                client->got = 0;
                return write_all(client->fd, client->message, client->size);
        }
        return n > 0;
}

static _Noreturn void serve_epoll(int listener)
{
        int set = epoll_create1(EPOLL_CLOEXEC);

        if (set < 0)
                fail("epoll_create1");
        watch(set, listener, NULL);
        for (;;) {
                struct epoll_event events[EVENTS];
                int count = epoll_wait(set, events, EVENTS, -1);

                for (int i = 0; i < count; i++) {
                        struct client *client = events[i].data.ptr;

                        if (client) {
                                if (!serve_client(client)) {
                                        close(client->fd);
                                        free(client->message);
                                        free(client);
                                }
                                continue;
                        }
                        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

                        if (fd < 0)
                                continue;
                        client = calloc(1, sizeof *client);
                        if (!client)
                                fail("calloc");
                        client->fd = fd;
                        no_delay(fd);
                        watch(set, fd, client);
                }
        }
}

static _Noreturn void serve_udp(int fd)
{
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

/* Read a whole message from a non-blocking socket; waits in `set`. */
static int await(int set, int fd, char *to, size_t size)
{
        while (size > 0) {
                struct epoll_event event;

                if (epoll_wait(set, &event, 1, 5000) < 1) {
                        if (errno == EINTR)
                                continue;
                        return 0;
                }
                ssize_t n = recv(fd, to, size, 0);

                if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
                        return 0;
                if (n > 0) {
                        to += n;
                        size -= (size_t)n;
                }
        }
        return 1;
}

/* One datagram there and back. The number in its first bytes keeps a late answer from being taken
 * for this one's. */
static int exchange_udp(int fd, size_t size, uint32_t number)
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

static void exchange(int set, int fd, size_t size, uint32_t number)
{
        memcpy(message, &number, sizeof number);
        if (!write_all(fd, message, size))
                fail("send");
        if (!(set < 0 ? read_all(fd, answer, size) : await(set, fd, answer, size)))
                fail("connection lost");
        if (memcmp(answer, &number, sizeof number) != 0) {
                errno = EBADMSG;
                fail("answer");
        }
}

static void say_size(int fd, uint32_t size)
{
        if (!write_all(fd, (char *)&size, sizeof size))
                fail("send");
}

static void call(int fd, enum kind kind, size_t size, double seconds)
{
        uint32_t *samples = calloc(MAX_SAMPLES, sizeof *samples);
        struct timeval patience = {.tv_sec = kind == UDP ? 0 : 5, .tv_usec = kind == UDP ? 200000 : 0};
        size_t count = 0, lost = 0;
        int set = -1;

        if (!samples)
                fail("calloc");
        memset(samples, 1, MAX_SAMPLES * sizeof *samples); /* no page faults while the clock runs */
        if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0)
                fail("SO_RCVTIMEO");
        if (kind == EPOLL) {
                set = epoll_create1(EPOLL_CLOEXEC);
                if (set < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
                        fail("epoll");
                watch(set, fd, NULL);
        }
        if (kind != UDP)
                say_size(fd, (uint32_t)size);

        uint64_t start = now(), end = start + (uint64_t)(seconds * 1e9), begun = start;
        double before = cpu_us();

        for (uint32_t number = 0; count < MAX_SAMPLES; number++) {
                uint64_t sent = now(), back;
                int ok = 1;

                if (sent >= end)
                        break;
                if (kind == UDP)
                        ok = exchange_udp(fd, size, number);
                else
                        exchange(set, fd, size, number);
                back = now();
                if (number < WARM_UP && (double)(back - start) < seconds * 1e9 / 5) {
                        begun = back;
                        before = cpu_us();
                        continue;
                }
                if (ok)
                        samples[count++] = (uint32_t)(back - sent > UINT32_MAX ? UINT32_MAX : back - sent);
                else
                        lost++;
        }
        double used = cpu_us() - before, took = (double)(now() - begun) / 1e3;

        if (count == 0) {
                fprintf(stderr, "pingpong: no message came back in %.1f s\n", seconds);
                exit(1);
        }
        qsort(samples, count, sizeof *samples, ascending);
        printf("{\"count\": %zu, \"lost\": %zu, \"p50_us\": %.3f, \"p99_us\": %.3f, \"mean_us\": "
               "%.3f, "
               "\"cpu_us\": %.0f}\n",
               count, lost, samples[count / 2] / 1e3, samples[count * 99 / 100] / 1e3, took / (double)count,
               used);
        free(samples);
}

static void hold(const struct endpoint *where, enum kind kind, size_t size, size_t count)
{
        int *fds = calloc(count, sizeof *fds);
        char byte;

        if (!fds)
                fail("calloc");
        (void)kind;
        for (size_t i = 0; i < count; i++) {
                fds[i] = connect_to(where);
                say_size(fds[i], (uint32_t)size);
        }
        for (uint32_t number = 0; number < HELD_MESSAGES; number++)
                for (size_t i = 0; i < count; i++)
                        exchange(-1, fds[i], size, number);
        puts("ready");
        fflush(stdout);
        while (read(STDIN_FILENO, &byte, 1) > 0)
                continue;
        for (size_t i = 0; i < count; i++)
                exchange(-1, fds[i], size, HELD_MESSAGES);
        printf("{\"count\": %zu}\n", count);
        free(fds);
}

int main(int argc, char **argv)
{
        static const char *const kinds[] = {[STREAM] = "stream", [EPOLL] = "epoll", [UDP] = "udp"};
        enum kind kind = STREAM;

        if (argc != 6 && argc != 8)
                usage();
        if (strcmp(argv[1], "tcp") != 0)
                while (strcmp(argv[1], kinds[kind]) != 0)
                        if (++kind > UDP)
                                usage();
        int serve = strcmp(argv[2], "serve") == 0, held = strcmp(argv[2], "hold") == 0;
        if ((!serve && !held && strcmp(argv[2], "call") != 0) || (serve ? argc != 6 : argc != 8) ||
            (held && kind == UDP))
                usage();

        struct endpoint where = resolve(argv[4], argv[5]);
        int udp = -1;

        pin(atoi(argv[3]));
        raise_limit();
        if (kind == UDP) {
                udp = socket(where.address.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
                if (udp < 0)
                        fail("socket");
        }
        if (serve) {
                if (kind == UDP) {
                        if (bind(udp, (struct sockaddr *)&where.address, where.length) < 0)
                                fail("bind");
                        serve_udp(udp);
                }
                if (kind == EPOLL)
                        serve_epoll(listen_at(&where));
                serve_stream(listen_at(&where));
        }

        long size = atol(argv[6]);
        if (size < 4 || size > (kind == UDP ? MAX_DATAGRAM : MAX_MESSAGE) || atof(argv[7]) <= 0)
                usage();
        if (held) {
                hold(&where, kind, (size_t)size, (size_t)atol(argv[7]));
                return 0;
        }
        if (kind == UDP && connect(udp, (struct sockaddr *)&where.address, where.length) < 0)
                fail("connect");
        int fd = kind == UDP ? udp : connect_to(&where);
        call(fd, kind, (size_t)size, atof(argv[7]));
        close(fd);
        return 0;
}
