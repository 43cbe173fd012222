/* The keepalive options of a connection that has moved: what the program reads, and what the kernel
 * has. */
#include "pair.h"

static const int names[] = {TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT};

static int option(int fd, int level, int name)
{
        int value = -1;
        socklen_t size = sizeof value;

        CHECK(getsockopt(fd, level, name, &value, &size) == 0 && size == sizeof value);
        return value;
}

/* By syscall(), which the library does not change. */
static int in_kernel(int fd, int level, int name)
{
        int value = -1;
        socklen_t size = sizeof value;

        CHECK(syscall(SYS_getsockopt, fd, level, name, &value, &size) == 0);
        return value;
}

static void set(int fd, int level, int name, int value)
{
        CHECK(setsockopt(fd, level, name, &value, sizeof value) == 0);
}

static void wait_for_end(int fd)
{
        get_end(fd);
}

/* The program sees the options of a socket that was never connected. */
static void options(int fd)
{
        int fresh = socket(AF_INET, SOCK_STREAM, 0);
        char small = 7;
        socklen_t size = 1;

        CHECK(option(fd, SOL_SOCKET, SO_KEEPALIVE) == 0);
        for (size_t i = 0; i < sizeof names / sizeof *names; i++)
                CHECK(option(fd, IPPROTO_TCP, names[i]) == option(fresh, IPPROTO_TCP, names[i]));
        CHECK(getsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &small, &size) == 0 && size == 1 && small == 0);
        if (getenv("FREEFLOW_EXPECTED")) {
                CHECK(in_kernel(fd, SOL_SOCKET, SO_KEEPALIVE) == 1);
                CHECK(in_kernel(fd, IPPROTO_TCP, TCP_KEEPIDLE) <= 300);
        }
}

static void set_later(int fd)
{
        int bad = 0;

        set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 4000);
        set(fd, IPPROTO_TCP, TCP_KEEPINTVL, 50);
        set(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
        CHECK(setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &bad, sizeof bad) == -1 && errno == EINVAL);
        for (int on = 0; on < 2; on++) {
                set(fd, SOL_SOCKET, SO_KEEPALIVE, on);
                CHECK(option(fd, SOL_SOCKET, SO_KEEPALIVE) == on);
                CHECK(option(fd, IPPROTO_TCP, TCP_KEEPIDLE) == 4000);
                CHECK(option(fd, IPPROTO_TCP, TCP_KEEPINTVL) == 50);
                CHECK(option(fd, IPPROTO_TCP, TCP_KEEPCNT) == 3);
                if (getenv("FREEFLOW_EXPECTED"))
                        CHECK(in_kernel(fd, SOL_SOCKET, SO_KEEPALIVE) == 1 &&
                              in_kernel(fd, IPPROTO_TCP, TCP_KEEPIDLE) <= 300);
        }
        /* Probes that the program requests more often than the library needs stay as they are. */
        set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 1);
        set(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1);
        CHECK(in_kernel(fd, IPPROTO_TCP, TCP_KEEPIDLE) == 1 &&
              in_kernel(fd, IPPROTO_TCP, TCP_KEEPINTVL) == 1);
        CHECK(in_kernel(fd, IPPROTO_TCP, TCP_KEEPCNT) == 3);
}

/* fdopen(): the C library's streams get the connection. */
static void handed_on(int fd)
{
        FILE *stream;

        set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 4000);
        stream = fdopen(fd, "r+");
        CHECK(stream);
        CHECK(in_kernel(fd, SOL_SOCKET, SO_KEEPALIVE) == 0);
        CHECK(in_kernel(fd, IPPROTO_TCP, TCP_KEEPIDLE) == 4000);
        fclose(stream);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"options", wait_for_end, options, false},
            {"set_later", wait_for_end, set_later, false},
            {"handed_on", wait_for_end, handed_on, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
