/* One end of a connection, with the library's use of a remote ring, for tests and measurements of
 * the relay. It sends bytes that follow from their position in direction 0, checks those of
 * direction 1, and waits with bells.
 *
 *      end ARENA SLOT RING BELL WAIT_RECEIVE WAIT_SEND [KEY=VALUE...]
 *
 * ARENA, BELL and WAIT_* are descriptors. BELL rings the relay; WAIT_* are the receiving ends of
 * bells 0 and 1 of side 0, or of others (`first`) for further ends in one arena. The output is one
 * line of JSON:
 *
 *      sent, received     bytes
 *      broken, end, over  of the ring that it receives
 *      stopped            1: it had to stop, and has ended its ring
 *
 * The exit code is 0, 3 if a byte was wrong, and 4 if nothing happened for `patience`.
 */
#include "../../dataplane/library/layout.h"
#include "../../dataplane/library/stamp.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct {
        uint64_t send, receive, message, seed, peer_seed, spin, patience, pace, rounds, first, stop_at,
            linger, die_at;
        uint64_t check, server, ends, waits_over, at_once, no_bell;
} option = {.message = 4096, .seed = 1, .peer_seed = 2, .patience = 10000, .check = 1, .ends = 1};

static const struct {
        const char *name;
        uint64_t *value;
} options[] = {
    {"send", &option.send},           /* bytes */
    {"receive", &option.receive},     /* bytes; 0: until the end */
    {"message", &option.message},     /* bytes of one write, and of one read */
    {"seed", &option.seed},           /* of the bytes that it sends */
    {"peer_seed", &option.peer_seed}, /* of the bytes that it receives */
    {"spin", &option.spin},           /* us before a sleep */
    {"patience", &option.patience},   /* ms */
    {"pace", &option.pace},           /* us: the longest sleep after about every eighth message */
    {"rounds", &option.rounds},       /* round trips of `message` bytes instead of streams */
    {"server", &option.server},       /* 1: answer the peer's round trips */
    {"first", &option.first},         /* number of its first bell */
    {"check", &option.check},         /* 0: do not check the bytes */
    {"ends", &option.ends},           /* 0: do not end the ring, as a killed process */
    {"stop_at", &option.stop_at},     /* received bytes after which it sets `stop` */
    {"linger", &option.linger},       /* ms before it exits */
    {"die_at", &option.die_at},       /* sent bytes after which it dies in the middle of a write */
    {"waits_over", &option.waits_over},
    {"no_bell", &option.no_bell}, /* never ring the relay */
    {"at_once", &option.at_once}, /* do not wait for `ready` before sending, as a hostile process */
};

static struct arena *arena;
static struct ring *out, *in;
static unsigned char *out_bulk, *in_bulk;
static uint32_t slot, size;
static int relay_bell, bells[2];
static _Atomic uint64_t sent, received;
static _Atomic uint32_t broken, stopped, wrong, stuck;

static uint64_t now(void)
{
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t mixed(uint64_t x)
{
        x ^= x >> 33;
        x *= UINT64_C(0xff51afd7ed558ccd);
        x ^= x >> 33;
        return x;
}

static unsigned char byte_at(uint64_t seed, uint64_t position)
{
        return (unsigned char)(mixed(seed + position / 8 * 0x9e3779b97f4a7c15u) >> (position % 8 * 8));
}

static unsigned char *at(struct ring *ring, unsigned char *bulk, uint64_t offset, size_t *run)
{
        offset &= size - 1;
        if (offset < SMALL_SIZE) {
                *run = SMALL_SIZE - offset;
                return (unsigned char *)ring + RING_HEADER + offset;
        }
        *run = size - offset;
        return bulk + offset;
}

static void ring_relay(struct waiters *waiters)
{
        atomic_exchange(&waiters->any, 0);
        if (!(atomic_exchange(&waiters->bells[0], 0) & 1))
                return;
        atomic_fetch_or(&arena->sides[1].dirty[0], UINT64_C(1) << slot);
        if (!option.no_bell && send(relay_bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EAGAIN)
                atomic_store(&broken, 1);
}

static void wake(struct waiters *waiters)
{
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&waiters->any, memory_order_relaxed))
                ring_relay(waiters);
}

