/* One process of clients, whose connections carry load until it is told to end: so the load is
 * measured in a window that somebody else chooses, and not from the first connection on.
 *
 *   clients redis|memcached|http|echo ADDRESS PORT CONNECTIONS PIPELINE RATE
 *   clients stream ADDRESS PORT SIZE
 *
 * PIPELINE requests are sent at once, and their answers make one sample of latency. RATE is of
 * requests per second of all connections together, 0 for as fast as possible; a request that is
 * late because its connection was busy counts from the moment at which it was due. `echo` sends 64
 * bytes to `pingpong epoll serve`, `stream` writes SIZE bytes at a time to `throughput serve`.
 *
 * The program prints "ready" when all its connections are made. SIGHUP begins the load, SIGUSR1 the
 * window. SIGUSR2 ends the window, and prints one JSON object: the count of requests (stream:
 * bytes), the window's seconds, and pairs of a latency in nanoseconds and a count. The load
 * continues until SIGINT; then the connections are idle until SIGTERM. Every answer is compared
 * with the first one, which has to contain what this program has stored on the server.
 */

#include "common.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>

enum {
        MAX_CONNECTIONS = 4096,
        MAX_REQUEST = 4096,
        MAX_ANSWER = 256 * 1024,
        MAX_WRITE = 4 * 1024 * 1024,
        MESSAGE = 64,
        STORED = 100,
        EVENTS = 64,
        PATIENCE = 10000, /* milliseconds */
        PAUSE = 50,       /* milliseconds between looks at the signals, without load */
        SUB = 64,         /* buckets per power of two */
        BUCKETS = 60 * SUB,
};

struct connection {
        int fd;
        int busy;
        uint32_t late; /* requests that were due while it was busy */
        uint64_t sent; /* batches */
        uint64_t since;
        size_t got;
        char *answer;
};

static struct connection connections[MAX_CONNECTIONS];
static size_t count, requests_size, answer_size, body_at, pipeline;
static uint64_t started, interval, done;
static char requests[MAX_REQUEST], expected[MAX_ANSWER];
static uint64_t buckets[BUCKETS];
static volatile sig_atomic_t load_wanted, begin_wanted, end_wanted, rest_wanted, quit_wanted;
static int measuring;
static uint64_t window_begin;

static _Noreturn void usage(void)
{
        fputs("usage: clients redis|memcached|http|echo ADDRESS PORT CONNECTIONS PIPELINE RATE\n"
              "       clients stream ADDRESS PORT SIZE\n",
              stderr);
        exit(2);
}

static _Noreturn void wrong(const char *what)
{
        fprintf(stderr, "clients: %s\n", what);
        exit(1);
}

static void told(int signal)
{
        *(signal == SIGHUP    ? &load_wanted
          : signal == SIGUSR1 ? &begin_wanted
          : signal == SIGUSR2 ? &end_wanted
          : signal == SIGINT  ? &rest_wanted
                              : &quit_wanted) = 1;
}

static void hear(void)
{
        struct sigaction action = {.sa_handler = told, .sa_flags = SA_RESTART};

        if (sigaction(SIGHUP, &action, NULL) < 0 || sigaction(SIGUSR1, &action, NULL) < 0 ||
            sigaction(SIGUSR2, &action, NULL) < 0 || sigaction(SIGINT, &action, NULL) < 0 ||
            sigaction(SIGTERM, &action, NULL) < 0)
                fail("sigaction");
}

/* Say that all connections are made, and wait for the signal that begins the load, or for the end.
 */
static void await_load(void)
{
        sigset_t held, before;

        sigemptyset(&held);
        sigaddset(&held, SIGHUP);
        sigaddset(&held, SIGTERM);
        if (sigprocmask(SIG_BLOCK, &held, &before) < 0)
                fail("sigprocmask");
        puts("ready");
        fflush(stdout);
        while (!load_wanted && !quit_wanted)
                sigsuspend(&before);
        if (sigprocmask(SIG_SETMASK, &before, NULL) < 0)
                fail("sigprocmask");
}

/* --- the histogram: SUB buckets for each power of two, so an error of at most 1/SUB */

