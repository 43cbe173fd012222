#include "verbs_client.h"

#include "arena.h"
#include "clock.h"
#include "ends.h"
#include "real.h"
#include "router.h"
#include "settings.h"
#include "sys.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

/* A symbol of our libibverbs' companion (verbs/virtual.h): where it is loaded the program may ask
 * for devices later. */
#define COMPANION "freeflow_virtual_files_2"

static const struct verbs_client *_Atomic client;
static _Atomic bool has_retired;

/* Messages that receive() hasn't returned yet. Under the router's lock. */
static struct {
        struct verbs_message messages[SERVICES_QUEUE];
        uint32_t first, count;
        bool receiving; /* the client is just taking them: nobody has to tell it */
} queue;

/* --- messages of the router --- */

/* The size of a message that the router sends; 0: it sends none of this kind. */
static size_t size_of(uint16_t kind)
{
        switch (kind) {
        case V_DEVICE:
                return sizeof(struct v_device);
        case V_GRANT:
                return sizeof(struct v_grant);
        case V_REFUSE:
                return sizeof(struct v_refuse);
        case V_GROUP:
                return sizeof(struct v_datagrams);
        case V_LISTENING:
                return sizeof(struct v_listen);
        case V_CONNECTION:
                return sizeof(struct v_connection);
        case V_MEMORY_MADE:
        case V_REACHED:
                return sizeof(struct v_memory);
        default:
                return 0;
        }
}

static struct verbs_message *queued(uint32_t index)
{
        return &queue.messages[(queue.first + index) % SERVICES_QUEUE];
}

/* Where a message is to be kept. Of what the device is, the last word counts: so a program that
 * doesn't receive never has more of those than there are GIDs. */
static struct verbs_message *room_for(const struct message *message)
{
        const struct v_device *device = (const void *)message;

        for (uint32_t i = 0; message->kind == V_DEVICE && i < queue.count; i++)
                if (queued(i)->header.kind == V_DEVICE && queued(i)->device.index == device->index)
                        return queued(i);
        return queued(queue.count++);
}

/* Take the slot for the client, or say why not. */
static void take_slot(struct verbs_message *kept, int memfd, int *receiving)
{
        const struct v_grant *grant = &kept->grant;
        struct granted slot = {.arena = grant->arena,
                               .token = grant->token,
                               .incarnation = grant->incarnation,
                               .side = grant->side,
                               .slot = grant->slot};

        /* The router always sends one: the process may have no more descriptors. */
        kept->reason = memfd < 0 ? REASON_MEMORY : arena_take(&kept->place, &slot, memfd, receiving);
}

void verbs_received(const void *buffer, size_t size, int *descriptors, int count)
{
        const struct message *message = buffer;
        const struct verbs_client *told = atomic_load(&client);
        int none = -1;
        struct verbs_message *kept;

        if (!told || size != size_of(message->kind) || queue.count == SERVICES_QUEUE)
                return;
        kept = room_for(message);
        memset(kept, 0, sizeof *kept);
        memcpy(kept, buffer, size);
        kept->epoch = router_epoch();
        kept->descriptor = -1;
        if (message->kind == V_GRANT) {
                take_slot(kept, count ? descriptors[0] : -1, count > 1 ? &descriptors[1] : &none);
        } else if (count) {
                kept->descriptor = own_descriptor(descriptors[0]);
                descriptors[0] = -1;
        }
        router_hold(queue.count == SERVICES_QUEUE);
        if (!queue.receiving)
                told->arrived();
}

static bool is_here(void)
{
        if (process.on && !load_relaxed(process.alive))
                family_forked();
        return !atomic_load(&has_retired) && in_this_process();
}

static bool attach(const struct verbs_client *wanted)
{
        const struct verbs_client *nobody = NULL;

        return is_here() && (atomic_compare_exchange_strong(&client, &nobody, wanted) || nobody == wanted);
}

/* Under the router's lock: connect, and take what the router has said. Returns as reach(). */
static int greet(uint32_t *epoch, int *socket)
{
        if (router_reach())
                router_take();
        *epoch = router_epoch();
        *socket = router_descriptor();
        if (*socket < 0)
                return ENOTCONN;
        if (settings.greeted != *epoch + 1)
                return EAGAIN;
        return settings.verbs ? 0 : EPROTONOSUPPORT;
}

static int reach(uint32_t *epoch, int patience)
{
        enum { STEP = 10 }; /* ms: another thread may take the answer */
        const struct timespec pause = {.tv_nsec = STEP * 1000000};
        uint64_t deadline = now() + (uint64_t)patience * 1000000;

        for (;;) {
                struct pollfd answer = {.events = POLLIN};
                int outcome = EAGAIN;

                if (!is_here())
                        return ENODEV;
                if (!router_begin())
                        return EAGAIN;
                outcome = greet(epoch, &answer.fd);
                router_end();
                if (outcome != EAGAIN || now() >= deadline)
                        return outcome;
                sys_5(SYS_ppoll, &answer, 1, &pause, 0, 0);
        }
}