static bool has_bytes(uint64_t head)
{
        return atomic_load_explicit(&in->tail, memory_order_acquire) != head || atomic_load(&in->end) ||
               atomic_load(&in->over) || atomic_load(&in->broken);
}

static bool has_room(uint64_t tail)
{
        return tail - atomic_load_explicit(&out->head, memory_order_acquire) <= size / 3 * 2 ||
               atomic_load(&out->broken) || atomic_load(&out->stop);
}

static bool is_ready(uint64_t unused)
{
        (void)unused;
        return atomic_load_explicit(&out->ready, memory_order_acquire) || atomic_load(&out->broken) ||
               option.at_once || atomic_load(&out->stop);
}

/* As the library's wait_for(). False: nothing has happened for `patience`. */
static bool wait_until(bool (*there)(uint64_t), uint64_t position, struct waiters *waiters, unsigned which)
{
        unsigned bell = (unsigned)option.first + which;
        uint64_t start = now();
        uint32_t core =
            waiters == &out->senders ? atomic_load(&out->receiver_cpu) : atomic_load(&in->sender_cpu);
        bool found = false;

        if (option.spin && core && core != (uint32_t)sched_getcpu() + 1)
                while (now() - start < option.spin * 1000 && !(found = there(position)))
                        for (int i = 0; i < 8 && !(found = there(position)); i++)
                                __builtin_ia32_pause();
        while (!found) {
                struct pollfd polled = {.fd = bells[which], .events = POLLIN};
                bool known;
                char bytes[64];

                if (waiters == &out->senders)
                        atomic_store(&out->room, size / 3 * 2 + 1);
                atomic_fetch_or(&waiters->bells[bell / 64], UINT64_C(1) << (bell % 64));
                atomic_store(&waiters->any, 1);
                atomic_thread_fence(memory_order_seq_cst);
                if (there(position))
                        break;
                if (now() - start > option.patience * 1000000) {
                        atomic_store(&stuck, 1);
                        return false;
                }
                /* No bell follows `ready`: the library checks it at its next call. */
                known = atomic_load(&arena->sides[0].known[bell / 64]) >> (bell % 64) & 1;
                if (poll(&polled, 1, known && there != is_ready ? 1000 : 2) > 0)
                        while (recv(polled.fd, bytes, sizeof bytes, MSG_DONTWAIT) == (ssize_t)sizeof bytes)
                                ;
        }
        atomic_fetch_and(&waiters->bells[bell / 64], ~(UINT64_C(1) << (bell % 64)));
        return true;
}

static void nap(uint64_t *dice)
{
        struct timespec time = {0};

        *dice = mixed(*dice + 1);
        if (!option.pace || *dice % 8)
                return;
        time.tv_nsec = (long)(*dice / 8 % (option.pace * 1000));
        nanosleep(&time, NULL);
}

static void end_ring(uint64_t tail)
{
        atomic_store(&out->stamp, clock_stamp());
        atomic_store_explicit(&out->end, tail + 1, memory_order_release);
        wake(&out->receivers);
}

