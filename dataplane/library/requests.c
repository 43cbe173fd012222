#include "requests.h"

#include "arena.h"
#include "backoff.h"
#include "budget.h"
#include "flow.h"
#include "protocol.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"
#include "sys.h"
#include "verbs_protocol.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

enum {
        LONGEST_SPIN = 1000, /* us */
        SOON = 1000,         /* ms after a request, within which most answers come */
        POLL_PAUSE = 20,     /* ms between two looks for later ones */
        WATCH_PAUSE = 1100,  /* ms between two looks whether acceleration is on by now: a router that has
                              * just been lost isn't tried for a second */
        REACH_PAUSE = 30000, /* ms between two attempts to reach another router for that */
};

static bool name_of(int fd, long call_number, struct address *name)
{
        union {
                struct sockaddr any;
                struct sockaddr_in v4;
                struct sockaddr_in6 v6;
        } address;
        uint32_t size = sizeof address;

        if (sys_3(call_number, fd, &address, &size) < 0)
                return false;
        memset(name, 0, sizeof *name);
        if (address.any.sa_family == AF_INET) {
                memcpy(name->bytes, &address.v4.sin_addr, 4);
                name->family = AF_INET;
                name->port = ntohs(address.v4.sin_port);
        } else if (address.any.sa_family == AF_INET6) {
                static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

                name->port = ntohs(address.v6.sin6_port);
                if (memcmp(&address.v6.sin6_addr, mapped, sizeof mapped) == 0) {
                        memcpy(name->bytes, (const uint8_t *)&address.v6.sin6_addr + 12, 4);
                        name->family = AF_INET;
                } else {
                        memcpy(name->bytes, &address.v6.sin6_addr, 16);
                        name->family = AF_INET6;
                }
        } else {
                return false;
        }
        return true;
}

static bool is_loopback(const struct address *name)
{
        static const uint8_t one[16] = {[15] = 1};

        return name->family == AF_INET ? name->bytes[0] == 127 : memcmp(name->bytes, one, sizeof one) == 0;
}

/* Under the router's lock. */
static void request(struct end *end, struct request *message)
{
        /* Set first: the answer may be taken by another thread as soon as the message is sent. */
        atomic_store(&end->cookie, message->cookie);
        atomic_store(&end->epoch, router_epoch());
        if (!stage_become(end, STAGE_CANDIDATE, STAGE_REQUESTED))
                return;
        if (router_send(message, sizeof *message, 0) == 0)
                statistics_count(&statistics.asked);
        else
                stage_become(end, STAGE_REQUESTED, STAGE_CANDIDATE);
}

void request_upgrade(struct end *end, int fd)
{
        struct request message = {.message = {.kind = REQUEST, .size = sizeof message},
                                  .connection = end_number(end)};
        uint32_t size = sizeof message.cookie;

        if (!router_begin())
                return;
        /* Two threads may have come this far: if both requested, the two ends could get different
         * slots. */
        if (atomic_load(&end->stage) == STAGE_CANDIDATE && router_reach() &&
            name_of(fd, SYS_getsockname, &message.local) && name_of(fd, SYS_getpeername, &message.remote) &&
            sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_COOKIE, &message.cookie, &size) == 0) {
                if (is_loopback(&message.remote) && !process.loopback) {
                        atomic_store(&end->reason, REASON_FOREIGN);
                        stage_become(end, STAGE_CANDIDATE, STAGE_REFUSED);
                } else {
                        request(end, &message);
                }
        }
        router_end();
}

/* The end that an answer is for, now STAGE_ANSWERING; NULL: it is gone. */
static struct end *answered_end(uint32_t connection, uint64_t cookie)
{
        struct end *end = connection < ENDS ? &family->ends[connection] : NULL;

        if (!end || !stage_become(end, STAGE_REQUESTED, STAGE_ANSWERING))
                return NULL;
        /* From here on the end can't be freed. Is it still the one that requested? */
        if (atomic_load(&end->generation) & 1 && atomic_load(&end->cookie) == cookie)
                return end;
        stage_become(end, STAGE_ANSWERING, STAGE_REQUESTED);
        return NULL;
}

static void answer(struct end *end, uint32_t reason)
{
        atomic_store(&end->reason, reason);
        stage_become(end, STAGE_ANSWERING, reason ? STAGE_REFUSED : STAGE_GRANTED);
        statistics_count(reason ? &statistics.refused : &statistics.granted);
}

static void granted(const struct grant *grant, int memfd, int *receiving)
{
        struct end *end = answered_end(grant->connection, grant->cookie);
        uint32_t reason = REASON_NOT_FOUND;
        struct granted slot = {.arena = grant->arena,
                               .token = grant->token,
                               .incarnation = grant->incarnation,
                               .side = grant->side,
                               .slot = grant->slot};
        struct release declined;

        if (end) {
                reason = end_held_elsewhere(end) ? REASON_SHARED : arena_attach(end, &slot, memfd, receiving);
                answer(end, reason);
        }
        if (reason) {
                declined = release_of(grant->arena, grant->token, grant->slot, grant->incarnation);
                router_send_release(&declined);
        }
}

