/* A router and its relays in one process, for the library's tests: every connection that two
 * processes ask for gets a slot in an arena of each of them, and what one side puts into its ring
 * is copied into the other's, as late as the test wants it and in the order that the relays
 * promise, and no better.
 *
 *      relay SOCKET CONTROL [NAME VALUE]...
 *
 * SOCKET is where libraries find it, CONTROL where tests give orders, one a packet, each answered
 * when it is done: `NAME VALUE` for the settings below, `hold` and `go`, `break` (the relays give
 * all connections up), `sever` (a router does, whose relay has died), `spoil` (words of all arenas
 * become nonsense), `list`, `die`.
 */
#include "../../dataplane/library/layout.h"
#include "../../dataplane/library/protocol.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
        PROCESSES = 1024,
        ARENAS = 4096,
        CONNECTIONS = 4096,
        WAITING = 4096,
        MARKS = 64,
        SPIN = 50 * 1000,           /* ns without work, after which it sleeps */
        LEAVING = 20 * 1000 * 1000, /* ns: see stop_sender() in fallback.c */
        ORPHANS = 20 * 1000 * 1000, /* ns between checks for sockets whose process has exited */
};

/* What a test may set, in microseconds except `ring` and the switches. */
static struct {
        const char *name;
        uint64_t value;
} settings[] = {
    {"ring", 256 * 1024}, /* bytes */
    {"delay", 0},         /* of every event */
    {"jitter", 0},        /* 1: each delay is random, up to the given one */
    {"start", 0},         /* more for `start` and `ready` */
    {"end", 0},           /* more for `end` */
    {"over", 0},          /* more for `over` */
    {"stopped", 0},       /* more for `stopped` */
    {"spin", 1},          /* reports its core, and spins for a moment */
    {"blind", 0},         /* 1: never announces its bell */
    {"lies", 0},          /* 1: arenas claim not to be remote; 2: to have larger rings */
};

enum setting {
        RING_BYTES,
        DELAY,
        JITTER,
        START_DELAY,
        END_DELAY,
        OVER_DELAY,
        STOPPED_DELAY,
        DOES_SPIN,
        BLIND,
        LIES,
};

struct process {
        int fd;         /* 0: free */
        int table;      /* its /proc/net/tcp */
        uint32_t arena; /* 1 + the one with free slots */
};

struct relayed {
        uint64_t id, token; /* 0: free */
        uint32_t process;
        int memory, bell, given; /* the receiving end of the relay's bell, and the end that processes get */
        bool rung;               /* its process has bell 0 and the sending end of the relay's */
        unsigned char *base;
        uint32_t ring;
        int bells[BELLS]; /* 1 + descriptor */
        uint64_t free;    /* slots */
        bool retired;
};

/* The state of a ring at some moment, to be applied later. */
struct mark {
        uint64_t due, tail, base, start, end;
};

struct end {
        uint32_t arena, slot;
        uint64_t incarnation;
        struct address local, remote;
        bool released, orphan;
};

struct way {
        struct mark marks[MARKS];
        uint32_t first, count;
        uint64_t seen, seen_start, seen_end; /* sampled */
        uint64_t tail, start, end;           /* applied; the number of `end` counts when it is due */
        uint64_t received_due;
        uint64_t end_due, ready_due, over_due, stop_seen, stopped_due;
        bool over, stopped;
};

struct connection {
        bool used, broken;
        struct end ends[2];
        struct way ways[2]; /* from that end */
};

struct waiting {
        uint32_t process, connection; /* process: 1 + number, 0: free */
        struct request request;
};

static struct process processes[PROCESSES];
static struct relayed arenas[ARENAS];
static struct connection connections[CONNECTIONS];
static struct waiting waiting[WAITING];
static uint32_t arenas_used, connections_used, processes_used;
static uint64_t numbers = 1, dice = 88172645463325252;
static bool held;
static uint64_t looked;