static size_t bucket_of(uint64_t value)
{
        if (value < SUB)
                return (size_t)value;
        unsigned power = 63 - (unsigned)__builtin_clzll(value);
        size_t at = (size_t)(power - 5) * SUB + (size_t)((value >> (power - 6)) - SUB);

        return at < BUCKETS ? at : BUCKETS - 1;
}

static double middle_of(size_t bucket)
{
        if (bucket < SUB)
                return (double)bucket;
        unsigned shift = (unsigned)(bucket / SUB) - 1;

        return ((double)(SUB + bucket % SUB) + 0.5) * (double)(1ull << shift);
}

static void print_window(uint64_t amount)
{
        const char *between = "";

        printf("{\"count\": %llu, \"seconds\": %.9f, \"latency_ns\": [", (unsigned long long)amount,
               (double)(now() - window_begin) / 1e9);
        for (size_t i = 0; i < BUCKETS; i++)
                if (buckets[i]) {
                        printf("%s[%.0f, %llu]", between, middle_of(i), (unsigned long long)buckets[i]);
                        between = ", ";
                }
        puts("]}");
        fflush(stdout);
}

/* Begin or end the window if a signal has asked for it. `done` counts in the window only. */
static void heed(void)
{
        if (begin_wanted) {
                begin_wanted = 0;
                measuring = 1;
                done = 0;
                window_begin = now();
        }
        if (end_wanted) {
                end_wanted = 0;
                measuring = 0;
                print_window(done);
        }
}

static int resting(void)
{
        return rest_wanted || quit_wanted;
}

/* --- requests and answers */

/* The size of an answer that begins in `text`; 0 while it isn't complete. */
static size_t http_size(const char *text, size_t got)
{
        static const char name[] = "Content-Length: ";
        const char *end = memmem(text, got, "\r\n\r\n", 4), *length;

        if (!end)
                return 0;
        if (got < 13 || memcmp(text, "HTTP/1.1 200 ", 13) != 0)
                wrong("the server's status isn't 200");
        length = memmem(text, (size_t)(end - text), name, sizeof name - 1);
        if (!length)
                wrong("the answer has no Content-Length");
        body_at = (size_t)(end - text) + 4;
        size_t size = body_at + (size_t)atol(length + sizeof name - 1);

        return got < size ? 0 : size;
}

/* Send text, and read until the answer ends with `end`. */
static void store(int fd, const char *text, const char *end)
{
        char said[64];
        size_t got = 0, size = strlen(end);

        if (!write_all(fd, text, strlen(text)))
                fail("send");
        while (got < size || memcmp(said + got - size, end, size) != 0) {
                ssize_t n = recv(fd, said + got, sizeof said - got, 0);

                if (n <= 0 || got + (size_t)n == sizeof said)
                        wrong("the server didn't store");
                got += (size_t)n;
        }
}

/* Store a value under a key of our own, and write the request and its answer into `requests` and
 * `expected`: no other server has this key. */
