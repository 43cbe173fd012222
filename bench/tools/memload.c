/* A load on memcached: one thread with some connections, each requesting one key after the other.
 *
 *   memload CPU ADDRESS PORT CONNECTIONS SECONDS
 *
 * ADDRESS may be the path of a unix socket, and CPU -1: not pinned. Every answer is compared with
 * the stored value, byte by byte, and the server's own count of requests has to grow by ours: any
 * difference is an error. Prints one JSON object, with the CPU time of its own loop.
 */

#include "common.h"
#include <fcntl.h>
#include <sys/epoll.h>

enum { KEYS = 1000, VALUE = 100, MAX_CONNECTIONS = 4096, MAX_SAMPLES = 8 * 1000 * 1000, WARM_UP = 20 };

struct connection {
        int fd;
        uint32_t key;
        uint32_t asked; /* requests sent */
        size_t got;
        uint64_t since;
        char answer[VALUE + 128];
};

static struct connection connections[MAX_CONNECTIONS];
static uint32_t *samples;
static size_t count, warm, busy;

static size_t value(char *to, uint32_t key)
{
        for (int i = 0; i < VALUE; i++)
                to[i] = (char)('a' + (key * 31 + (uint32_t)i) % 26);
        return VALUE;
}

static size_t request_of(char *to, size_t size, uint32_t key)
{
        return (size_t)snprintf(to, size, "get key%u\r\n", key);
}

static size_t answer_of(char *to, size_t size, uint32_t key)
{
        size_t n = (size_t)snprintf(to, size, "VALUE key%u 0 %d\r\n", key, VALUE);

        n += value(to + n, key);
        memcpy(to + n, "\r\nEND\r\n", 7);
        return n + 7;
}

/* Prepared in advance, so that the load's own work is small compared with the server's. */
static char requests[KEYS][24], answers[KEYS][VALUE + 64];
static size_t request_sizes[KEYS], answer_sizes[KEYS];

static void store(int fd)
{
        char text[VALUE + 64], said[8];

        for (uint32_t key = 0; key < KEYS; key++) {
                size_t n = (size_t)snprintf(text, sizeof text, "set key%u 0 0 %d\r\n", key, VALUE);

                n += value(text + n, key);
                memcpy(text + n, "\r\n", 2);
                if (!write_all(fd, text, n + 2) || !read_all(fd, said, 8) || memcmp(said, "STORED\r\n", 8)) {
                        fputs("memload: the server didn't store\n", stderr);
                        exit(1);
                }
                request_sizes[key] = request_of(requests[key], sizeof requests[key], key);
                answer_sizes[key] = answer_of(answers[key], sizeof answers[key], key);
        }
}

static uint64_t server_count(int fd)
{
        static char text[65536];
        size_t got = 0;
        const char *found;

        if (!write_all(fd, "stats\r\n", 7))
                fail("stats");
        while (got < 5 || memcmp(text + got - 5, "END\r\n", 5) != 0) {
                ssize_t n = recv(fd, text + got, sizeof text - 1 - got, 0);

                if (n <= 0)
                        fail("stats");
                got += (size_t)n;
                text[got] = 0;
        }
        found = strstr(text, "STAT get_hits ");
        if (!found) {
                fputs("memload: the server doesn't count get_hits\n", stderr);
                exit(1);
        }
        return strtoull(found + strlen("STAT get_hits "), NULL, 10);
}

static void ask(struct connection *one)
{
        one->key = (one->key + 7) % KEYS;
        one->got = 0;
        one->asked++;
        one->since = now();
        if (!write_all(one->fd, requests[one->key], request_sizes[one->key]))
                fail("send");
}

/* Read what has arrived. At an answer's end note the time, and send the next request unless the run
 * is over. */
static void take(struct connection *one, uint64_t end)
{
        ssize_t n = recv(one->fd, one->answer + one->got, sizeof one->answer - one->got, 0);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (n <= 0)
                fail("connection lost");
        one->got += (size_t)n;
        if (one->got < answer_sizes[one->key])
                return;
        if (one->got > answer_sizes[one->key] || memcmp(one->answer, answers[one->key], one->got) != 0) {
                fprintf(stderr, "memload: wrong answer for key%u: %.*s\n", one->key, (int)one->got,
                        one->answer);
                exit(1);
        }
        uint64_t at = now();

        if (one->asked > WARM_UP && count < MAX_SAMPLES)
                samples[count++] = (uint32_t)(at - one->since);
        else
                warm++;
        if (at < end)
                ask(one);
        else
                busy--;
}

int main(int argc, char **argv)
{
        if (argc != 6 || atoi(argv[4]) < 1 || atoi(argv[4]) > MAX_CONNECTIONS || atof(argv[5]) <= 0) {
                fputs("usage: memload CPU ADDRESS PORT CONNECTIONS SECONDS\n", stderr);
                return 2;
        }
        struct endpoint where = resolve(argv[2], argv[3]);
        size_t clients = (size_t)atoi(argv[4]);
        int set = epoll_create1(EPOLL_CLOEXEC), control;

        pin(atoi(argv[1]));
        raise_limit();
        samples = malloc(MAX_SAMPLES * sizeof *samples);
        if (set < 0 || !samples)
                fail("set-up");
        memset(samples, 1, MAX_SAMPLES * sizeof *samples);
        control = connect_to(&where);
        store(control);
        uint64_t hits = server_count(control);

        for (size_t i = 0; i < clients; i++) {
                struct epoll_event event = {.events = EPOLLIN, .data.ptr = &connections[i]};

                connections[i].fd = connect_to(&where);
                connections[i].key = (uint32_t)i;
                if (fcntl(connections[i].fd, F_SETFL, O_NONBLOCK) < 0 ||
                    epoll_ctl(set, EPOLL_CTL_ADD, connections[i].fd, &event) < 0)
                        fail("epoll");
        }
        uint64_t start = now(), end = start + (uint64_t)(atof(argv[5]) * 1e9);
        double before = cpu_us();

        busy = clients;
        for (size_t i = 0; i < clients; i++)
                ask(&connections[i]);
        while (busy > 0) {
                struct epoll_event events[64];
                int n = epoll_wait(set, events, 64, 5000);

                if (n == 0) {
                        errno = ETIMEDOUT;
                        fail("no answer");
                }
                for (int i = 0; i < n; i++)
                        take(events[i].data.ptr, end);
        }
        double took = (double)(now() - start) / 1e9, used = cpu_us() - before;
        uint64_t served = server_count(control) - hits;

        if (served != count + warm) {
                fprintf(stderr, "memload: %zu answers, but the server has counted %llu\n", count + warm,
                        (unsigned long long)served);
                return 1;
        }
        if (count == 0) {
                fputs("memload: no time for an answer\n", stderr);
                return 1;
        }
        qsort(samples, count, sizeof *samples, ascending);
        printf("{\"count\": %llu, \"seconds\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f, "
               "\"cpu_us\": %.0f}\n",
               (unsigned long long)served, took, samples[count / 2] / 1e3, samples[count * 99 / 100] / 1e3,
               used);
        return 0;
}