static int send_message(const void *message, size_t size, uint32_t epoch)
{
        int failure = ESTALE;

        if (!is_here())
                return ESTALE;
        if (!router_begin())
                return EAGAIN;
        if (router_epoch() == epoch)
                failure = router_send(message, size, 0);
        router_end();
        return failure && failure != EAGAIN ? ESTALE : failure;
}

static bool receive(struct verbs_message *message)
{
        bool found;

        if (!is_here() || !router_begin())
                return false;
        queue.receiving = true;
        if (!queue.count)
                router_take();
        queue.receiving = false;
        found = queue.count;
        if (found) {
                *message = *queued(0);
                queue.first = (queue.first + 1) % SERVICES_QUEUE;
                queue.count--;
                router_hold(false);
        }
        router_end();
        return found;
}

static int descriptor_of_router(void)
{
        int fd = -1;

        if (is_here() && router_begin()) {
                fd = router_descriptor();
                router_end();
        }
        return fd;
}

/* --- bells --- */

static uint32_t side_in(uint32_t arena)
{
        return load_relaxed(&family->arenas[arena % ARENAS].side) % SIDES;
}

static int take_bell(uint32_t arena)
{
        return bell_take(arena, true);
}

static bool is_known(uint32_t arena, int bell)
{
        return bell_is_known(arena, side_in(arena), bell);
}

static uint64_t bell_slots(uint32_t arena, int bell)
{
        return atomic_exchange(&arena_header(mapping_of(arena))->sides[side_in(arena)].dirty[bell], 0);
}

/* --- descriptors --- */

static bool claim(int fd)
{
        if (!is_here() || !atomic_load(&client) || (unsigned)fd >= DESCRIPTORS)
                return false;
        end_forget(fd);
        fd_set_word(fd, FD_VERBS);
        return true;
}

ssize_t verbs_write(int fd, const void *buffer, size_t size)
{
        return result(atomic_load(&client)->write(fd, buffer, size));
}

void verbs_closing(int fd)
{
        if (!fd_is_verbs(fd))
                return;
        fd_set_word(fd, 0);
        atomic_load(&client)->closing(fd);
}

void verbs_alias(int old, int new)
{
        if (!fd_is_verbs(old) || (unsigned)new >= DESCRIPTORS)
                return;
        fd_set_word(new, FD_VERBS);
        atomic_load(&client)->duplicated(old, new);
}

/* --- the process --- */

bool verbs_are_used(void)
{
        return atomic_load(&client) || real_named(COMPANION);
}

void verbs_fork(void)
{
        const struct verbs_client *told = atomic_load(&client);

        if (told)
                told->forks();
}

void verbs_fork_done(bool made)
{
        const struct verbs_client *told = atomic_load(&client);

        if (told)
                told->fork_done(made);
}

void verbs_forked(void)
{
        const struct verbs_client *told = atomic_load(&client);

        if (!told)
                return;
        for (; queue.count; queue.count--)
                if (queued(queue.count - 1)->descriptor >= 0)
                        close_own(queued(queue.count - 1)->descriptor);
        router_hold(false);
        told->forked();
}

void verbs_descriptors_lost(void)
{
        const struct verbs_client *told = atomic_load(&client);

        if (told)
                told->descriptors_lost();
}

void verbs_retired(void)
{
        const struct verbs_client *told = atomic_load(&client);

        /* From now on nobody begins anything, while what was begun ends. */
        atomic_store(&has_retired, true);
        if (told)
                told->retired();
}

__attribute__((visibility("default"))) const struct freeflow_services freeflow_services = {
    .magic = SERVICES_MAGIC,
    .version = SERVICES_VERSION,
    .size = sizeof freeflow_services,
    .is_here = is_here,
    .attach = attach,
    .reach = reach,
    .epoch = router_epoch,
    .send = send_message,
    .receive = receive,
    .router_descriptor = descriptor_of_router,
    .sends = place_sends,
    .receives = place_receives,
    .release = arena_give_back,
    .bell_take = take_bell,
    .bell_return = bell_return,
    .bell_descriptor = bell_descriptor,
    .bell_is_known = is_known,
    .bell_drain = bell_drain,
    .bell_look = bell_look,
    .bell_slots = bell_slots,
    .ring = ring_bells,
    .own_descriptor = own_descriptor,
    .is_own_descriptor = is_own_descriptor,
    .close_own = close_own,
    .claim = claim,
};