static void prepare_redis(int fd)
{
        char text[256], key[64];
        int n = snprintf(key, sizeof key, "clients:%d:%llu", (int)getpid(), (unsigned long long)now());

        snprintf(text, sizeof text, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$3\r\nxyz\r\n", n, key);
        store(fd, text, "+OK\r\n");
        requests_size = (size_t)sprintf(requests, "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", n, key);
        answer_size = (size_t)sprintf(expected, "$3\r\nxyz\r\n");
}

static void prepare_memcached(int fd)
{
        char text[256], key[64], value[STORED + 1] = "";

        snprintf(key, sizeof key, "clients:%d:%llu", (int)getpid(), (unsigned long long)now());
        for (int i = 0; i < STORED; i++)
                value[i] = (char)('a' + (getpid() + i) % 26);
        snprintf(text, sizeof text, "set %s 0 0 %d\r\n%s\r\n", key, STORED, value);
        store(fd, text, "STORED\r\n");
        requests_size = (size_t)sprintf(requests, "get %s\r\n", key);
        answer_size = (size_t)sprintf(expected, "VALUE %s 0 %d\r\n%s\r\nEND\r\n", key, STORED, value);
}

static void prepare_http(int fd)
{
        size_t got = 0;

        requests_size =
            (size_t)sprintf(requests, "GET /small HTTP/1.1\r\nHost: bench\r\nUser-Agent: clients\r\n\r\n");
        if (!write_all(fd, requests, requests_size))
                fail("send");
        while ((answer_size = http_size(expected, got)) == 0) {
                ssize_t n = recv(fd, expected + got, sizeof expected - got, 0);

                if (n <= 0)
                        wrong("no answer over HTTP");
                got += (size_t)n;
        }
        if (answer_size != got)
                wrong("more than one answer over HTTP");
}

static void prepare_echo(int fd)
{
        (void)fd;
        requests_size = answer_size = MESSAGE;
        for (int i = 0; i < MESSAGE; i++)
                requests[i] = (char)(getpid() + i);
        memcpy(expected, requests, MESSAGE);
}

struct kind {
        const char *name;
        void (*prepare)(int fd);
};

static const struct kind kinds[] = {
    {"redis", prepare_redis},
    {"memcached", prepare_memcached},
    {"http", prepare_http},
    {"echo", prepare_echo},
};

/* Repeat request and answer, so that a batch is sent and compared as one piece. */
static void repeat(size_t times)
{
        if (requests_size * times > sizeof requests || answer_size * times > sizeof expected)
                wrong("the pipeline is too long");
        for (size_t i = 1; i < times; i++) {
                memcpy(requests + i * requests_size, requests, requests_size);
                memcpy(expected + i * answer_size, expected, answer_size);
        }
        requests_size *= times;
        answer_size *= times;
        pipeline = times;
}

static void ask(struct connection *one, uint64_t due)
{
        one->busy = 1;
        one->got = 0;
        one->since = due;
        one->sent++;
        if (!write_all(one->fd, requests, requests_size))
                fail("send");
}

/* The moment at which the next batch of a connection is due. */
static uint64_t due_of(const struct connection *one)
{
        return started + (one->sent * count + (uint64_t)(one - connections)) * interval;
}

static void answered(struct connection *one)
{
        uint64_t at = now();

        /* HTTP's header has the date. */
        if (memcmp(one->answer, expected, body_at ? 13 : answer_size) != 0 ||
            memcmp(one->answer + body_at, expected + body_at, answer_size - body_at) != 0)
                wrong("an answer differs from the first one");
        if (measuring) {
                done += pipeline;
                buckets[bucket_of(at - one->since)]++;
        }
        one->busy = 0;
        if (resting())
                return;
        if (!interval)
                ask(one, at);
        else if (one->late > 0) {
                one->late--;
                ask(one, due_of(one));
        }
}

static void take(struct connection *one)
{
        ssize_t n = recv(one->fd, one->answer + one->got, answer_size + 1 - one->got, 0);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (n <= 0)
                wrong("connection lost");
        one->got += (size_t)n;
        if (one->got > answer_size)
                wrong("an answer is too long");
        if (one->got == answer_size)
                answered(one);
}

/* Send what the timer says is due: each tick is for the next connection in turn. */
static void tick(int timer)
{
        static uint64_t ticks;
        uint64_t passed;

        if (read(timer, &passed, sizeof passed) != sizeof passed)
                return;
        while (passed-- > 0) {
                struct connection *one = &connections[ticks++ % count];

                if (resting())
                        return;
                if (one->busy)
                        one->late++;
                else
                        ask(one, due_of(one));
        }
}

static size_t busy_connections(void)
{
        size_t busy = 0;

        for (size_t i = 0; i < count; i++)
                busy += (size_t)connections[i].busy;
        return busy;
}

static int start_timer(int set)
{
        int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        struct itimerspec at = {.it_interval = {.tv_nsec = (long)interval},
                                .it_value = {.tv_nsec = (long)interval}};
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};

        if (timer < 0 || timerfd_settime(timer, 0, &at, NULL) < 0 ||
            epoll_ctl(set, EPOLL_CTL_ADD, timer, &event) < 0)
                fail("timer");
        started = now() + interval;
        return timer;
}

