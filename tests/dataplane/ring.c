/* The ring alone: `ring.h` and the waiting of `bells.h`, between two threads, without sockets.
 *
 *      ring stress|hostile SECONDS SEED
 *
 * stress: random sizes, limits and budgets; each byte is compared; a wake-up that is lost is a
 * stall.
 *
 * hostile: the other side writes invalid values into every word between any two steps; nothing
 * outside the ring is used (the pages around it are inaccessible).
 */
#include "../../dataplane/library/bells.h"
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 256 * 1024, PATIENCE = 10 };

/* In the library other files define these. */
struct family *family;
struct process process;
struct settings settings;
uint64_t budget_limit = UINT64_MAX;

static struct view view;
static struct flow sender, receiver;
static sem_t sleeping[2]; /* bell 0: receivers, bell 1: senders */
static _Atomic bool stopped;
static time_t end;

static size_t some_size(uint64_t *random)
{
        switch (any(random, 6)) {
        case 0:
                return 1 + any(random, CHUNK);
        case 1:
                return 1 + any(random, 2 * SMALL_SIZE);
        default:
                return 1 + any(random, 300);
        }
}

static unsigned char byte_at(uint64_t place)
{
        return (unsigned char)((place * UINT64_C(0x9e3779b97f4a7c15)) >> 53);
}

/* As in bells.c, but a bell is a semaphore. */
void ring_bells(struct waiters *waiters, const struct place *unused)
{
        uint64_t woken;

        (void)unused;
        atomic_exchange_explicit(&waiters->any, 0, memory_order_acq_rel);
        woken = atomic_exchange_explicit(&waiters->bells[0], 0, memory_order_acq_rel);
        for (; woken; woken &= woken - 1)
                sem_post(&sleeping[__builtin_ctzll(woken)]);
}

static void sleep_for(int bell)
{
        struct timespec until;

        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += PATIENCE;
        while (sem_timedwait(&sleeping[bell], &until) < 0)
                if (errno != EINTR && !atomic_load(&stopped))
                        FAIL("a wake-up was lost");
}

/* As reclaim.c does for a ring that has been empty for a while. */
static void reclaim(void)
{
        uint64_t edge = atomic_load_explicit(&sender.edge, memory_order_relaxed);

        if (view_remote(&view) || atomic_load_explicit(&view.ring->head, memory_order_acquire) != edge)
                return;
        ring_restart(&sender, &view, edge);
        CHECK(madvise(view_bulk(&view), view_size(&view), MADV_REMOVE) == 0);
        atomic_store(&family->touched, 0);
        atomic_store(&sender.touched, 0);
}

/* Copy between the program's bytes and the ring's, from position `from` on. */
static void copy(unsigned char *bytes, uint64_t from, size_t size, bool into_ring)
{
        struct iovec vec = {bytes, size};
        struct cursor cursor = {.vec = &vec};

        for (size_t done = 0; done < size;) {
                size_t run;
                unsigned char *place = into_ring ? ring_to_put(&sender, &view, from + done, &run)
                                                 : ring_to_take(&view, from + done, &run);

                CHECK(run > 0);
                if (run > size - done)
                        run = size - done;
                cursor_copy(&cursor, place, run, into_ring);
                done += run;
        }
}

static size_t put(const unsigned char *bytes, size_t size, uint64_t limit)
{
        uint64_t tail = atomic_load_explicit(&sender.edge, memory_order_relaxed);
        int64_t space = ring_space(&sender, &view, size, limit);

        if (space == RING_CORRUPT)
                return 0;
        CHECK(space >= 0 && (uint64_t)space <= view_size(&view));
        if (size > (size_t)space)
                size = (size_t)space;
        copy((void *)(uintptr_t)bytes, tail, size, true);
        if (size)
                CHECK(ring_put(&sender, &view, tail, size, clock_stamp()));
        return size;
}

static size_t take(unsigned char *bytes, size_t size)
{
        uint64_t head = atomic_load_explicit(&receiver.edge, memory_order_relaxed);
        int64_t ready = ring_ready(&receiver, &view);

        if (ready == RING_CORRUPT)
                return 0;
        CHECK(ready >= 0 && (uint64_t)ready <= view_size(&view));
        if (size > (size_t)ready)
                size = (size_t)ready;
        copy(bytes, head, size, false);
        if (size)
                CHECK(ring_take(&receiver, &view, head, size));
        return size;
}

/* --- stress */

static void *send_all(void *unused)
{
        unsigned char *bytes = malloc(CHUNK);
        uint64_t place = 0, random = seed;

        (void)unused;
        CHECK(bytes);
        while (time(NULL) < end) {
                size_t size = some_size(&random);
                uint64_t limit = any(&random, 4) ? view_size(&view) : 1 + any(&random, view_size(&view));

                if (any(&random, 64) == 0)
                        budget_limit = any(&random, 2) ? UINT64_MAX : any(&random, RING_SIZE);
                if (any(&random, 64) == 0)
                        reclaim();
                for (size_t i = 0; i < size; i++)
                        bytes[i] = byte_at(place + i);
                for (size_t done = 0; done < size;) {
                        size_t moved = put(bytes + done, size - done, limit);

                        done += moved;
                        if (moved) {
                                wake(&view.ring->receivers, NULL);
                                continue;
                        }
                        wait_begin(&view.ring->senders, 1);
                        /* Any room is enough, but a sender that may not wrap around waits until the
                         * ring is empty. */
                        if (atomic_load_explicit(&view.ring->head, memory_order_acquire) ==
                            atomic_load_explicit(&sender.edge, memory_order_relaxed))
                                wait_end(&view.ring->senders, 1);
                        else
                                sleep_for(1);
                }
                place += size;
        }
        atomic_store(&stopped, true);
        atomic_store_explicit(&view.ring->end, place + 1, memory_order_release);
        wake(&view.ring->receivers, NULL);
        free(bytes);
        return NULL;
}