static uint64_t now(void)
{
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static uint64_t stamp(void)
{
#if defined(__x86_64__)
        return __builtin_ia32_rdtsc();
#else
        uint64_t count;

        __asm__ volatile("mrs %0, cntvct_el0" : "=r"(count));
        return count;
#endif
}

static uint64_t any(uint64_t below)
{
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        return below ? dice % below : 0;
}

static void check(bool condition, const char *what)
{
        if (condition)
                return;
        perror(what);
        exit(1);
}

static uint64_t set_to(enum setting setting)
{
        return settings[setting].value;
}

/* When a change that was seen now is due. */
static uint64_t due(uint64_t present, enum setting more)
{
        uint64_t delay = set_to(DELAY) + (more == DELAY ? 0 : set_to(more));

        return present + (set_to(JITTER) ? any(delay + 1) : delay) * 1000;
}

static struct ring *ring_of(const struct end *end, int direction)
{
        return (struct ring *)(void *)(arenas[end->arena].base + SLOT_OFFSET +
                                       (size_t)(end->slot * SIDES + (uint32_t)direction) * PAGE);
}

static unsigned char *byte_of(const struct end *end, int direction, uint64_t offset, uint64_t *run)
{
        const struct relayed *arena = &arenas[end->arena];

        offset &= arena->ring - 1;
        if (offset < SMALL_SIZE) {
                *run = SMALL_SIZE - offset;
                return (unsigned char *)ring_of(end, direction) + RING_HEADER + offset;
        }
        *run = arena->ring - offset;
        return arena->base + BULK_OFFSET + (size_t)(end->slot * SIDES + (uint32_t)direction) * arena->ring +
               offset;
}

/* --- bells */

static void ring_bells(const struct end *end, struct waiters *waiters)
{
        struct relayed *arena = &arenas[end->arena];
        struct side *theirs = &((struct arena *)(void *)arena->base)->sides[0];

        atomic_thread_fence(memory_order_seq_cst);
        if (!atomic_load_explicit(&waiters->any, memory_order_relaxed))
                return;
        atomic_exchange(&waiters->any, 0);
        for (int word = 0; word < BELL_WORDS; word++)
                for (uint64_t bits = atomic_exchange(&waiters->bells[word], 0); bits; bits &= bits - 1) {
                        int bell = word * 64 + __builtin_ctzll(bits);

                        atomic_fetch_or(&theirs->dirty[bell], UINT64_C(1) << end->slot);
                        if (arena->bells[bell])
                                send(arena->bells[bell] - 1, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
                }
}

static void listen_to(struct waiters *waiters)
{
        atomic_fetch_or(&waiters->bells[0], 1);
        atomic_store(&waiters->any, 1);
}

/* --- arenas */

static uint32_t make_arena(uint32_t process)
{
        uint32_t number = 0, ring = (uint32_t)set_to(RING_BYTES);
        struct relayed *made;
        struct arena *header;
        int pair[2];

        while (number < ARENAS && arenas[number].id)
                number++;
        check(number < ARENAS, "arenas");
        if (number >= arenas_used)
                arenas_used = number + 1;
        made = &arenas[number];
        memset(made, 0, sizeof *made);
        made->id = numbers++ << 20 | (uint64_t)getpid();
        made->token = numbers++ << 8 | 7;
        made->process = process;
        made->ring = ring;
        made->free = UINT64_MAX;
        made->memory = memfd_create("relayed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        check(made->memory >= 0 && ftruncate(made->memory, (off_t)arena_size(ring)) == 0, "memfd");
        made->base = mmap(NULL, arena_size(ring), PROT_READ | PROT_WRITE, MAP_SHARED, made->memory, 0);
        check(made->base != MAP_FAILED, "mmap");
        header = (struct arena *)(void *)made->base;
        header->magic = FREEFLOW_MAGIC;
        header->version = FREEFLOW_VERSION;
        header->size_of_ring = set_to(LIES) == 2 ? ring * 2 : ring;
        header->remote = set_to(LIES) != 1;
        check(fcntl(made->memory, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0, "seals");
        check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0, "bell");
        made->bell = pair[0];
        made->given = pair[1];
        return number;
}

static void drop_arena(uint32_t number)
{
        struct relayed *arena = &arenas[number];

        for (int i = 0; i < BELLS; i++)
                if (arena->bells[i])
                        close(arena->bells[i] - 1);
        close(arena->bell);
        close(arena->given);
        close(arena->memory);
        munmap(arena->base, arena_size(arena->ring));
        if (processes[arena->process].arena == number + 1)
                processes[arena->process].arena = 0;
        arena->id = 0;
}

/* --- the protocol */

static void say(uint32_t process, const void *message, size_t size, int fd, int more)
{
        union {
                struct cmsghdr header;
                char room[CMSG_SPACE(2 * sizeof(int))];
        } control;
        int fds[2] = {fd, more};
        size_t bytes = more < 0 ? sizeof fd : sizeof fds;
        struct iovec vec = {(void *)(uintptr_t)message, size};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};

        if (fd >= 0) {
                memset(&control, 0, sizeof control);
                control.header.cmsg_level = SOL_SOCKET;
                control.header.cmsg_type = SCM_RIGHTS;
                control.header.cmsg_len = CMSG_LEN(bytes);
                memcpy(CMSG_DATA(&control.header), fds, bytes);
                header.msg_control = &control;
                header.msg_controllen = CMSG_SPACE(bytes);
        }
        /* A process that does not read gets no message. */
        sendmsg(processes[process].fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void welcome(uint32_t process)
{
        struct welcome message = {.message = {WELCOME, sizeof message},
                                  .version = PROTOCOL_VERSION,
                                  .layout_version = FREEFLOW_VERSION,
                                  .enabled = 1,
                                  .operations = 2,
                                  .bulk = 1 << 20,
                                  .spin = 50,
                                  .ring_limit = RING_SIZE};

        say(process, &message, sizeof message, -1, -1);
}

/* Make a bell of side 0; returns its receiving end. */
static int new_bell(struct relayed *arena, uint32_t index)
{
        int pair[2];

        check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0, "bell");
        if (arena->bells[index])
                close(arena->bells[index] - 1);
        arena->bells[index] = pair[1] + 1;
        if (!set_to(BLIND))
                atomic_fetch_or(&((struct arena *)(void *)arena->base)->sides[0].known[index / 64],
                                UINT64_C(1) << index % 64);
        return pair[0];
}

static void give(struct connection *connection, int number, uint32_t process, const struct request *request)
{
        struct end *end = &connection->ends[number];
        uint32_t wanted = processes[process].arena;
        struct relayed *arena;
        struct grant grant = {.message = {GRANT, sizeof grant}};
        struct bell ring = {.message = {RING, sizeof ring}, .side = 1};
        int hears;

        if (!wanted || arenas[wanted - 1].retired || !arenas[wanted - 1].free)
                wanted = processes[process].arena = make_arena(process) + 1;
        arena = &arenas[wanted - 1];
        end->arena = wanted - 1;
        end->slot = (uint32_t)__builtin_ctzll(arena->free);
        arena->free &= arena->free - 1;
        end->incarnation = numbers++;
        end->local = request->local;
        end->remote = request->remote;
        for (int d = 0; d < SIDES; d++) {
                memset((void *)ring_of(end, d), 0, RING_HEADER);
                atomic_store(&ring_of(end, d)->incarnation, end->incarnation);
        }
        grant.connection = request->connection;
        grant.cookie = request->cookie;
        grant.arena = arena->id;
        grant.incarnation = end->incarnation;
        grant.token = arena->token;
        grant.slot = end->slot;
        if (arena->rung) {
                say(process, &grant, sizeof grant, arena->memory, -1);
                return;
        }
        arena->rung = true;
        hears = new_bell(arena, 0);
        say(process, &grant, sizeof grant, arena->memory, hears);
        close(hears);
        ring.arena = arena->id;
        say(process, &ring, sizeof ring, arena->given, -1);
}

static void receive_request(uint32_t process, const struct request *message)
{
        struct waiting *place = NULL;

        for (uint32_t i = 0; i < WAITING; i++) {
                struct waiting *other = &waiting[i];

                if (!other->process) {
                        place = place ? place : other;
                } else if (memcmp(&other->request.local, &message->remote, sizeof message->remote) == 0 &&
                           memcmp(&other->request.remote, &message->local, sizeof message->local) == 0) {
                        uint32_t number = 0;

                        while (number < CONNECTIONS && connections[number].used)
                                number++;
                        check(number < CONNECTIONS, "connections");
                        if (number >= connections_used)
                                connections_used = number + 1;
                        memset(&connections[number], 0, sizeof connections[number]);
                        connections[number].used = true;
                        give(&connections[number], 0, other->process - 1, &other->request);
                        give(&connections[number], 1, process, message);
                        other->process = 0;
                        return;
                }
        }
        check(place != NULL, "waiting");
        place->process = process + 1;
        place->request = *message;
}

static struct relayed *arena_named(uint64_t id, uint64_t token)
{
        for (uint32_t i = 0; i < arenas_used; i++)
                if (arenas[i].id && arenas[i].id == id && arenas[i].token == token)
                        return &arenas[i];
        return NULL;
}

static void make_bell(uint32_t process, const struct bell *message)
{
        struct relayed *arena = arena_named(message->arena, message->token);
        struct bell answer = *message;
        int hears = arena && message->index < BELLS ? new_bell(arena, message->index) : -1;

        answer.message.kind = HEAR;
        answer.token = 0;
        say(process, &answer, sizeof answer, hears, -1);
        if (hears >= 0)
                close(hears);
}

static void fetch(uint32_t process, const struct bell *message)
{
        struct relayed *arena = arena_named(message->arena, message->token);
        struct bell answer = *message;

        answer.message.kind = RING;
        answer.token = 0;
        say(process, &answer, sizeof answer, arena && message->index == 0 ? arena->given : -1, -1);
}

static void release_end(struct end *end)
{
        struct relayed *arena = &arenas[end->arena];
        bool last = true;

        end->released = true;
        end->orphan = false;
        for (uint32_t i = 0; i < connections_used; i++)
                for (int e = 0; e < 2; e++)
                        if (connections[i].used && connections[i].ends[e].arena == end->arena &&
                            !connections[i].ends[e].released)
                                last = false;
        /* The process has unmapped it. */
        if (last)
                arena->retired = true;
}

static void release(const struct release *message)
{
        for (uint32_t i = 0; i < connections_used; i++)
                for (int e = 0; e < 2; e++) {
                        struct end *end = &connections[i].ends[e];

                        if (connections[i].used && end->incarnation == message->incarnation &&
                            arenas[end->arena].id == message->arena && !end->released)
                                release_end(end);
                }
}

static void gone(uint32_t process)
{
        close(processes[process].fd);
        for (uint32_t i = 0; i < WAITING; i++)
                if (waiting[i].process == process + 1)
                        waiting[i].process = 0;
        for (uint32_t a = 0; a < arenas_used; a++) {
                if (!arenas[a].id || arenas[a].process != process)
                        continue;
                arenas[a].retired = true;
                if (arenas[a].free == UINT64_MAX)
                        drop_arena(a);
                for (uint32_t i = 0; i < connections_used && arenas[a].id; i++)
                        for (int e = 0; e < 2; e++)
                                if (connections[i].used && connections[i].ends[e].arena == a &&
                                    !connections[i].ends[e].released)
                                        connections[i].ends[e].orphan = true;
        }
        /* Another process may still have one of its sockets: check the table at once. */
        processes[process].fd = -1;
        looked = 0;
}

static void hear(uint32_t process)
{
        union {
                struct message message;
                struct request request;
                struct bell bell;
                struct release release;
                char bytes[512];
        } buffer;
        struct iovec vec = {&buffer, sizeof buffer};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};
        ssize_t got = recvmsg(processes[process].fd, &header, MSG_DONTWAIT);

        if (got < 0 && errno == EAGAIN)
                return;
        if (got <= 0) {
                gone(process);
                return;
        }
        check(!(header.msg_flags & MSG_CTRUNC), "a descriptor");
        switch (buffer.message.kind) {
        case HELLO:
                welcome(process);
                break;
        case REQUEST:
                receive_request(process, &buffer.request);
                break;
        case BELL:
                make_bell(process, &buffer.bell);
                break;
        case FETCH:
                fetch(process, &buffer.bell);
                break;
        case RELEASE:
                release(&buffer.release);
                break;
        default:
                break;
        }
}

static void greet(int listener)
{
        struct ucred who;
        socklen_t size = sizeof who;
        uint32_t number = 0;
        char path[64];
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd < 0)
                return;
        while (number < PROCESSES && processes[number].fd)
                number++;
        check(number < PROCESSES, "processes");
        if (number >= processes_used)
                processes_used = number + 1;
        check(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) == 0, "SO_PEERCRED");
        snprintf(path, sizeof path, "/proc/%d/net/tcp", who.pid);
        processes[number] = (struct process){.fd = fd, .table = open(path, O_RDONLY | O_CLOEXEC)};
}