/* Says where the oldest request is: on its way, as TCP knows, or with the server. */
static _Noreturn void no_answer(void)
{
        const struct connection *oldest = connections;
        struct tcp_info info;
        socklen_t size = sizeof info;
        char where[128] = "";

        for (size_t i = 0; i < count; i++)
                if (connections[i].busy && (!oldest->busy || connections[i].since < oldest->since))
                        oldest = &connections[i];
        if (getsockopt(oldest->fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0)
                snprintf(where, sizeof where, ": %u segments not acknowledged, sent again %u times",
                         info.tcpi_unacked, info.tcpi_retransmits);
        fprintf(stderr, "clients: no answer in ten seconds%s\n", where);
        exit(1);
}

static void serve_events(int set, int timer)
{
        for (;;) {
                struct epoll_event events[EVENTS];
                int busy = !resting() || busy_connections() > 0;
                int n = epoll_wait(set, events, EVENTS, busy ? PATIENCE : PAUSE);

                if (n == 0 && busy)
                        no_answer();
                for (int i = 0; i < n; i++) {
                        heed();
                        if (events[i].data.ptr)
                                take(events[i].data.ptr);
                        else
                                tick(timer);
                }
                heed();
                if (quit_wanted && busy_connections() == 0)
                        return;
        }
}

static void request_load(const struct kind *kind, const struct endpoint *where, int rate)
{
        int set = epoll_create1(EPOLL_CLOEXEC), timer = -1;
        uint32_t size = MESSAGE;

        if (set < 0)
                fail("epoll_create1");
        for (size_t i = 0; i < count; i++) {
                struct connection *one = &connections[i];
                struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};

                one->fd = connect_to(where);
                if (i == 0) {
                        kind->prepare(one->fd);
                        repeat(pipeline);
                }
                if (kind->prepare == prepare_echo && !write_all(one->fd, (char *)&size, sizeof size))
                        fail("send");
                one->answer = malloc(answer_size + 1);
                if (!one->answer || fcntl(one->fd, F_SETFL, O_NONBLOCK) < 0 ||
                    epoll_ctl(set, EPOLL_CTL_ADD, one->fd, &event) < 0)
                        fail("epoll");
        }
        await_load();
        if (rate > 0) {
                interval = 1000000000ull / (uint64_t)rate;
                timer = start_timer(set);
        } else
                for (size_t i = 0; i < count && !resting(); i++)
                        ask(&connections[i], now());
        serve_events(set, timer);
}

/* Write until told to end; then the reader's count of bytes has to be ours. */
static void stream_load(const struct endpoint *where, uint32_t size)
{
        static char buffer[MAX_WRITE];
        int fd = connect_to(where);
        uint64_t sent = 0, arrived;

        memset(buffer, 'x', size);
        if (!write_all(fd, (char *)&size, sizeof size))
                fail("send");
        await_load();
        while (!resting()) {
                if (!write_all(fd, buffer, size))
                        fail("connection lost");
                sent += size;
                done += size;
                heed();
        }
        while (!quit_wanted)
                (void)poll(NULL, 0, PAUSE);
        if (shutdown(fd, SHUT_WR) < 0)
                fail("shutdown");
        if (!read_all(fd, (char *)&arrived, sizeof arrived) || arrived != sent)
                wrong("the reader's count of bytes isn't ours");
}

int main(int argc, char **argv)
{
        if (argc != 5 && argc != 7)
                usage();
        struct endpoint where = resolve(argv[2], argv[3]);

        raise_limit();
        hear();
        if (argc == 5) {
                long size = atol(argv[4]);

                if (strcmp(argv[1], "stream") != 0 || size < 1 || size > MAX_WRITE)
                        usage();
                stream_load(&where, (uint32_t)size);
                return 0;
        }
        const struct kind *kind = kinds, *end = kinds + sizeof kinds / sizeof *kinds;

        while (kind < end && strcmp(kind->name, argv[1]) != 0)
                kind++;
        count = (size_t)atol(argv[4]);
        pipeline = (size_t)atol(argv[5]);
        if (kind == end || count < 1 || count > MAX_CONNECTIONS || pipeline < 1 || atoi(argv[6]) < 0)
                usage();
        request_load(kind, &where, atoi(argv[6]));
        return 0;
}