static uint64_t receive_all(void)
{
        unsigned char *bytes = malloc(CHUNK);
        uint64_t place = 0, random = ~seed;

        CHECK(bytes);
        for (;;) {
                uint64_t over = atomic_load_explicit(&view.ring->end, memory_order_acquire);
                size_t moved = take(bytes, some_size(&random));

                for (size_t i = 0; i < moved; i++)
                        if (bytes[i] != byte_at(place + i)) {
                                fprintf(stderr, "byte %llu\n", (unsigned long long)(place + i));
                                FAIL("a byte is wrong");
                        }
                place += moved;
                if (moved) {
                        wake(&view.ring->senders, NULL);
                        continue;
                }
                if (over) {
                        CHECK(over - 1 == place);
                        break;
                }
                wait_begin(&view.ring->receivers, 0);
                if (atomic_load_explicit(&view.ring->tail, memory_order_acquire) != place ||
                    atomic_load_explicit(&view.ring->end, memory_order_acquire))
                        wait_end(&view.ring->receivers, 0);
                else
                        sleep_for(0);
        }
        free(bytes);
        return place;
}

static void stress(void)
{
        pthread_t thread;
        uint64_t bytes;

        CHECK(pthread_create(&thread, NULL, send_all, NULL) == 0);
        bytes = receive_all();
        CHECK(pthread_join(thread, NULL) == 0);
        printf("bytes %llu\n", (unsigned long long)bytes);
}

/* --- hostile */

static void spoil(uint64_t *random)
{
        _Atomic uint64_t *words[] = {&view.ring->tail, &view.ring->base,  &view.ring->head,
                                     &view.ring->end,  &view.ring->start, &view.ring->incarnation};
        uint64_t value;

        switch (any(random, 4)) {
        case 0:
                value = any(random, UINT64_MAX);
                break;
        case 1:
                value = atomic_load(&sender.edge) + any(random, 2 * view_size(&view)) - view_size(&view);
                break;
        case 2:
                value = atomic_load(&receiver.edge) + any(random, 2 * view_size(&view)) - view_size(&view);
                break;
        default:
                value = UINT64_MAX - any(random, 5000);
        }
        atomic_store(words[any(random, sizeof words / sizeof *words)], value);
}

static void hostile(void)
{
        unsigned char *bytes = calloc(1, CHUNK);
        uint64_t random = seed, moved[2] = {0};

        CHECK(bytes);
        while (time(NULL) < end)
                for (int i = 0; i < 1000; i++) {
                        if (any(&random, 2))
                                spoil(&random);
                        moved[0] += put(bytes, some_size(&random), view_size(&view));
                        if (any(&random, 2))
                                spoil(&random);
                        moved[1] += take(bytes, some_size(&random));
                        if (any(&random, 100) == 0) {
                                /* As for a new connection. */
                                uint64_t where = any(&random, UINT64_MAX);

                                memset((void *)&sender, 0, sizeof sender);
                                memset((void *)&receiver, 0, sizeof receiver);
                                atomic_store(&sender.edge, where);
                                atomic_store(&receiver.edge, where);
                                atomic_store(&view.ring->tail, where);
                                atomic_store(&view.ring->head, where);
                        }
                }
        free(bytes);
        CHECK(moved[0] && moved[1]);
        printf("put %llu took %llu\n", (unsigned long long)moved[0], (unsigned long long)moved[1]);
}

/* Memory between two inaccessible pages. */
static unsigned char *fenced(size_t size)
{
        unsigned char *place = mmap(NULL, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(place != MAP_FAILED);
        CHECK(mmap(place + PAGE, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1,
                   0) != MAP_FAILED);
        return place + PAGE;
}

int main(int count, char **arguments)
{
        uint32_t shift;

        if (count != 4)
                return 2;
        end = time(NULL) + atoi(arguments[2]);
        seed = strtoull(arguments[3], NULL, 0);
        family = (struct family *)fenced(sizeof *family);
        /* The ring of two processes of a host, or of a process and the relay. */
        shift = seed & 1 ? 16 + (uint32_t)(seed >> 1) % 6 : RING_SHIFT;
        view = view_of((struct ring *)(void *)fenced(PAGE), fenced((size_t)1 << shift), shift);
        settings.ring_limit = RING_SIZE;
        sem_init(&sleeping[0], 0, 0);
        sem_init(&sleeping[1], 0, 0);
        if (strcmp(arguments[1], "stress") == 0)
                stress();
        else
                hostile();
        return 0;
}
