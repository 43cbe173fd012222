/* Calls that bypass the library, on a connection that has moved: the program executes the system
 * call instruction itself. */
#include "pair.h"

static long raw(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
        long result;
        register long r10 __asm__("r10") = d;
        register long r8 __asm__("r8") = e;
        register long r9 __asm__("r9") = f;

        __asm__ volatile("syscall"
                         : "=a"(result)
                         : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                         : "rcx", "r11", "memory");
        return result;
#else
        register long x8 __asm__("x8") = number;
        register long x0 __asm__("x0") = a;
        register long x1 __asm__("x1") = b;
        register long x2 __asm__("x2") = c;
        register long x3 __asm__("x3") = d;
        register long x4 __asm__("x4") = e;
        register long x5 __asm__("x5") = f;

        __asm__ volatile("svc 0"
                         : "+r"(x0)
                         : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                         : "memory");
        return x0;
#endif
}

static void raw_put(int fd, const char *text)
{
        CHECK(raw(SYS_write, fd, (long)text, (long)strlen(text), 0, 0, 0) == (long)strlen(text));
}

static long raw_get(int fd, void *to, size_t size, int flags)
{
        return raw(SYS_recvfrom, fd, (long)to, (long)size, flags, 0, 0);
}

static void talk(int fd)
{
        put(fd, "question");
        get(fd, "answer");
}

static void answer(int fd)
{
        get(fd, "question");
        put(fd, "answer");
}

/* --- writes --- */

static void read_at_once(int fd)
{
        get(fd, "past");
        talk(fd);
        talk(fd);
}

static void write_at_once_twice(int fd)
{
        raw_put(fd, "past");
        answer(fd);
        answer(fd);
}

static void write_between(int fd)
{
        put(fd, "one ");
        raw_put(fd, "two ");
        put(fd, "three ");
        raw_put(fd, "four ");
        put(fd, "five");
        answer(fd);
        put(fd, "more");
}

static void read_between(int fd)
{
        get(fd, "one two three four five");
        talk(fd);
        get(fd, "more");
}

static void read_between_late(int fd)
{
        nap(100);
        read_between(fd);
}

static void write_later(int fd)
{
        answer(fd);
        nap(50);
        raw_put(fd, "later");
        answer(fd);
}

static void read_later(int fd)
{
        talk(fd);
        get(fd, "later");
        talk(fd);
}

/* After many messages in quick succession, because the library does not check the kernel's counters
 * at each. */
static void write_when_hot(int fd)
{
        for (int i = 0; i < 200; i++)
                answer(fd);
        raw_put(fd, "past");
        answer(fd);
}

static void read_when_hot(int fd)
{
        for (int i = 0; i < 200; i++)
                talk(fd);
        get(fd, "past");
        talk(fd);
}

/* So many that the counters were not checked at most of them: the bytes arrive in order, or the
 * connection is reset. */
static void write_when_hotter(int fd)
{
        char byte;

        for (int i = 0; i < 30000; i++)
                answer(fd);
        raw_put(fd, "past");
        if (read(fd, &byte, 1) != 1)
                CHECK(errno == ECONNRESET);
}

static void read_when_hotter(int fd)
{
        char bytes[8] = "";
        size_t size = 0;
        ssize_t got;

        for (int i = 0; i < 30000; i++)
                talk(fd);
        while (size < 4 && (got = read(fd, bytes + size, 4 - size)) > 0)
                size += (size_t)got;
        if (size == 4)
                CHECK(memcmp(bytes, "past", 4) == 0 && write(fd, "q", 1) == 1);
        else
                CHECK(size == 0 && got < 0 && errno == ECONNRESET);
}

/* Both ends, many times, with pauses of all lengths. */
static void write_often(int fd)
{
        unsigned seed = 7;

        for (int i = 0; i < 300; i++) {
                char text[16];

                snprintf(text, sizeof text, "%08d", i);
                seed = seed * 1103515245 + 12345;
                if (seed >> 16 & 1)
                        raw_put(fd, text);
                else
                        put(fd, text);
                if ((seed >> 17) % 16 == 0)
                        nap((int)(seed >> 22) % 4);
        }
}

static void read_often(int fd)
{
        for (int i = 0; i < 300; i++) {
                char text[16];

                snprintf(text, sizeof text, "%08d", i);
                get(fd, text);
        }
}

static void often_there(int fd)
{
        write_often(fd);
        read_often(fd);
}

static void often_here(int fd)
{
        read_often(fd);
        write_often(fd);
}

