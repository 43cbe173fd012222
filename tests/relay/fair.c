/* The relay's turns among processes: link.c, source.c and mirror_scan.c with connections that only
 * count.
 *
 *      fair OWNERS
 *
 * One process has 4,000 connections, another has two; OWNERS is 2, or 1 for the measure's own test:
 * then they count as one process. The output is one line of JSON:
 *
 *      share      of the bytes that both send in bulk, what the process with two connections gets
 *      waits      turns, at most, until a message of that process goes out beside the other's bulk
 *      scans      connections of the large process that one turn scans, at most
 *      missed     turns in which a connection of the small process was not scanned
 *      turns      until all connections of the large process were scanned
 */
#include "../../dataplane/relay/answers.h"
#include "../../dataplane/relay/link.h"
#include "../../dataplane/relay/mirror_receive.h"
#include "../../dataplane/relay/mirror_scan.h"
#include "../../dataplane/relay/mirror_send.h"
#include "../../dataplane/relay/moves.h"

#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
        MANY = 4000,
        FEW = 2,
        PIECE = 64 * 1024,
        ROOM = 256 * 1024, /* bytes that the network takes in one turn */
        MESSAGE = 100,
        TURNS = 400,
};

struct relay relay;
struct mirrors mirrors = {
    .active = LIST(mirrors.active),
    .lazy = LIST(mirrors.lazy),
    .stopping = LIST(mirrors.stopping),
};

static struct mirror *all[MANY + FEW];
static unsigned scanned[MANY + FEW];
static struct ring rings[2]; /* of all: nothing happens in them */
static uint64_t room, window;
static unsigned owners;

/* What the three files need of the others. */
void answer_outcome(enum relay_kind kind, uint32_t number, int error, const char *text)
{
        (void)kind, (void)number, (void)error, (void)text;
}

void answer(const void *message, size_t size, enum relay_kind kind)
{
        (void)message, (void)size, (void)kind;
}

int relay_refuse(char *text, int error, const char *format, ...)
{
        (void)text, (void)format;
        return error;
}

void *relay_memory(size_t size, const char *what)
{
        void *memory = calloc(1, size);

        if (!memory)
                err(1, "%s", what);
        return memory;
}

struct mirror *mirror_find(uint32_t number)
{
        (void)number;
        return NULL;
}

void mirror_drop(struct mirror *m, bool broken)
{
        (void)m, (void)broken;
}

void farewell_forget(struct farewell *f)
{
        (void)f;
}

void mirror_suspend(struct mirror *m)
{
        (void)m;
}

void mirror_resume(struct mirror *m)
{
        (void)m;
}

void mirror_try_release(struct mirror *m)
{
        (void)m;
}

void mirror_corrupt(struct mirror *m)
{
        (void)m;
        abort();
}

void mirror_activate(struct mirror *m)
{
        list_add(&m->source->active, &m->active);
        list_add(&mirrors.active, &m->source->scanned);
}

void mirror_receive(struct mirror *m, const struct wire_block *block)
{
        (void)m, (void)block;
}

void mirror_confirm_farewell(struct link *link, uint32_t number, uint64_t cookie)
{
        (void)link, (void)number, (void)cookie;
}

void mirror_expire(struct mirror *m, enum relay_user user, uint32_t most)
{
        (void)m, (void)user, (void)most;
}

bool mirror_is_registered(const struct mirror *m, const struct transport *transport)
{
        (void)m, (void)transport;
        return true;
}

unsigned mirror_wants_lane(const struct mirror *m)
{
        (void)m;
        return 0;
}

void mirror_set_lane(struct mirror *m, unsigned lane)
{
        (void)m, (void)lane;
}

bool mirror_has_work(const struct mirror *m)
{
        scanned[m->number]++;
        return m->sent != m->tail;
}

void mirror_send(struct mirror *m, struct wire_block *block, uint64_t batch)
{
        uint64_t run = m->tail - m->sent < PIECE ? m->tail - m->sent : PIECE;

        (void)batch;
        *block = (struct wire_block){.connection = m->number};
        m->sent += run;
        room -= run < room ? run : room;
}

void moves_scan(struct mirror *m)
{
        (void)m;
}

void moves_completed(struct link *link)
{
        (void)link;
}

uint64_t moves_revoked_at(const struct link *link)
{
        (void)link;
        return 0;
}

void arena_becomes_idle(struct shared *shared)
{
        (void)shared;
}

bool arena_rests(struct shared *shared)
{
        (void)shared;
        return false;
}

uint64_t arenas_resume_at(uint64_t present)
{
        (void)present;
        return 0;
}

bool arenas_poll(void)
{
        return false;
}