/* --- sockets whose process has exited */

static char table[4 << 20];

static void read_table(const struct process *process)
{
        size_t size = 0;
        ssize_t got;

        if (process->table >= 0 && lseek(process->table, 0, SEEK_SET) == 0)
                while ((got = read(process->table, table + size, sizeof table - 1 - size)) > 0)
                        size += (size_t)got;
        table[size] = 0;
}

/* Whether a process has the socket open: only then it has an inode in the table. */
static bool is_open(const struct end *end)
{
        uint32_t local, remote;
        char wanted[64];
        const char *line;
        unsigned long inode = 0;

        memcpy(&local, end->local.bytes, 4);
        memcpy(&remote, end->remote.bytes, 4);
        snprintf(wanted, sizeof wanted, "%08X:%04X %08X:%04X", local, end->local.port, remote,
                 end->remote.port);
        line = strstr(table, wanted);
        /* state, queues, timer, retransmits, uid, timeout, inode */
        return line && sscanf(line + strlen(wanted), "%*s %*s %*s %*s %*s %*s %lu", &inode) == 1 && inode;
}

static void look_at_orphans(uint64_t present)
{
        if (present - looked < ORPHANS)
                return;
        looked = present;
        for (uint32_t p = 0; p < processes_used; p++) {
                bool needed = false, read = false;

                if (processes[p].fd != -1)
                        continue;
                for (uint32_t i = 0; i < connections_used; i++)
                        for (int e = 0; e < 2; e++) {
                                struct end *end = &connections[i].ends[e];

                                if (!connections[i].used || !end->orphan || arenas[end->arena].process != p)
                                        continue;
                                if (!read)
                                        read_table(&processes[p]);
                                read = true;
                                if (!is_open(end))
                                        release_end(end);
                        }
                for (uint32_t a = 0; a < arenas_used; a++)
                        needed = needed || (arenas[a].id && arenas[a].process == p);
                if (needed)
                        continue;
                if (processes[p].table >= 0)
                        close(processes[p].table);
                processes[p].fd = 0;
        }
}

