/* More bulk data than a process may map: what it reads in another way is the same. */
#include "pair.h"

enum { CONNECTIONS = 20, SIZE = 5 << 20 };

static void put_to_all(int listener)
{
        uint8_t *bytes = malloc(SIZE);
        int fds[CONNECTIONS];

        CHECK(bytes);
        for (size_t i = 0; i < SIZE; i++)
                bytes[i] = pattern(i);
        for (int i = 0; i < CONNECTIONS; i++) {
                int fd = accept(listener, NULL, NULL);

                CHECK(fd >= 0);
                warm_up_server(fd);
                fds[i] = fd;
        }
        for (int i = 0; i < CONNECTIONS; i++)
                CHECK(fcntl(fds[i], F_SETFL, O_NONBLOCK) == 0);
        for (size_t done[CONNECTIONS] = {0}, left = CONNECTIONS; left;) {
                for (int i = 0; i < CONNECTIONS; i++) {
                        ssize_t sent;

                        if (done[i] == SIZE)
                                continue;
                        sent = write(fds[i], bytes + done[i], SIZE - done[i]);
                        CHECK(sent > 0 || errno == EAGAIN);
                        done[i] += sent > 0 ? (size_t)sent : 0;
                        left -= done[i] == SIZE;
                }
                nap(1);
        }
        for (int i = 0; i < CONNECTIONS; i++) {
                CHECK(fcntl(fds[i], F_SETFL, 0) == 0);
                get_end(fds[i]);
        }
}

static void compare(const uint8_t *bytes, size_t from, size_t size)
{
        for (size_t i = 0; i < size; i++)
                CHECK(bytes[i] == pattern(from + i));
}

/* Each connection by another call. */
static void get_by(int fd, int way, uint8_t *bytes)
{
        for (size_t done = 0; done < SIZE;) {
                size_t most = SIZE - done < 100001 ? SIZE - done : 100001;
                ssize_t got;

                if (way == 1) {
                        struct iovec parts[3] = {{bytes, most / 3}, {bytes + most / 3, 0}, {0}};

                        parts[2] = (struct iovec){bytes + most / 3, most - most / 3};
                        got = readv(fd, parts, 3);
                } else if (way == 2) {
                        got = recv(fd, bytes, most, MSG_PEEK);
                        CHECK(got > 0);
                        compare(bytes, done, (size_t)got);
                        got = recv(fd, bytes, (size_t)got, MSG_WAITALL);
                } else if (way == 3) {
                        int pipes[2];

                        CHECK(pipe(pipes) == 0);
                        got = splice(fd, NULL, pipes[1], NULL, most < 60000 ? most : 60000, 0);
                        CHECK(got > 0);
                        get_all(pipes[0], bytes, (size_t)got);
                        close(pipes[0]);
                        close(pipes[1]);
                } else {
                        got = read(fd, bytes, most);
                }
                CHECK(got > 0);
                compare(bytes, done, (size_t)got);
                done += (size_t)got;
        }
}

static void get_from_all(int none)
{
        uint8_t *bytes = malloc(SIZE);
        int fds[CONNECTIONS];

        (void)none;
        CHECK(bytes);
        for (int i = 0; i < CONNECTIONS; i++) {
                fds[i] = dial();
                warm_up(fds[i]);
        }
        /* All rings are full. */
        nap(300);
        for (int i = 0; i < CONNECTIONS; i++)
                get_by(fds[i], i % 4, bytes);
        for (int i = 0; i < CONNECTIONS; i++)
                close(fds[i]);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"much", put_to_all, get_from_all, true},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