/* While the ring is full. */
static void write_when_full(int fd)
{
        static char bytes[65536];
        size_t size = 0;
        ssize_t sent;
        char text[32];

        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        while ((sent = write(fd, bytes, sizeof bytes)) > 0)
                size += (size_t)sent;
        CHECK(errno == EAGAIN && fcntl(fd, F_SETFL, 0) == 0);
        /* A write that exceeds the kernel's buffer waits for the reader, with the library and
         * without. */
        raw_put(fd, "past");
        snprintf(text, sizeof text, "%020zu", size);
        put(fd, text);
        answer(fd);
}

static void read_when_full(int fd)
{
        size_t size = 0, past;
        char *bytes = malloc(64 << 20), *found;

        nap(300);
        for (;;) {
                ssize_t got = read(fd, bytes + size, 65536);

                CHECK(got > 0);
                size += (size_t)got;
                found = memmem(bytes, size, "past", 4);
                if (found && size == (size_t)(found - bytes) + 24)
                        break;
        }
        past = (size_t)(found - bytes);
        CHECK(strtoull(found + 4, NULL, 10) == past);
        talk(fd);
        free(bytes);
}

/* One thread's write waits for room, another's bypasses the library: no byte may be lost or
 * doubled. */
static void *put_much(void *fd)
{
        static char bytes[16 << 20];

        put_all(*(int *)fd, bytes, sizeof bytes);
        return NULL;
}

static void write_while_blocked(int fd)
{
        pthread_t thread;

        CHECK(pthread_create(&thread, NULL, put_much, &fd) == 0);
        nap(100);
        raw_put(fd, "p");
        CHECK(pthread_join(thread, NULL) == 0);
        put(fd, "\1");
        answer(fd);
}

static void read_while_blocked(int fd)
{
        char *bytes = malloc((16 << 20) + 2);

        nap(200);
        get_all(fd, bytes, (16 << 20) + 2);
        CHECK(memchr(bytes, 'p', (16 << 20) + 1) != NULL);
        CHECK(bytes[(16 << 20) + 1] == 1);
        talk(fd);
        free(bytes);
}