/* The router says so. A connection that was in a ring before will be there again: what it lacks, a
 * router that has just started may lack too. */
static bool is_for_now(const struct end *end, const struct refuse *refuse)
{
        return refuse->passes || (atomic_load(&end->setbacks) &&
                                  (refuse->reason == REASON_REMOTE || refuse->reason == REASON_LIMIT ||
                                   refuse->reason == REASON_MEMORY));
}

static void refused(const struct refuse *refuse)
{
        struct end *end = answered_end(refuse->connection, refuse->cookie);

        if (end && is_for_now(end, refuse)) {
                backoff_begin(end);
                stage_become(end, STAGE_ANSWERING, STAGE_CANDIDATE);
                statistics_count(&statistics.refused);
        } else if (end) {
                answer(end, refuse->reason ? refuse->reason : REASON_OFF);
        }
}

static uint32_t at_most(uint32_t value, uint32_t most)
{
        return value < most ? value : most;
}

/* The container's own choice, if its environment has one that is a number. */
static uint32_t chosen(const char *name, uint32_t given)
{
        const char *text = environment(name);
        uint64_t number = 0;

        for (const char *digit = text; digit && *digit; digit++) {
                if (*digit < '0' || *digit > '9' || number > UINT32_MAX)
                        return given;
                number = number * 10 + (uint64_t)(*digit - '0');
        }
        return !text || !*text || number > UINT32_MAX ? given : (uint32_t)number;
}

static void welcomed(const struct welcome *welcome)
{
        settings.verbs = 0;
        settings.greeted = router_epoch() + 1;
        if (welcome->version != PROTOCOL_VERSION || welcome->layout_version != FREEFLOW_VERSION) {
                settings.enabled = 0;
                return;
        }
        if (!settings.welcomed)
                budget_start();
        settings.welcomed = true;
        settings.verbs = welcome->verbs == VERBS_VERSION;
        settings.enabled = settings.off ? 0 : welcome->enabled;
        settings.operations = chosen("FREEFLOW_UPGRADE_OPERATIONS", welcome->operations);
        settings.age = chosen("FREEFLOW_UPGRADE_AGE", welcome->age);
        settings.bytes = chosen("FREEFLOW_UPGRADE_BYTES", welcome->bytes);
        settings.bulk = chosen("FREEFLOW_UPGRADE_BULK", welcome->bulk);
        settings.spin = at_most(chosen("FREEFLOW_SPIN", welcome->spin), LONGEST_SPIN);
        /* A container may choose no more than the host allows. */
        settings.ring_limit = at_most(chosen("FREEFLOW_RING_LIMIT", welcome->ring_limit),
                                      at_most(welcome->ring_limit, RING_SIZE));
        if (settings.ring_limit < PAGE)
                settings.ring_limit = PAGE;
}

void request_received(const void *buffer, size_t size, int *descriptors, int count)
{
        const struct message *message = buffer;
        const struct bell *bell = buffer;

        switch (message->kind) {
        case WELCOME:
                if (size == sizeof(struct welcome))
                        welcomed(buffer);
                else
                        settings.enabled = 0;
                break;
        case GRANT:
                if (size == sizeof(struct grant) && count)
                        granted(buffer, descriptors[0], &descriptors[1]);
                break;
        case REFUSE:
                if (size == sizeof(struct refuse))
                        refused(buffer);
                break;
        case HEAR:
                if (size == sizeof *bell)
                        bell_received(bell->arena, bell->side, bell->index, &descriptors[0]);
                break;
        case RING:
                if (size == sizeof *bell)
                        bell_ringer_received(bell->arena, bell->side, bell->index, &descriptors[0]);
                break;
        default:
                break;
        }
}

void request_poll(struct end *end)
{
        static _Atomic uint32_t polled; /* ticks() */
        uint32_t tick = ticks(), operations = load_relaxed(&end->operations);
        uint32_t pause = tick - load_relaxed(&polled);
        uint64_t requested = load_relaxed(&end->requested_at);
        bool soon = !requested || tick - (uint32_t)(requested / 1000000) < SOON;

        /* At first after every few operations, and at each tick of the clock. A request may also
         * wait for hours. */
        if (soon ? !pause && operations % 8 : pause < POLL_PAUSE)
                return;
        store_relaxed(&polled, tick);
        statistics_count(&statistics.polls);
        router_receive();
}

void request_watch(void)
{
        static _Atomic uint32_t watched, reached; /* ticks() */
        uint32_t tick = ticks();

        if (tick - load_relaxed(&watched) < WATCH_PAUSE || !router_begin())
                return;
        store_relaxed(&watched, tick);
        /* A router serves few processes whose container it doesn't know, so they don't hurry. */
        if (router_descriptor() < 0 && tick - load_relaxed(&reached) >= REACH_PAUSE) {
                store_relaxed(&reached, tick);
                router_reach();
        }
        router_take();
        router_end();
}