bool arenas_need_polls(void)
{
        return false;
}

/* A network that takes ROOM bytes in a turn. */
static int create(struct link *link, struct wire_address *address, char *text)
{
        (void)link, (void)address, (void)text;
        return 0;
}

static int join(struct link *link, const struct wire_address *address, char *text)
{
        (void)link, (void)address, (void)text;
        return 0;
}

static bool has_room(struct link *link, unsigned lane, unsigned writes)
{
        (void)link, (void)lane, (void)writes;
        return room > 0;
}

static void send_nothing(struct link *link, unsigned lane, const void *message, uint32_t size,
                         uint64_t number, bool soon)
{
        (void)message, (void)size, (void)number, (void)soon;
        /* The peer grants at once. */
        link->lanes[lane].allowed++;
        link->lanes[lane].received = window++;
}

static const struct transport network = {
    .kind = RELAY_TCP,
    .lanes = 1,
    .message_lanes = 1,
    .window = WINDOW,
    .piece = PIECE,
    .create_channel = create,
    .connect_channel = join,
    .has_room = has_room,
    .send = send_nothing,
};

static struct link *link_up(void)
{
        char text[RELAY_TEXT];
        struct wire_address address;
        struct link *link = link_add(1);

        if (link_prepare(link, &network, &address, text) || link_connect(link, &address, text))
                abort();
        return link;
}

static void add(struct link *link, uint32_t number)
{
        struct mirror *m = calloc(1, sizeof *m);

        if (!m)
                abort();
        m->number = number;
        m->link = link;
        m->state = MIRROR_PAIRED;
        m->size = PIECE;
        m->out = &rings[0];
        m->in = &rings[1];
        m->source = source_enter(link, owners == 2 && number >= MANY ? 2 : 1);
        list_init(&m->queued);
        list_init(&m->active);
        list_init(&m->lazy);
        all[number] = m;
}

static void put(struct mirror *m, uint64_t bytes)
{
        m->tail = m->sent + bytes;
        mirror_enqueue(m);
}

static void turn(void)
{
        room = ROOM;
        links_flush();
}

static void fill(unsigned count)
{
        for (unsigned i = 0; i < count; i++)
                put(all[i], 16 * PIECE);
}

static double share(void)
{
        uint64_t few = 0, both = 0;

        fill(MANY + FEW);
        for (int i = 0; i < TURNS; i++) {
                turn();
                fill(MANY + FEW);
        }
        for (unsigned i = 0; i < MANY + FEW; i++) {
                both += all[i]->sent;
                few += i < MANY ? 0 : all[i]->sent;
        }
        return (double)few / (double)both;
}

static int waits(void)
{
        struct mirror *m = all[MANY];
        int most = 0;

        m->tail = m->sent;
        all[MANY + 1]->tail = all[MANY + 1]->sent;
        for (int i = 0; i < TURNS; i++) {
                int turns = 0;

                fill(MANY);
                turn();
                put(m, MESSAGE);
                for (; m->sent != m->tail && turns < 2 * MANY; turns++) {
                        turn();
                        fill(MANY);
                }
                most = turns > most ? turns : most;
        }
        return most;
}

static void scan(void)
{
        unsigned most = 0, missed = 0, turns = 0, seen = 0, before[MANY + FEW];

        for (unsigned i = 0; i < MANY + FEW; i++) {
                list_remove(&all[i]->queued);
                all[i]->tail = all[i]->sent;
                /* mirror_scan() reads the rings; these hold nothing new. */
                all[i]->stopped = true;
                all[i]->end = 1;
                mirror_activate(all[i]);
        }
        memset(scanned, 0, sizeof scanned);
        for (; seen < MANY && turns < 2 * MANY; turns++) {
                unsigned now_scanned = 0;

                memcpy(before, scanned, sizeof before);
                mirrors_scan();
                seen = 0;
                for (unsigned i = 0; i < MANY; i++) {
                        now_scanned += scanned[i] != before[i];
                        seen += scanned[i] != 0;
                }
                most = now_scanned > most ? now_scanned : most;
                for (unsigned i = MANY; i < MANY + FEW; i++)
                        missed += scanned[i] == before[i];
        }
        printf("\"scans\": %u, \"missed\": %u, \"turns\": %u}\n", most, missed, turns);
}

int main(int count, char **arguments)
{
        struct link *link;

        owners = count > 1 ? (unsigned)atoi(arguments[1]) : 2;
        link = link_up();
        for (uint32_t i = 0; i < MANY + FEW; i++)
                add(link, i);
        printf("{\"share\": %.4f, ", share());
        printf("\"waits\": %d, ", waits());
        scan();
        return 0;
}
