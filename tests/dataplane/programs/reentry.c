/* Connections that have fallen back to TCP, and what they do afterwards. The library falls back at
 * random (FREEFLOW_RESTLESS).
 *
 * The client sends numbers, which the server returns. The kernel's counters of the client's socket
 * say whether they went through a ring.
 */
#include "pair.h"

#include <stdatomic.h>

enum {
        TIMES = 5,     /* how often a connection moves to a ring */
        WITHOUT = 300, /* numbers over TCP, after which it does not move again */
        MOST = 2000000,
        ASK_OPTION = 1,
        ASK_FORK,
        ASK_LET_GO,
        ASK_DUPLICATE,
        ASK_END,
};

struct message {
        uint64_t number;
        uint32_t ask, unused;
        char filler[512];
};

/* Returns whether the kernel has counted bytes of one round trip. */
static bool by_kernel(int fd, uint32_t ask)
{
        static uint64_t number;
        struct message sent = {.number = ++number, .ask = ask}, got;
        uint64_t before = kernel_bytes(fd);

        memset(sent.filler, (int)(number % 251), sizeof sent.filler);
        put_all(fd, &sent, sizeof sent);
        get_all(fd, &got, sizeof got);
        CHECK(memcmp(&sent, &got, sizeof sent) == 0);
        return kernel_bytes(fd) != before;
}

static bool expected(void)
{
        return getenv("FREEFLOW_EXPECTED") != NULL;
}

static void go_on_until(int fd, bool over_tcp)
{
        double begin = clock_now();

        for (int i = 0; by_kernel(fd, 0) != over_tcp; i++)
                CHECK(i < MOST && clock_now() - begin < within(20));
}

static void return_some_times(int fd, int times)
{
        for (int i = 0; i < times && expected(); i++) {
                go_on_until(fd, true);
                go_on_until(fd, false);
        }
}

static void stay_on_tcp(int fd)
{
        if (!expected())
                return;
        go_on_until(fd, true);
        /* One direction may not have fallen back to TCP yet. */
        for (int i = 0; i < WITHOUT; i++)
                by_kernel(fd, 0);
        for (int i = 0; i < WITHOUT; i++) {
                CHECK(by_kernel(fd, 0));
                nap(1);
        }
}

/* --- the server --- */

static pid_t child;

static void set_option(int fd)
{
        int one = 1;

        CHECK(setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof one) == 0);
}

static void make_child(void)
{
        child = fork();
        CHECK(child >= 0);
        if (child == 0) {
                pause();
                _exit(0);
        }
}

static void end_child(void)
{
        int status;

        CHECK(kill(child, SIGKILL) == 0);
        CHECK(waitpid(child, &status, 0) == child);
}

/* Where the server waits for each message. */
static void await(int fd, int how, int epfd)
{
        struct pollfd polled = {.fd = fd, .events = POLLIN};
        struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 77};
        fd_set set;

        switch (how) {
        case 1:
                CHECK(poll(&polled, 1, -1) == 1 && polled.revents & POLLIN);
                break;
        case 2:
                FD_ZERO(&set);
                FD_SET(fd, &set);
                CHECK(select(fd + 1, &set, NULL, NULL, NULL) == 1);
                break;
        case 3: /* one-shot */
                CHECK(epoll_ctl(epfd, EPOLL_CTL_MOD, fd, &event) == 0);
                /* fall through */
        case 4: /* level-triggered */
        case 5: /* edge-triggered */
                CHECK(epoll_wait(epfd, &event, 1, -1) == 1);
                CHECK(event.data.u64 == 77 && event.events & EPOLLIN);
                break;
        default:
                break;
        }
}

/* Take one message; edge-triggered: until there is no more. */
static void take(int fd, int how, int epfd, struct message *message)
{
        size_t done = 0;

        while (done < sizeof *message) {
                ssize_t got;

                if (how != 5 || done == 0)
                        await(fd, how, epfd);
                got = recv(fd, (char *)message + done, sizeof *message - done, how == 5 ? MSG_DONTWAIT : 0);
                if (how == 5 && got < 0 && errno == EAGAIN) {
                        await(fd, how, epfd);
                        continue;
                }
                CHECK(got > 0);
                done += (size_t)got;
        }
        if (how == 5)
                CHECK(recv(fd, (char *)message, 1, MSG_DONTWAIT | MSG_PEEK) < 0 && errno == EAGAIN);
}