/* Writes `want` bytes, or fewer if it has to stop or the ring is broken. */
static uint64_t put(uint64_t tail, uint64_t want)
{
        static _Thread_local uint64_t base;
        uint64_t done = 0;

        while (done < want) {
                uint64_t used = tail + done - atomic_load_explicit(&out->head, memory_order_acquire);
                uint64_t piece = want - done;

                if (used > size) {
                        atomic_store(&wrong, 1);
                        return done;
                }
                if (atomic_load(&out->broken)) {
                        atomic_store(&broken, 1);
                        return done;
                }
                atomic_store_explicit(&out->busy, 1, memory_order_relaxed);
                atomic_signal_fence(memory_order_seq_cst);
                if (atomic_load_explicit(&out->stop, memory_order_relaxed)) {
                        atomic_store_explicit(&out->busy, 0, memory_order_release);
                        atomic_store(&stopped, 1);
                        return done;
                }
                piece = piece < size - used ? piece : size - used;
                piece = piece < 131072 ? piece : 131072;
                if (!used && base != tail + done && want - done <= SMALL_SIZE) {
                        base = tail + done;
                        atomic_store_explicit(&out->base, base, memory_order_relaxed);
                }
                for (uint64_t put_now = 0; put_now < piece;) {
                        uint64_t position = tail + done + put_now;
                        size_t run;
                        unsigned char *place = at(out, out_bulk, position - base, &run);

                        run = run < piece - put_now ? run : piece - put_now;
                        if (option.check)
                                for (size_t i = 0; i < run; i++)
                                        place[i] = byte_at(option.seed, position + i);
                        else
                                memset(place, (int)position, run);
                        put_now += run;
                        if (option.die_at && position + run >= option.die_at)
                                _exit(9);
                }
                if (piece) {
                        if (!used)
                                atomic_store(&out->stamp, clock_stamp());
                        done += piece;
                        atomic_store_explicit(&out->tail, tail + done, memory_order_release);
                }
                atomic_store_explicit(&out->busy, 0, memory_order_release);
                if (piece)
                        wake(&out->receivers);
                else if (!wait_until(has_room, tail + done, &out->senders, 1))
                        return done;
        }
        return done;
}

static void *sender(void *unused)
{
        uint64_t dice = option.seed, tail = 0;

        if (wait_until(is_ready, 0, &out->senders, 1)) {
                atomic_store_explicit(&out->start, 1, memory_order_release);
                while (tail < option.send) {
                        uint64_t want =
                            option.pace ? 1 + mixed(dice + tail) % option.message : option.message;
                        uint64_t got;

                        want = want < option.send - tail ? want : option.send - tail;
                        got = put(tail, want);
                        tail += got;
                        atomic_store(&sent, tail);
                        if (got < want)
                                break;
                        nap(&dice);
                }
        }
        if (option.ends || atomic_load(&stopped))
                end_ring(tail);
        return unused;
}

/* Reads up to `want` bytes, at least one; 0: the end. */
static uint64_t take(uint64_t head, uint64_t want, bool spin_only)
{
        static _Thread_local unsigned char sink[1 << 20];
        uint64_t ready, done = 0;

        (void)spin_only;
        for (;;) {
                uint64_t over = atomic_load(&in->over), end = atomic_load(&in->end),
                         lost = atomic_load(&in->broken);

                ready = atomic_load_explicit(&in->tail, memory_order_acquire) - head;
                if (ready > size) {
                        atomic_store(&wrong, 1);
                        return 0;
                }
                if (ready)
                        break;
                if (lost)
                        atomic_store(&broken, 1);
                if (lost || (end && (!option.waits_over || over)) || over) {
                        if (end && end - 1 != head)
                                atomic_store(&wrong, 1);
                        return 0;
                }
                if (!wait_until(has_bytes, head, &in->receivers, 0))
                        return 0;
        }
        ready = ready < want ? ready : want;
        ready = ready < sizeof sink ? ready : sizeof sink;
        while (done < ready) {
                size_t run;
                const unsigned char *place = at(
                    in, in_bulk, head + done - atomic_load_explicit(&in->base, memory_order_relaxed), &run);

                run = run < ready - done ? run : ready - done;
                memcpy(sink + done, place, run);
                done += run;
        }
        if (option.check)
                for (uint64_t i = 0; i < done; i++)
                        if (sink[i] != byte_at(option.peer_seed, head + i)) {
                                fprintf(stderr, "byte %llu is wrong\n", (unsigned long long)(head + i));
                                atomic_store(&wrong, 1);
                                return 0;
                        }
        atomic_store_explicit(&in->head, head + done, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&in->senders.any, memory_order_relaxed) &&
            atomic_load(&in->tail) - (head + done) < atomic_load(&in->room))
                ring_relay(&in->senders);
        return done;
}

