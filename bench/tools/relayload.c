/* Both processes of a connection over one relay, in one thread: what lies between is the relay and nothing
 * else.
 *
 *      relayload delay|stream MESSAGE SECONDS TOUCH ARENA BELL ARENA BELL
 *
 * Descriptors of two remote arenas whose slot 0 the relay has paired with each other, and of what rings it. A
 * message is put into direction 0 of the first arena, and taken from direction 1 of the second one.
 *
 *      delay   one message at a time: from `tail` stored here to `tail` seen there, in ns: median, 99th
 * percentile stream  as many as there is room for: bytes, seconds
 *
 * TOUCH 1: bytes are written and read, as programs do; 0: only the indices move, so that the relay is never
 * waited for.
 */
#include "../../dataplane/library/layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { TIMES = 1 << 20, BATCH = 64 };

struct place {
        struct arena *arena;
        struct ring *ring;
        unsigned char *bulk;
        int bell;
};

static uint32_t size;
static unsigned char buffer[1 << 20];
static uint32_t times[TIMES];

static uint64_t now(void)
{
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static struct place place_of(const char *fd, const char *bell, uint32_t direction)
{
        int memory = atoi(fd);
        off_t whole = lseek(memory, 0, SEEK_END);
        unsigned char *base = mmap(NULL, (size_t)whole, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);

        if (base == MAP_FAILED) {
                perror("an arena");
                exit(1);
        }
        size = ((struct arena *)(void *)base)->size_of_ring;
        return (struct place){.arena = (struct arena *)(void *)base,
                              .ring = (struct ring *)(void *)(base + SLOT_OFFSET + direction * PAGE),
                              .bulk = base + BULK_OFFSET + (size_t)direction * size,
                              .bell = atoi(bell)};
}

static void copy(struct place place, uint64_t position, size_t length, int put)
{
        for (size_t done = 0; done < length;) {
                uint64_t offset = (position + done) & (size - 1);
                size_t run = (offset < SMALL_SIZE ? SMALL_SIZE : size) - offset;
                unsigned char *at = offset < SMALL_SIZE ? (unsigned char *)place.ring + RING_HEADER + offset
                                                        : place.bulk + offset;

                run = run < length - done ? run : length - done;
                if (put)
                        memcpy(at, buffer + done, run);
                else
                        memcpy(buffer + done, at, run);
                done += run;
        }
}

static int compare(const void *a, const void *b)
{
        uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

        return x < y ? -1 : x > y;
}

/* As the library's wake(): a relay that rests is rung. */
static void wake(struct place place, struct waiters *waiters)
{
        atomic_thread_fence(memory_order_seq_cst);
        if (!atomic_load_explicit(&waiters->any, memory_order_relaxed))
                return;
        atomic_exchange(&waiters->any, 0);
        if (!(atomic_exchange(&waiters->bells[0], 0) & 1))
                return;
        atomic_fetch_or(&place.arena->sides[1].dirty[0], 1);
        if (send(place.bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
                return;
}

static void taken(struct place in, uint64_t head)
{
        atomic_store_explicit(&in.ring->head, head, memory_order_release);
        if (atomic_load_explicit(&in.ring->tail, memory_order_relaxed) - head < atomic_load(&in.ring->room))
                wake(in, &in.ring->senders);
}

int main(int count, char **arguments)
{
        struct place out, in;
        uint64_t message, tail = 0, head = 0, start, end, seen = 0;
        int touch, delay;

        if (count < 9)
                return 2;
        delay = !strcmp(arguments[1], "delay");
        message = strtoull(arguments[2], NULL, 10);
        end = (uint64_t)(atof(arguments[3]) * 1e9);
        touch = atoi(arguments[4]);
        out = place_of(arguments[5], arguments[6], 0);
        in = place_of(arguments[7], arguments[8], 1);
        atomic_store(&out.ring->start, 1);
        tail = head = atomic_load(&out.ring->tail);
        start = now();
        for (;;) {
                uint64_t present;

                if (delay) {
                        uint64_t begin, took;

                        if (touch)
                                copy(out, tail, message, 1);
                        tail += message;
                        begin = now();
                        atomic_store_explicit(&out.ring->tail, tail, memory_order_release);
                        wake(out, &out.ring->receivers);
                        while (atomic_load_explicit(&in.ring->tail, memory_order_acquire) != tail)
                                __builtin_ia32_pause();
                        present = now();
                        took = present - begin;
                        times[seen++ % TIMES] = (uint32_t)took;
                        if (touch)
                                copy(in, head, message, 0);
                        head = tail;
                        taken(in, head);
                        /* The relay's word that it was taken is on its way: not a part of the next trip. */
                        while (tail - atomic_load_explicit(&out.ring->head, memory_order_acquire) >
                               size - message)
                                __builtin_ia32_pause();
                } else {
                        for (int i = 0; i < BATCH; i++) {
                                uint64_t got;

                                if (tail - atomic_load_explicit(&out.ring->head, memory_order_acquire) +
                                        message <=
                                    size) {
                                        if (touch)
                                                copy(out, tail, message, 1);
                                        tail += message;
                                        atomic_store_explicit(&out.ring->tail, tail, memory_order_release);
                                        wake(out, &out.ring->receivers);
                                }
                                got = atomic_load_explicit(&in.ring->tail, memory_order_acquire) - head;
                                got = got < sizeof buffer ? got : sizeof buffer;
                                if (got && touch)
                                        copy(in, head, got, 0);
                                head += got;
                                seen += got;
                                if (got)
                                        taken(in, head);
                                else
                                        __builtin_ia32_pause();
                        }
                        present = now();
                }
                if (present - start >= end && seen) {
                        end = present - start;
                        break;
                }
        }
        if (delay) {
                uint64_t kept = seen < TIMES ? seen : TIMES;

                qsort(times, kept, sizeof *times, compare);
                printf("%llu %u %u\n", (unsigned long long)seen, times[kept / 2], times[kept * 99 / 100]);
        } else {
                printf("%llu %.6f\n", (unsigned long long)seen, (double)end / 1e9);
        }
        return 0;
}
