/* The limit of shared memory: a bare ring between two processes that spin, each on a core of its
 * own.
 *
 *   ring pingpong CPU CPU SIZE SECONDS
 *   ring stream   CPU CPU SIZE SECONDS
 *
 * One ring of RING bytes per direction, filled and emptied by memcpy, `tail` written by the sender
 * and `head` by the receiver; there are no system calls, no sleeps, and no checks against a hostile
 * peer. The output is that of pingpong and stream.
 */

#include "common.h"
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { RING = 4 * 1024 * 1024, MAX_SAMPLES = 8 * 1000 * 1000, WARM_UP = 1000 };

struct ring {
        _Alignas(64) _Atomic uint64_t tail; /* release by the sender, acquire by the receiver */
        _Alignas(64) _Atomic uint64_t head; /* release by the receiver, acquire by the sender */
        _Alignas(64) _Atomic int ended;
        _Alignas(64) char bytes[RING];
};

struct shared {
        struct ring there, back;
};

static char buffer[RING];

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
}

static void put(struct ring *ring, const char *from, size_t size)
{
        uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);

        while (size > 0) {
                uint64_t space = RING - (tail - atomic_load_explicit(&ring->head, memory_order_acquire));
                size_t at = tail % RING, n = size < RING - at ? size : RING - at;

                if (n > space)
                        n = space;
                if (n == 0) {
                        relax();
                        continue;
                }
                memcpy(ring->bytes + at, from, n);
                tail += n;
                from += n;
                size -= n;
                atomic_store_explicit(&ring->tail, tail, memory_order_release);
        }
}

/* Up to `size` bytes; 0 when the ring has ended. */
static size_t get(struct ring *ring, char *to, size_t size)
{
        uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed), tail;

        while ((tail = atomic_load_explicit(&ring->tail, memory_order_acquire)) == head) {
                if (atomic_load_explicit(&ring->ended, memory_order_acquire) &&
                    atomic_load_explicit(&ring->tail, memory_order_acquire) == head)
                        return 0;
                relax();
        }
        size_t at = head % RING, n = tail - head < size ? tail - head : size;

        if (n > RING - at)
                n = RING - at;
        memcpy(to, ring->bytes + at, n);
        atomic_store_explicit(&ring->head, head + n, memory_order_release);
        return n;
}

static int get_all(struct ring *ring, char *to, size_t size)
{
        while (size > 0) {
                size_t n = get(ring, to, size);

                if (n == 0)
                        return 0;
                to += n;
                size -= n;
        }
        return 1;
}

static void end(struct ring *ring)
{
        atomic_store_explicit(&ring->ended, 1, memory_order_release);
}

static void echo(struct shared *shared, size_t size)
{
        while (get_all(&shared->there, buffer, size))
                put(&shared->back, buffer, size);
}

static void swallow(struct shared *shared, size_t size)
{
        uint64_t got = 0;
        size_t n;

        while ((n = get(&shared->there, buffer, size)) > 0)
                got += n;
        put(&shared->back, (char *)&got, sizeof got);
}

static void pingpong(struct shared *shared, size_t size, double seconds)
{
        uint32_t *samples = malloc(MAX_SAMPLES * sizeof *samples);
        size_t count = 0;

        if (!samples)
                fail("malloc");
        memset(samples, 1, MAX_SAMPLES * sizeof *samples);
        uint64_t stop = now() + (uint64_t)(seconds * 1e9);
        double before = cpu_us();

        for (uint32_t number = 0; count < MAX_SAMPLES; number++) {
                uint64_t sent = now();

                if (sent >= stop)
                        break;
                put(&shared->there, buffer, size);
                if (!get_all(&shared->back, buffer, size))
                        fail("ring");
                if (number == WARM_UP)
                        before = cpu_us();
                if (number >= WARM_UP)
                        samples[count++] = (uint32_t)(now() - sent);
        }
        double used = cpu_us() - before;

        end(&shared->there);
        if (count == 0) {
                fputs("ring: no time for a message\n", stderr);
                exit(1);
        }
        qsort(samples, count, sizeof *samples, ascending);
        /* Both ends spin all the time. */
        printf("{\"count\": %zu, \"lost\": 0, \"p50_us\": %.3f, \"p99_us\": %.3f, \"cpu_us\": %.0f}\n", count,
               samples[count / 2] / 1e3, samples[count * 99 / 100] / 1e3, used * 2);
        free(samples);
}

static void stream(struct shared *shared, size_t size, double seconds)
{
        uint64_t sent = 0, arrived, writes = 0;
        uint64_t start = now(), stop = start + (uint64_t)(seconds * 1e9);
        double before = cpu_us();

        while (++writes % 64 != 0 || now() < stop) {
                put(&shared->there, buffer, size);
                sent += size;
        }
        end(&shared->there);
        if (!get_all(&shared->back, (char *)&arrived, sizeof arrived) || arrived != sent) {
                fputs("ring: bytes are missing\n", stderr);
                exit(1);
        }
        printf("{\"bytes\": %llu, \"seconds\": %.6f, \"cpu_us\": %.0f}\n", (unsigned long long)arrived,
               (double)(now() - start) / 1e9, (cpu_us() - before) * 2);
}

int main(int argc, char **argv)
{
        int trips = argc == 6 && strcmp(argv[1], "pingpong") == 0;

        if (argc != 6 || (!trips && strcmp(argv[1], "stream") != 0) || atol(argv[4]) < 1 ||
            atol(argv[4]) > RING || atof(argv[5]) <= 0) {
                fputs("usage: ring pingpong|stream CPU CPU SIZE SECONDS\n", stderr);
                return 2;
        }
        size_t size = (size_t)atol(argv[4]);
        struct shared *shared =
            mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

        if (shared == MAP_FAILED)
                fail("mmap");
        pid_t child = fork();

        if (child < 0)
                fail("fork");
        if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                pin(atoi(argv[3]));
                (trips ? echo : swallow)(shared, size);
                return 0;
        }
        pin(atoi(argv[2]));
        (trips ? pingpong : stream)(shared, size, atof(argv[5]));
        waitpid(child, NULL, 0);
        return 0;
}
