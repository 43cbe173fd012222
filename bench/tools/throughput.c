/* Bytes in one direction over one connection, by writes of one size.
 *
 *   throughput serve CPU ADDRESS PORT
 *   throughput call  CPU ADDRESS PORT SIZE SECONDS
 *
 * ADDRESS may be the path of a unix socket, and CPU -1: not pinned. The reader's buffer is as large
 * as a write. When the writer has shut down its side, the reader answers with the count of bytes
 * that it received. So the rate is that of bytes that have arrived; a count other than the writer's
 * is an error.
 */

#include "common.h"

enum { MAX_WRITE = 4 * 1024 * 1024 };

static char buffer[MAX_WRITE];

static _Noreturn void usage(void)
{
        fputs("usage: throughput serve CPU ADDRESS PORT\n"
              "       throughput call CPU ADDRESS PORT SIZE SECONDS\n",
              stderr);
        exit(2);
}

static void take(int fd)
{
        uint64_t got = 0;
        uint32_t size;
        ssize_t n;

        if (!read_all(fd, (char *)&size, sizeof size) || size == 0 || size > MAX_WRITE)
                return;
        for (;;) {
                n = recv(fd, buffer, size, 0);
                if (n < 0 && errno == EINTR)
                        continue;
                if (n <= 0)
                        break;
                got += (uint64_t)n;
        }
        if (n == 0)
                (void)write_all(fd, (char *)&got, sizeof got);
}

static _Noreturn void serve(int listener)
{
        for (;;) {
                int fd = accept(listener, NULL, NULL);

                if (fd < 0) {
                        if (errno == EINTR || errno == ECONNABORTED)
                                continue;
                        fail("accept");
                }
                take(fd);
                close(fd);
        }
}

static void call(int fd, uint32_t size, double seconds)
{
        uint64_t sent = 0, arrived, writes = 0;

        memset(buffer, 'x', size);
        if (!write_all(fd, (char *)&size, sizeof size))
                fail("send");

        uint64_t start = now(), end = start + (uint64_t)(seconds * 1e9);
        double before = cpu_us();

        /* The clock is read every 64 writes, to keep its cost small. */
        while (++writes % 64 != 0 || now() < end) {
                if (!write_all(fd, buffer, size))
                        fail("connection lost");
                sent += size;
        }
        if (shutdown(fd, SHUT_WR) < 0)
                fail("shutdown");
        if (!read_all(fd, (char *)&arrived, sizeof arrived))
                fail("no count came back");
        double took = (double)(now() - start) / 1e9, used = cpu_us() - before;

        if (arrived != sent) {
                fprintf(stderr, "throughput: %llu bytes sent, %llu arrived\n", (unsigned long long)sent,
                        (unsigned long long)arrived);
                exit(1);
        }
        printf("{\"bytes\": %llu, \"seconds\": %.6f, \"cpu_us\": %.0f}\n", (unsigned long long)arrived, took,
               used);
}

int main(int argc, char **argv)
{
        if (argc != 5 && argc != 7)
                usage();
        int serving = strcmp(argv[1], "serve") == 0;
        if ((!serving && strcmp(argv[1], "call") != 0) || argc != (serving ? 5 : 7))
                usage();

        struct endpoint where = resolve(argv[3], argv[4]);

        pin(atoi(argv[2]));
        if (serving)
                serve(listen_at(&where));

        long size = atol(argv[5]);
        if (size < 1 || size > MAX_WRITE || atof(argv[6]) <= 0)
                usage();
        int fd = connect_to(&where);
        call(fd, (uint32_t)size, atof(argv[6]));
        close(fd);
        return 0;
}