static void *receiver(void *unused)
{
        uint64_t dice = option.peer_seed, head = 0;

        while (!option.receive || head < option.receive) {
                uint64_t got = take(head, option.message, false);

                if (!got)
                        break;
                head += got;
                atomic_store(&received, head);
                if (option.stop_at && head >= option.stop_at) {
                        option.stop_at = 0;
                        atomic_store(&in->stop, STOP_REQUESTED);
                        wake(&in->senders);
                }
                nap(&dice);
        }
        return unused;
}

static int compare(const void *a, const void *b)
{
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

        return x < y ? -1 : x > y;
}

static void trips(void)
{
        uint64_t tail = 0, head = 0, *times = calloc(option.rounds + 1, sizeof *times);

        wait_until(is_ready, 0, &out->senders, 1);
        atomic_store_explicit(&out->start, 1, memory_order_release);
        for (uint64_t i = 0; i < option.rounds && times; i++) {
                uint64_t begin = now(), want = head + option.message;

                if (!option.server)
                        tail += put(tail, option.message);
                while (head < want) {
                        uint64_t got = take(head, want - head, true);

                        if (!got)
                                return;
                        head += got;
                }
                if (option.server)
                        tail += put(tail, option.message);
                times[i] = now() - begin;
        }
        atomic_store(&sent, tail);
        atomic_store(&received, head);
        if (times) {
                qsort(times, option.rounds, sizeof *times, compare);
                fprintf(stderr, "%llu %llu\n", (unsigned long long)times[option.rounds / 2],
                        (unsigned long long)times[option.rounds * 99 / 100]);
        }
        free(times);
        end_ring(tail);
}

int main(int count, char **arguments)
{
        pthread_t threads[2];
        uint64_t begin = now();
        int memory;
        size_t whole;

        if (count < 7)
                return 2;
        memory = atoi(arguments[1]);
        slot = (uint32_t)atoi(arguments[2]);
        size = (uint32_t)atoi(arguments[3]);
        relay_bell = atoi(arguments[4]);
        bells[0] = atoi(arguments[5]);
        bells[1] = atoi(arguments[6]);
        for (int i = 7; i < count; i++)
                for (size_t o = 0; o < sizeof options / sizeof *options; o++) {
                        size_t length = strlen(options[o].name);

                        if (!strncmp(arguments[i], options[o].name, length) && arguments[i][length] == '=')
                                *options[o].value = strtoull(arguments[i] + length + 1, NULL, 10);
                }
        whole = arena_size(size);
        arena = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
        if (arena == MAP_FAILED)
                return 2;
        out = (struct ring *)((char *)arena + SLOT_OFFSET + (size_t)slot * SIDES * PAGE);
        in = (struct ring *)((char *)out + PAGE);
        out_bulk = (unsigned char *)arena + BULK_OFFSET + (size_t)slot * SIDES * size;
        in_bulk = out_bulk + size;
        if (!option.no_bell)
                atomic_fetch_or(&arena->sides[1].known[0], 1);
        atomic_store_explicit(&in->ready, 1, memory_order_release);
        wake(&in->senders);
        if (option.rounds) {
                trips();
        } else {
                pthread_create(&threads[0], NULL, sender, NULL);
                pthread_create(&threads[1], NULL, receiver, NULL);
                pthread_join(threads[0], NULL);
                pthread_join(threads[1], NULL);
        }
        printf("{\"sent\": %llu, \"received\": %llu, \"broken\": %u, \"stopped\": %u, \"end\": %llu, "
               "\"over\": %u, "
               "\"seconds\": %.6f}\n",
               (unsigned long long)sent, (unsigned long long)received, broken, stopped,
               (unsigned long long)atomic_load(&in->end), atomic_load(&in->over),
               (double)(now() - begin) / 1e9);
        fflush(stdout);
        usleep((useconds_t)option.linger * 1000);
        return wrong ? 3 : stuck ? 4 : 0;
}
