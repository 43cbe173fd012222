/* TCP_CORK, TCP_NODELAY and MSG_MORE before, on and after a ring. */
#include "pair.h"

#include <linux/sockios.h>

enum { CONNECTIONS = 10 };

static const int names[] = {TCP_CORK, TCP_NODELAY};

static void set(int fd, int name, int value)
{
        CHECK(setsockopt(fd, IPPROTO_TCP, name, &value, sizeof value) == 0);
}

static int option(int fd, int name)
{
        int value = -1;
        socklen_t size = sizeof value;

        CHECK(getsockopt(fd, IPPROTO_TCP, name, &value, &size) == 0);
        CHECK(size == sizeof value);
        return value;
}

/* The kernel's own value. */
static int kernels(int fd, int name)
{
        int value = -1;
        socklen_t size = sizeof value;

        CHECK(syscall(SYS_getsockopt, fd, IPPROTO_TCP, name, &value, &size) == 0);
        return !!value;
}

/* What the kernel has for each of `names` if the program has these values and the connection has
 * moved. */
static void check(int fd, int cork, int nodelay)
{
        const int wanted[] = {cork, nodelay}, moved[] = {0, 1};
        bool expected = getenv("FREEFLOW_EXPECTED") != NULL;

        for (int i = 0; i < 2; i++) {
                CHECK(!!option(fd, names[i]) == wanted[i]);
                CHECK(kernels(fd, names[i]) == (expected ? moved[i] : wanted[i]));
        }
}

static void fall_back(int fd)
{
        int two = 2, one = 1;

        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &two, sizeof two) == 0);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof one) == 0);
}

/* The kernel holds back what is sent now, for 200 ms at most. */
static void put_corked(int fd, const char *text)
{
        double begin = clock_now();
        int unsent = 0;

        put(fd, text);
        CHECK(syscall(SYS_ioctl, fd, SIOCOUTQNSD, &unsent) == 0);
        CHECK(unsent >= (int)strlen(text) || clock_now() - begin > 0.15);
}

static void keeps(int fd)
{
        set(fd, TCP_NODELAY, 0);
        set(fd, TCP_CORK, 0);
        check(fd, 0, 0);
        set(fd, TCP_CORK, 7);
        check(fd, 1, 0);
        put(fd, "corked");
        get(fd, "seen");
        set(fd, TCP_NODELAY, 1);
        check(fd, 1, 1);
        set(fd, TCP_CORK, 0);
        check(fd, 0, 1);
        set(fd, TCP_NODELAY, 0);
        set(fd, TCP_CORK, 1);
        check(fd, 1, 0);
        /* Errors are the kernel's. */
        CHECK(setsockopt(fd, IPPROTO_TCP, TCP_CORK, &(int){0}, 1) == -1 && errno == EINVAL);
        CHECK(setsockopt(fd, IPPROTO_TCP, TCP_CORK, NULL, sizeof(int)) == -1 && errno == EFAULT);
        fall_back(fd);
        for (int i = 0; i < 2; i++)
                CHECK(!!option(fd, names[i]) == !i && kernels(fd, names[i]) == !i);
        put_corked(fd, "held");
        set(fd, TCP_CORK, 0);
        get(fd, "seen");
        CHECK(!option(fd, TCP_CORK) && !kernels(fd, TCP_CORK));
        put(fd, "end");
        get_end(fd);
}

static void sees(int fd)
{
        get(fd, "corked");
        put(fd, "seen");
        get(fd, "held");
        put(fd, "seen");
        get(fd, "end");
}

/* The child sets what its parent finds, and the other way round. */
static void shares(int fd)
{
        pid_t child;
        int status;

        set(fd, TCP_CORK, 0);
        child = fork();
        CHECK(child >= 0);
        if (!child) {
                set(fd, TCP_CORK, 1);
                put(fd, "by child");
                _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        CHECK(option(fd, TCP_CORK) == 1);
        fall_back(fd);
        CHECK(kernels(fd, TCP_CORK) == 1);
        put_corked(fd, "held");
        set(fd, TCP_CORK, 0);
        get(fd, "seen");
}

static void sees_both(int fd)
{
        get(fd, "by child");
        get(fd, "held");
        put(fd, "seen");
}

/* Two sends for each message, of which the first says that more follows. */
static void put_in_two(int fd)
{
        CHECK(send(fd, "m", 1, MSG_MORE) == 1);
        /* The ring may begin now. */
        nap(1);
        CHECK(send(fd, "n", 1, 0) == 1);
}

static void begins(int unused)
{
        bool expected = getenv("FREEFLOW_EXPECTED") != NULL;

        (void)unused;
        for (int i = 0; i < CONNECTIONS; i++) {
                int fd = dial(), rounds = 0;
                uint64_t before, after;

                set(fd, TCP_NODELAY, 1);
                do {
                        double begin = clock_now();

                        before = kernel_bytes(fd);
                        put_in_two(fd);
                        get(fd, "mn");
                        after = kernel_bytes(fd);
                        /* The kernel sends what nobody has pushed after 200 ms. */
                        CHECK(clock_now() - begin < within(0.19));
                        CHECK(rounds++ < 3000);
                } while (expected ? before != after : rounds < 10);
                close(fd);
        }
}

static void echoes(int listener)
{
        for (int i = 0; i < CONNECTIONS; i++) {
                int fd = accept(listener, NULL, NULL);
                char bytes[2];

                CHECK(fd >= 0);
                set(fd, TCP_NODELAY, 1);
                while (recv(fd, bytes, sizeof bytes, MSG_WAITALL) == sizeof bytes)
                        put_in_two(fd);
                close(fd);
        }
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"kept", sees, keeps, false},
            {"kept_there", keeps, sees, false},
            {"shared", sees_both, shares, false},
            {"begins", echoes, begins, true},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
