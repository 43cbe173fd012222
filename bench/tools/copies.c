/* The limit of memory: bytes that one core copies from one buffer to another, again and again, as a
 * program of perftest does.
 *
 *   copies SIZE SECONDS
 */

#include "common.h"

enum { MAX_SIZE = 64 * 1024 * 1024, BETWEEN_LOOKS = 16 };

static _Noreturn void usage(void)
{
        fputs("usage: copies SIZE SECONDS\n", stderr);
        exit(2);
}

int main(int argc, char **argv)
{
        uint64_t count = 0, begin, end, took;
        char *from, *to;
        size_t size;

        if (argc != 3 || !(size = strtoul(argv[1], NULL, 10)) || size > MAX_SIZE)
                usage();
        from = malloc(size);
        to = malloc(size);
        if (!from || !to)
                fail("malloc");
        memset(from, 1, size);
        memset(to, 2, size);
        begin = now();
        end = begin + (uint64_t)(atof(argv[2]) * 1e9);
        do {
                for (int i = 0; i < BETWEEN_LOOKS; i++) {
                        memcpy(to, from, size);
                        /* Each copy is one that somebody may read. */
                        __asm__ volatile("" : : "r"(to) : "memory");
                }
                count += BETWEEN_LOOKS;
        } while (now() < end);
        took = now() - begin;
        printf("{\"bytes\": %llu, \"seconds\": %.6f, \"cpu_us\": %.0f}\n", (unsigned long long)(count * size),
               (double)took / 1e9, cpu_us());
        return 0;
}