/* A thread that waits in poll or epoll is woken. */
static void read_by(int fd, bool epoll)
{
        for (int i = 0; i < 20; i++) {
                char text[16];

                snprintf(text, sizeof text, "%08d", i);
                if (epoll) {
                        struct epoll_event event = {.events = EPOLLIN};
                        int epfd = epoll_create1(0);

                        CHECK(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
                        CHECK(epoll_wait(epfd, &event, 1, 10000) == 1 && event.events & EPOLLIN);
                        close(epfd);
                } else {
                        CHECK(ready(fd, POLLIN, 10000) & POLLIN);
                }
                get(fd, text);
                put(fd, "+");
        }
}

static void read_by_poll(int fd)
{
        read_by(fd, false);
}

static void read_by_epoll(int fd)
{
        read_by(fd, true);
}

static void write_one_by_one(int fd)
{
        for (int i = 0; i < 20; i++) {
                char text[16];

                snprintf(text, sizeof text, "%08d", i);
                if (i & 1)
                        raw_put(fd, text);
                else
                        put(fd, text);
                get(fd, "+");
        }
}

/* The connection stays open until the test has checked the other end. */
static void write_and_stay(int fd)
{
        char byte;

        raw_put(fd, "past");
        answer(fd);
        CHECK(read(fd, &byte, 1) == 0);
}

static void read_and_stay(int fd)
{
        char byte;

        get(fd, "past");
        talk(fd);
        CHECK(read(0, &byte, 1) >= 0);
}

/* --- reads --- */

/* A raw read sees nothing of what is in shared memory, and takes nothing away. */
static void read_past(int fd)
{
        char bytes[16] = "";
        long got;

        put(fd, "go");
        nap(200);
        got = raw_get(fd, bytes, 4, MSG_DONTWAIT);
        CHECK(got == 4 || got == -EAGAIN);
        if (got == -EAGAIN)
                get(fd, "here");
        else
                CHECK(memcmp(bytes, "here", 4) == 0);
        talk(fd);
        /* Bytes that bypass the library reach a reader that bypasses it too. */
        CHECK(raw_get(fd, bytes, 4, MSG_WAITALL) == 4 && memcmp(bytes, "past", 4) == 0);
        talk(fd);
}

static void write_past(int fd)
{
        get(fd, "go");
        put(fd, "here");
        answer(fd);
        raw_put(fd, "past");
        answer(fd);
}

/* --- ends --- */

static void shut_past(int fd)
{
        signal(SIGPIPE, SIG_IGN);
        put(fd, "last");
        CHECK(raw(SYS_shutdown, fd, SHUT_WR, 0, 0, 0, 0) == 0);
        nap(20);
        CHECK(write(fd, "x", 1) == -1 && errno == EPIPE);
        get(fd, "bye");
        get_end(fd);
}

static void is_shut(int fd)
{
        get(fd, "last");
        get_end(fd);
        put(fd, "bye");
}

/* A connection was closed by a raw system call, and a file has its descriptor now. */
static void close_past(int fd)
{
        char path[] = "/tmp/closed-past-XXXXXX", bytes[8] = "";
        int file = mkstemp(path);

        CHECK(file >= 0 && write(file, "file!", 5) == 5);
        CHECK(raw(SYS_dup3, file, fd, 0, 0, 0, 0) == fd);
        unlink(path);
        CHECK(setsockopt(fd, IPPROTO_TCP, TCP_CORK, &(int){1}, sizeof(int)) == -1 && errno == ENOTSOCK);
        CHECK(lseek(fd, 0, SEEK_SET) == 0);
        CHECK(read(fd, bytes, 5) == 5 && memcmp(bytes, "file!", 5) == 0);
        CHECK(write(fd, "more", 4) == 4);
        CHECK(lseek(fd, 5, SEEK_SET) == 5);
        CHECK(read(fd, bytes, 4) == 4 && memcmp(bytes, "more", 4) == 0);
        close(fd);
}

/* Every descriptor that the program does not know is closed by raw system calls, the library's too.
 */
static void close_all_past(int fd)
{
        clock_t before;

        put(fd, "g");
        get(fd, "abcdef");
        CHECK(raw(SYS_close_range, fd + 1, ~0u, 0, 0, 0, 0) == 0);
        before = clock();
        put(fd, "k");
        get(fd, "z");
        put(fd, "y");
        get(fd, "end");
        /* Waiting takes no CPU time. */
        CHECK((double)(clock() - before) / CLOCKS_PER_SEC < 0.5);
}

static void told_to_close(int fd)
{
        get(fd, "g");
        nap(100);
        put(fd, "abcdef");
        get(fd, "k");
        nap(500);
        put(fd, "z");
        get(fd, "y");
        nap(1000);
        put(fd, "end");
}

static void is_closed(int fd)
{
        get_end(fd);
}

/* A program without the library has inherited the connection, and the library does not know of it.
 */
static void run_past(int fd)
{
        int pipes[2];
        pid_t child;

        CHECK(pipe(pipes) == 0);
        put(fd, "before ");
        child = fork();
        CHECK(child >= 0);
        if (!child) {
                const char *file = getenv("HELPER");
                char *arguments[] = {(char *)"cat", NULL};

                raw(SYS_dup3, pipes[0], 0, 0, 0, 0, 0);
                raw(SYS_dup3, fd, 1, 0, 0, 0, 0);
                raw(SYS_close, pipes[1], 0, 0, 0, 0, 0);
                raw(SYS_execve, (long)file, (long)arguments, (long)environ, 0, 0, 0);
                raw(SYS_exit_group, 1, 0, 0, 0, 0, 0);
        }
        close(pipes[0]);
        put_all(pipes[1], "by another ", 11);
        close(pipes[1]);
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        put(fd, "after");
        answer(fd);
}

static void read_all_of_it(int fd)
{
        get(fd, "before by another after");
        talk(fd);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"server_writes", write_at_once_twice, read_at_once, false},
            {"client_writes", read_at_once, write_at_once_twice, false},
            {"server_writes_between", write_between, read_between, false},
            {"client_writes_between", read_between, write_between, false},
            {"late_reader", write_between, read_between_late, false},
            {"server_writes_later", write_later, read_later, false},
            {"client_writes_later", read_later, write_later, false},
            {"server_writes_hot", write_when_hot, read_when_hot, false},
            {"client_writes_hot", read_when_hot, write_when_hot, false},
            {"hotter", write_when_hotter, read_when_hotter, false},
            {"often", often_there, often_here, false},
            {"full", write_when_full, read_when_full, false},
            {"blocked", write_while_blocked, read_while_blocked, false},
            {"stay", write_and_stay, read_and_stay, false},
            {"poll", write_one_by_one, read_by_poll, false},
            {"epoll", write_one_by_one, read_by_epoll, false},
            {"server_reads", read_past, write_past, false},
            {"client_reads", write_past, read_past, false},
            {"shutdown", shut_past, is_shut, false},
            {"closed", close_past, is_closed, false},
            {"closed_all", close_all_past, told_to_close, false},
            {"closed_all_there", told_to_close, close_all_past, false},
            {"program", run_past, read_all_of_it, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