static void answer_waiting(int fd, int how)
{
        struct epoll_event event = {.events = EPOLLIN | (how == 5   ? EPOLLET
                                                         : how == 3 ? EPOLLONESHOT
                                                                    : 0u),
                                    .data.u64 = 77};
        int epfd = epoll_create1(0), copy = -1;
        struct message message;

        CHECK(how < 3 || epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
        do {
                take(fd, how, epfd, &message);
                if (message.ask == ASK_OPTION)
                        set_option(fd);
                if (message.ask == ASK_FORK)
                        make_child();
                if (message.ask == ASK_LET_GO)
                        end_child();
                if (message.ask == ASK_DUPLICATE)
                        copy = dup(fd);
                put_all(fd, &message, sizeof message);
        } while (message.ask != ASK_END);
        get_end(fd);
        if (copy >= 0)
                close(copy);
}

static void answer(int fd)
{
        answer_waiting(fd, 0);
}

static void answer_poll(int fd)
{
        answer_waiting(fd, 1);
}

static void answer_select(int fd)
{
        answer_waiting(fd, 2);
}

static void answer_one_shot(int fd)
{
        answer_waiting(fd, 3);
}

static void answer_level(int fd)
{
        answer_waiting(fd, 4);
}

static void answer_edge(int fd)
{
        answer_waiting(fd, 5);
}

/* --- several threads at each end, with calls of many pieces --- */

enum { CALLS = 60, CALL_SIZE = 1 << 20, WRITERS = 4, READERS = 3 };

static struct {
        int fd;
        _Atomic uint64_t letters[WRITERS];
} crowd;

static void *write_letters(void *argument)
{
        size_t number = (size_t)(uintptr_t)argument;
        char *content = malloc(CALL_SIZE);
        int file = memfd_create("letters", MFD_CLOEXEC);

        CHECK(content && file >= 0);
        memset(content, 'a' + (int)number, CALL_SIZE);
        CHECK(write(file, content, CALL_SIZE) == CALL_SIZE);
        for (size_t call = 0; call < CALLS; call++) {
                off_t offset = 0;

                for (size_t done = 0; done < CALL_SIZE;) {
                        ssize_t sent = number % 2 ? sendfile(crowd.fd, file, &offset, CALL_SIZE - done)
                                                  : send(crowd.fd, content, CALL_SIZE - done, 0);

                        CHECK(sent > 0);
                        done += (size_t)sent;
                        CHECK(number % 2 == 0 || offset == (off_t)done);
                }
        }
        close(file);
        free(content);
        return NULL;
}

static void *read_letters(void *argument)
{
        uint64_t letters[WRITERS] = {0};
        char *content = malloc(CALL_SIZE);
        ssize_t got;

        CHECK(content);
        while ((got = recv(crowd.fd, content, CALL_SIZE, argument ? MSG_WAITALL : 0)) > 0)
                for (ssize_t i = 0; i < got; i++) {
                        CHECK(content[i] >= 'a' && content[i] < 'a' + WRITERS);
                        letters[content[i] - 'a']++;
                }
        CHECK(got == 0);
        for (size_t i = 0; i < WRITERS; i++)
                atomic_fetch_add(&crowd.letters[i], letters[i]);
        free(content);
        return NULL;
}

/* Each byte arrives once, though threads move the connection between the steps of others' calls. */
static void crowded(int fd)
{
        pthread_t writers[WRITERS], readers[READERS];

        crowd.fd = fd;
        for (uintptr_t i = 0; i < WRITERS; i++)
                CHECK(pthread_create(&writers[i], NULL, write_letters, (void *)i) == 0);
        for (uintptr_t i = 0; i < READERS; i++)
                CHECK(pthread_create(&readers[i], NULL, read_letters, (void *)(i % 2)) == 0);
        for (size_t i = 0; i < WRITERS; i++)
                CHECK(pthread_join(writers[i], NULL) == 0);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        for (size_t i = 0; i < READERS; i++)
                CHECK(pthread_join(readers[i], NULL) == 0);
        for (size_t i = 0; i < WRITERS; i++)
                CHECK(crowd.letters[i] == (uint64_t)CALLS * CALL_SIZE);
}

/* --- the client --- */

static void returns(int fd)
{
        return_some_times(fd, TIMES);
        by_kernel(fd, ASK_END);
}

static void option(int fd)
{
        return_some_times(fd, 1);
        by_kernel(fd, ASK_OPTION);
        stay_on_tcp(fd);
        by_kernel(fd, ASK_END);
}

/* The connection has fallen back before, for a temporary reason. */
static void option_on_tcp(int fd)
{
        if (expected())
                go_on_until(fd, true);
        by_kernel(fd, ASK_OPTION);
        stay_on_tcp(fd);
        by_kernel(fd, ASK_END);
}

static void shared(int fd)
{
        return_some_times(fd, 1);
        by_kernel(fd, ASK_FORK);
        stay_on_tcp(fd);
        by_kernel(fd, ASK_LET_GO);
        return_some_times(fd, 2);
        by_kernel(fd, ASK_END);
}

static void duplicate(int fd)
{
        return_some_times(fd, 1);
        by_kernel(fd, ASK_DUPLICATE);
        return_some_times(fd, 2);
        by_kernel(fd, ASK_END);
}

/* The kernel's counters reveal bytes that bypass the library while the connection is on TCP again.
 */
static void bypassed(int fd)
{
        struct message sent = {.number = 1, .ask = 0}, got;

        if (expected())
                go_on_until(fd, true);
        CHECK(syscall(SYS_sendto, fd, &sent, sizeof sent, 0, NULL, 0) == sizeof sent);
        get_all(fd, &got, sizeof got);
        CHECK(memcmp(&sent, &got, sizeof got) == 0);
        stay_on_tcp(fd);
        by_kernel(fd, ASK_END);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"returns", answer, returns, false},
            {"returns_poll", answer_poll, returns, false},
            {"returns_select", answer_select, returns, false},
            {"returns_one_shot", answer_one_shot, returns, false},
            {"returns_level", answer_level, returns, false},
            {"returns_edge", answer_edge, returns, false},
            {"option", answer, option, false},
            {"option_on_tcp", answer, option_on_tcp, false},
            {"shared", answer_level, shared, false},
            {"duplicate", answer_level, duplicate, false},
            {"bypassed", answer, bypassed, false},
            {"crowded", crowded, crowded, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