/* --- moving bytes */

static void give_up(struct connection *connection)
{
        connection->broken = true;
        for (int e = 0; e < 2; e++)
                for (int d = 0; d < SIDES; d++)
                        atomic_store(&ring_of(&connection->ends[e], d)->broken, 1);
        for (int e = 0; e < 2; e++)
                for (int d = 0; d < SIDES; d++) {
                        ring_bells(&connection->ends[e], &ring_of(&connection->ends[e], d)->receivers);
                        ring_bells(&connection->ends[e], &ring_of(&connection->ends[e], d)->senders);
                }
}

/* As a router does, which does not know who waits. */
static void sever(void)
{
        for (uint32_t i = 0; i < connections_used; i++)
                for (int e = 0; e < 2 && connections[i].used; e++) {
                        connections[i].broken = true;
                        for (int d = 0; d < SIDES; d++)
                                atomic_store(&ring_of(&connections[i].ends[e], d)->broken, 1);
                }
        for (uint32_t a = 0; a < arenas_used; a++)
                for (int bell = 0; bell < BELLS && arenas[a].id; bell++) {
                        struct side *side = &((struct arena *)(void *)arenas[a].base)->sides[0];

                        if (!arenas[a].bells[bell])
                                continue;
                        atomic_store(&side->dirty[bell], UINT64_MAX);
                        send(arenas[a].bells[bell] - 1, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
                }
}

static bool sample(struct way *way, const struct end *from, uint64_t present)
{
        struct ring *ring = ring_of(from, 0);
        /* In this order: whatever was written before `end` and `tail` is visible once they are. */
        uint64_t end = atomic_load(&ring->end), tail = atomic_load(&ring->tail),
                 start = atomic_load(&ring->start);
        struct mark *mark;

        if ((tail == way->seen && start == way->seen_start && end == way->seen_end) || way->count == MARKS)
                return false;
        mark = &way->marks[(way->first + way->count++) % MARKS];
        *mark = (struct mark){.due = due(present, DELAY),
                              .tail = tail,
                              .base = atomic_load(&ring->base),
                              .start = start,
                              .end = end};
        if (start != way->seen_start)
                mark->due = due(present, START_DELAY);
        way->seen = tail;
        way->seen_start = start;
        way->seen_end = end;
        return true;
}

/* False: the values are corrupt. */
static bool apply(struct way *way, const struct end *from, const struct end *to, const struct mark *mark)
{
        struct ring *ring = ring_of(to, 1);
        uint64_t place = way->tail, size = arenas[to->arena].ring;

        if (mark->tail - atomic_load(&ring->head) > size || mark->tail < place)
                return false;
        while (place < mark->tail) {
                uint64_t run, ours;
                const unsigned char *source = byte_of(from, 0, place - mark->base, &run);
                unsigned char *target = byte_of(to, 1, place - mark->base, &ours);

                run = run < mark->tail - place ? run : mark->tail - place;
                memcpy(target, source, run < ours ? run : ours);
                place += run < ours ? run : ours;
        }
        if (mark->tail != way->tail) {
                if (atomic_load(&ring->head) == way->tail)
                        atomic_store(&ring->stamp, stamp());
                atomic_store(&ring->base, mark->base);
        }
        atomic_store(&ring->start, mark->start);
        atomic_store(&ring->sender_cpu, set_to(DOES_SPIN) ? (uint32_t)sched_getcpu() + 1 : 0);
        atomic_store(&ring->tail, mark->tail);
        way->tail = mark->tail;
        return true;
}

/* Returns whether it has done anything. */
static bool carry(struct connection *connection, int e, uint64_t present, uint64_t *next)
{
        struct way *way = &connection->ways[e];
        struct end *from = &connection->ends[e], *to = &connection->ends[1 - e];
        struct ring *source = ring_of(from, 0), *target = ring_of(to, 1);
        uint64_t head = atomic_load(&target->head), used;
        bool busy = sample(way, from, present), wakes = false;

#define LATER(time)                                                                                          \
        do {                                                                                                 \
                if ((time) < *next)                                                                          \
                        *next = (time);                                                                      \
        } while (0)
        while (way->count && way->marks[way->first].due <= present) {
                struct mark *mark = &way->marks[way->first];

                if (!apply(way, from, to, mark)) {
                        give_up(connection);
                        return true;
                }
                if (mark->end && !way->end) {
                        way->end = mark->end;
                        way->end_due = due(present, END_DELAY) - set_to(DELAY) * 1000;
                }
                way->first = (way->first + 1) % MARKS;
                way->count--;
                busy = wakes = true;
        }
        if (way->count)
                LATER(way->marks[way->first].due);
        if (way->end && way->end_due) {
                if (way->end_due <= present) {
                        atomic_store(&target->end, way->end);
                        way->end_due = 0;
                        busy = wakes = true;
                } else {
                        LATER(way->end_due);
                }
        }
        if (from->released && !way->over && !way->count && !busy) {
                if (!way->over_due)
                        way->over_due = due(present, OVER_DELAY);
                if (way->over_due <= present) {
                        atomic_store(&target->over, 1);
                        way->over = busy = wakes = true;
                } else {
                        LATER(way->over_due);
                }
        }
        /* What the receiver writes goes in the other direction. */
        if (atomic_load(&target->ready) && !atomic_load(&source->ready)) {
                if (!way->ready_due)
                        way->ready_due = due(present, START_DELAY);
                if (way->ready_due <= present) {
                        atomic_store(&source->ready, 1);
                        busy = true;
                } else {
                        LATER(way->ready_due);
                }
        }
        if (way->tail && !atomic_load(&source->received)) {
                if (!way->received_due)
                        way->received_due = due(present, DELAY);
                if (way->received_due <= present)
                        atomic_store(&source->received, way->tail);
                else
                        LATER(way->received_due);
        }
        if (head != atomic_load(&source->head)) {
                if (way->tail - head > arenas[to->arena].ring) {
                        give_up(connection);
                        return true;
                }
                atomic_store(&source->receiver_cpu, set_to(DOES_SPIN) ? (uint32_t)sched_getcpu() + 1 : 0);
                atomic_store(&source->head, head);
                used = atomic_load(&source->tail) - head;
                atomic_thread_fence(memory_order_seq_cst);
                if (used < atomic_load(&source->room))
                        ring_bells(from, &source->senders);
                busy = true;
        }
        if (atomic_load(&target->stop) && !way->stop_seen) {
                way->stop_seen = due(present, DELAY) | 1;
                busy = true;
        }
        if (way->stop_seen && !way->stopped) {
                if (!way->stopped_due && way->stop_seen <= present) {
                        atomic_store(&source->stop, STOP_REQUESTED);
                        way->stopped_due = due(present, STOPPED_DELAY) + LEAVING;
                }
                if (way->stopped_due && way->stopped_due <= present && !atomic_load(&source->busy) &&
                    !way->count && atomic_load(&source->tail) == way->tail &&
                    atomic_load(&source->start) == way->seen_start) {
                        atomic_store(&target->stopped, 1);
                        way->stopped = busy = wakes = true;
                }
                LATER(way->stopped_due && way->stopped_due > present ? way->stopped_due
                                                                     : present + 1000 * 1000);
        }
        if (wakes)
                ring_bells(to, &target->receivers);
        return busy;
#undef LATER
}

/* Both ends have closed the connection. */
static void bury(struct connection *connection)
{
        for (int e = 0; e < 2; e++) {
                struct end *end = &connection->ends[e];

                arenas[end->arena].free |= UINT64_C(1) << end->slot;
                end->incarnation = 0;
        }
        connection->used = false;
        for (uint32_t a = 0; a < arenas_used; a++)
                if (arenas[a].id && arenas[a].retired && arenas[a].free == UINT64_MAX)
                        drop_arena(a);
}

static bool carry_all(uint64_t present, uint64_t *next)
{
        bool busy = false;

        for (uint32_t i = 0; i < connections_used; i++) {
                struct connection *connection = &connections[i];
                bool both;

                if (!connection->used)
                        continue;
                both = connection->ends[0].released && connection->ends[1].released;
                if (both) {
                        bury(connection);
                        busy = true;
                        continue;
                }
                for (int e = 0; e < 2 && !connection->broken; e++)
                        busy = carry(connection, e, present, next) || busy;
        }
        return busy;
}

static void arm(void)
{
        for (uint32_t i = 0; i < connections_used; i++)
                for (int e = 0; e < 2 && connections[i].used && !connections[i].broken; e++) {
                        const struct end *end = &connections[i].ends[e];
                        struct ring *in = ring_of(end, 1);
                        uint32_t size = arenas[end->arena].ring;
                        uint64_t used = atomic_load(&in->tail) - atomic_load(&in->head);

                        /* While half of the ring is free, no sender waits for room. */
                        atomic_store(&in->room, used < size / 2 ? 0 : (uint32_t)(used - size / 4));
                        listen_to(&ring_of(end, 0)->receivers);
                        listen_to(&in->senders);
                }
        atomic_thread_fence(memory_order_seq_cst);
}

/* --- orders of the test */

static void spoil(void)
{
        for (uint32_t i = 0; i < connections_used; i++)
                for (int e = 0; e < 2 && connections[i].used; e++)
                        for (int d = 0; d < SIDES; d++) {
                                _Atomic uint32_t *words = (void *)ring_of(&connections[i].ends[e], d);
                                uint32_t at = (uint32_t)any(RING_HEADER / 4);

                                connections[i].broken = true;
                                atomic_store(&words[at], any(2) ? (uint32_t)any(UINT32_MAX) : 1);
                                ring_bells(&connections[i].ends[e],
                                           &ring_of(&connections[i].ends[e], d)->receivers);
                                ring_bells(&connections[i].ends[e],
                                           &ring_of(&connections[i].ends[e], d)->senders);
                        }
        for (uint32_t a = 0; a < arenas_used; a++)
                for (int i = 0; i < 2 && arenas[a].id; i++)
                        ((_Atomic uint32_t *)(void *)arenas[a].base)[any(5)] = (uint32_t)any(UINT32_MAX);
}

/* For debugging: shows what each connection waits for. */
static void list_all(void)
{
        for (uint32_t i = 0; i < connections_used; i++)
                for (int e = 0; e < 2 && connections[i].used; e++) {
                        const struct end *end = &connections[i].ends[e];

                        for (int d = 0; d < SIDES; d++) {
                                struct ring *ring = ring_of(end, d);

                                fprintf(
                                    stderr,
                                    "%u.%d.%d: tail %llu head %llu base %llu start %llu end %llu ready %u "
                                    "stop %u over %u stopped %u broken %u busy %u room %u received %llu "
                                    "receivers %u %llx senders %u %llx%s%s\n",
                                    i, e, d, (unsigned long long)ring->tail, (unsigned long long)ring->head,
                                    (unsigned long long)ring->base, (unsigned long long)ring->start,
                                    (unsigned long long)ring->end, ring->ready, ring->stop, ring->over,
                                    ring->stopped, ring->broken, ring->busy, ring->room,
                                    (unsigned long long)ring->received, ring->receivers.any,
                                    (unsigned long long)ring->receivers.bells[0], ring->senders.any,
                                    (unsigned long long)ring->senders.bells[0],
                                    end->released ? " released" : "", end->orphan ? " orphan" : "");
                        }
                }
}

static bool obey(char *order)
{
        char *value = strchr(order, ' ');

        if (strcmp(order, "die") == 0)
                _exit(0);
        if (strcmp(order, "hold") == 0 || strcmp(order, "go") == 0) {
                held = order[0] == 'h';
                return true;
        }
        if (strcmp(order, "list") == 0) {
                list_all();
                return true;
        }
        if (strcmp(order, "sever") == 0) {
                sever();
                return true;
        }
        if (strcmp(order, "break") == 0) {
                for (uint32_t i = 0; i < connections_used; i++)
                        if (connections[i].used)
                                give_up(&connections[i]);
                return true;
        }
        if (strcmp(order, "spoil") == 0) {
                spoil();
                return true;
        }
        if (!value)
                return false;
        *value++ = 0;
        for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
                if (strcmp(order, settings[i].name) == 0) {
                        settings[i].value = strtoull(value, NULL, 0);
                        return true;
                }
        return false;
}

static void take_orders(int listener)
{
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        char order[128];
        ssize_t got;

        if (fd < 0)
                return;
        while ((got = recv(fd, order, sizeof order - 1, 0)) > 0) {
                order[got] = 0;
                got = send(fd, obey(order) ? "yes" : "no!", 3, MSG_NOSIGNAL);
        }
        close(fd);
}

static int listen_at(const char *path)
{
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

        check(fd >= 0 && strlen(path) < sizeof address.sun_path, "socket");
        strcpy(address.sun_path, path);
        unlink(path);
        check(bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 128) == 0, path);
        check(chmod(path, 0666) == 0, path);
        return fd;
}

