/* Both processes of a connection over one relay, in one thread, so that only the relay is between
 * them.
 *
 *      relayload delay|stream MESSAGE SECONDS TOUCH ARENA BELL ARENA BELL
 *
 * ARENA and BELL are descriptors: two remote arenas whose slots 0 the relay has paired with each
 * other, and the sending ends of the relay's bells. Messages go into direction 0 of the first
 * arena, and come from direction 1 of the second one.
 *
 *      delay   one message at a time, from the store of `tail` to its arrival; prints the count of
 *              messages, and the median and 99th percentile in ns
 *      stream  as many messages as there is room for; prints bytes and seconds
 *
 * TOUCH 1: bytes are written and read, as programs do; 0: only the indices move, so that the relay
 * never waits for this program.
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

/* One direction of a slot. */
struct end {
        struct arena *arena;
        struct ring *ring;
        unsigned char *bulk;
        int bell;
};

struct load {
        struct end out, in;
        uint64_t message, tail, head;
        uint64_t seen; /* messages, or bytes of a stream */
        int touch;
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

static struct end map_end(const char *fd, const char *bell, uint32_t direction)
{
        int memory = atoi(fd);
        off_t whole = lseek(memory, 0, SEEK_END);
        unsigned char *base = mmap(NULL, (size_t)whole, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);

        if (base == MAP_FAILED) {
                perror("mapping an arena");
                exit(1);
        }
        size = ((struct arena *)(void *)base)->size_of_ring;
        return (struct end){.arena = (struct arena *)(void *)base,
                            .ring = (struct ring *)(void *)(base + SLOT_OFFSET + direction * PAGE),
                            .bulk = base + BULK_OFFSET + (size_t)direction * size,
                            .bell = atoi(bell)};
}

static void copy(struct end end, uint64_t position, size_t length, int put)
{
        for (size_t done = 0; done < length;) {
                uint64_t offset = (position + done) & (size - 1);
                size_t run = (offset < SMALL_SIZE ? SMALL_SIZE : size) - offset;
                unsigned char *at = offset < SMALL_SIZE ? (unsigned char *)end.ring + RING_HEADER + offset
                                                        : end.bulk + offset;

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

/* As the library's wake(): rings the bell of a relay that sleeps. */
static void wake(struct end end, struct waiters *waiters)
{
        atomic_thread_fence(memory_order_seq_cst);
        if (!atomic_load_explicit(&waiters->any, memory_order_relaxed))
                return;
        atomic_exchange(&waiters->any, 0);
        if (!(atomic_exchange(&waiters->bells[0], 0) & 1))
                return;
        atomic_fetch_or(&end.arena->sides[1].dirty[0], 1);
        if (send(end.bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
                return;
}

static void taken(struct end in, uint64_t head)
{
        atomic_store_explicit(&in.ring->head, head, memory_order_release);
        if (atomic_load_explicit(&in.ring->tail, memory_order_relaxed) - head < atomic_load(&in.ring->room))
                wake(in, &in.ring->senders);
}

/* One message there; returns when it has arrived, and the relay has reported that it was taken. */
static void trip(struct load *load)
{
        uint64_t begin;

        if (load->touch)
                copy(load->out, load->tail, load->message, 1);
        load->tail += load->message;
        begin = now();
        atomic_store_explicit(&load->out.ring->tail, load->tail, memory_order_release);
        wake(load->out, &load->out.ring->receivers);
        while (atomic_load_explicit(&load->in.ring->tail, memory_order_acquire) != load->tail)
                __builtin_ia32_pause();
        times[load->seen++ % TIMES] = (uint32_t)(now() - begin);
        if (load->touch)
                copy(load->in, load->head, load->message, 0);
        load->head = load->tail;
        taken(load->in, load->head);
        /* The report must not be a part of the next trip. */
        while (load->tail - atomic_load_explicit(&load->out.ring->head, memory_order_acquire) >
               size - load->message)
                __builtin_ia32_pause();
}

/* Sends a message if there is room, and takes what has arrived. */
static void exchange(struct load *load)
{
        uint64_t got;

        if (load->tail - atomic_load_explicit(&load->out.ring->head, memory_order_acquire) + load->message <=
            size) {
                if (load->touch)
                        copy(load->out, load->tail, load->message, 1);
                load->tail += load->message;
                atomic_store_explicit(&load->out.ring->tail, load->tail, memory_order_release);
                wake(load->out, &load->out.ring->receivers);
        }
        got = atomic_load_explicit(&load->in.ring->tail, memory_order_acquire) - load->head;
        got = got < sizeof buffer ? got : sizeof buffer;
        if (got && load->touch)
                copy(load->in, load->head, got, 0);
        load->head += got;
        load->seen += got;
        if (got)
                taken(load->in, load->head);
        else
                __builtin_ia32_pause();
}

static void print_delay(uint64_t seen)
{
        uint64_t kept = seen < TIMES ? seen : TIMES;

        qsort(times, kept, sizeof *times, compare);
        printf("%llu %u %u\n", (unsigned long long)seen, times[kept / 2], times[kept * 99 / 100]);
}

int main(int count, char **arguments)
{
        struct load load = {0};
        uint64_t start, length, present;
        int delay;

        if (count < 9)
                return 2;
        delay = !strcmp(arguments[1], "delay");
        load.message = strtoull(arguments[2], NULL, 10);
        length = (uint64_t)(atof(arguments[3]) * 1e9);
        load.touch = atoi(arguments[4]);
        load.out = map_end(arguments[5], arguments[6], 0);
        load.in = map_end(arguments[7], arguments[8], 1);
        atomic_store(&load.out.ring->start, 1);
        load.tail = load.head = atomic_load(&load.out.ring->tail);
        start = now();
        do {
                if (delay)
                        trip(&load);
                else
                        for (int i = 0; i < BATCH; i++)
                                exchange(&load);
                present = now();
        } while (present - start < length || !load.seen);
        if (delay)
                print_delay(load.seen);
        else
                printf("%llu %.6f\n", (unsigned long long)load.seen, (double)(present - start) / 1e9);
        return 0;
}