int main(int count, char **arguments)
{
        static struct pollfd polled[2 + PROCESSES + ARENAS];
        struct rlimit limit;
        uint64_t active = 0;
        int router, control;

        check(count >= 3 && count % 2, "relay SOCKET CONTROL [NAME VALUE]...");
        for (int i = 3; i < count; i += 2) {
                char order[128];

                snprintf(order, sizeof order, "%s %s", arguments[i], arguments[i + 1]);
                check(obey(order), order);
        }
        check(getrlimit(RLIMIT_NOFILE, &limit) == 0, "RLIMIT_NOFILE");
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
        control = listen_at(arguments[2]);
        router = listen_at(arguments[1]);
        for (;;) {
                uint64_t present = now(), next = present + 1000000000;
                bool busy = !held && carry_all(present, &next), spins;
                struct timespec time;
                nfds_t many = 2;

                if (busy)
                        active = present;
                spins = !held && set_to(DOES_SPIN) && present - active < SPIN;
                if (!busy && !spins && !held) {
                        arm();
                        if (carry_all(present, &next))
                                active = present, spins = true;
                }
                look_at_orphans(present);
                if (looked + ORPHANS < next)
                        for (uint32_t p = 0; p < processes_used; p++)
                                if (processes[p].fd == -1)
                                        next = looked + ORPHANS;
                polled[0] = (struct pollfd){.fd = router, .events = POLLIN};
                polled[1] = (struct pollfd){.fd = control, .events = POLLIN};
                for (uint32_t p = 0; p < processes_used; p++)
                        if (processes[p].fd > 0)
                                polled[many++] = (struct pollfd){.fd = processes[p].fd, .events = POLLIN};
                for (uint32_t a = 0; a < arenas_used; a++)
                        if (arenas[a].id)
                                polled[many++] = (struct pollfd){.fd = arenas[a].bell, .events = POLLIN};
                present = now();
                next = busy || spins || next <= present ? 0 : next - present;
                time = (struct timespec){(time_t)(next / 1000000000), (long)(next % 1000000000)};
                if (ppoll(polled, many, &time, NULL) <= 0)
                        continue;
                for (nfds_t i = 2; i < many; i++) {
                        char bytes[256];

                        if (!polled[i].revents)
                                continue;
                        for (uint32_t p = 0; p < processes_used; p++)
                                if (processes[p].fd == polled[i].fd) {
                                        hear(p);
                                        polled[i].fd = -1;
                                        break;
                                }
                        if (polled[i].fd >= 0)
                                while (recv(polled[i].fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0)
                                        ;
                }
                if (polled[1].revents)
                        take_orders(control);
                if (polled[0].revents)
                        greet(router);
        }
}
