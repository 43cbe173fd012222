#include "client.h"

#include "files.h"
#include "monotonic.h"
#include "mutex.h"
#include "opening.h"
#include "outbox.h"
#include "port.h"

#include <dlfcn.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

static const struct freeflow_services *_Atomic services;
static const struct client_user *_Atomic users[CLIENT_USERS];
static _Atomic int arrivals = -1; /* an eventfd: messages are kept for us */

static struct mutex opening;   /* while a thread asks for the device */
static struct mutex receiving; /* while a thread takes messages */

/* 1 + the epoch of the socket by which a device is described; 0: by none. */
static _Atomic uint64_t describer;

/* Under `receiving`: what this socket's router has said of the port. */
static struct {
        uint32_t epoch;
        bool asked;    /* by V_OPEN */
        bool complete; /* of each place in the table there is word */
        uint64_t told[PORT_GIDS / 64];
} port_of_router;

/* --- calls of the library --- */

#define EACH_USER(told)                                                                                      \
        for (const struct client_user *_Atomic *at_ = users, *told;                                          \
             at_ < users + CLIENT_USERS && (told = atomic_load(at_)); at_++)

static void arrived(void)
{
        const struct freeflow_services *here = atomic_load(&services);
        int fd = atomic_load(&arrivals);
        uint64_t one = 1;

        if (fd >= 0 && here->is_own_descriptor(fd))
                sys_3(SYS_write, fd, &one, sizeof one);
}

/* It is checked before each use. */
static void descriptors_lost(void)
{
}

static void forks(void)
{
        EACH_USER(told)
        if (told->forks)
                told->forks();
}

static void fork_done(bool made)
{
        EACH_USER(told)
        if (told->fork_done)
                told->fork_done(made);
}

static void forked(void)
{
        /* Other threads of the parent may have had the mutexes. */
        opening = receiving = (struct mutex){0};
        memset(&port_of_router, 0, sizeof port_of_router);
        atomic_store(&arrivals, -1);
        atomic_store(&describer, 0);
        port_forget();
        opening_forget();
        outbox_forget();
        EACH_USER(told)
        told->forked();
}

static void retired(void)
{
        port_lose();
        EACH_USER(told)
        told->retired();
}

static ssize_t written(int fd, const void *buffer, size_t size)
{
        EACH_USER(told)
        if (told->write)
                return told->write(fd, buffer, size);
        return -EBADF;
}

static void closing(int fd)
{
        EACH_USER(told)
        if (told->closing)
                told->closing(fd);
}

static void duplicated(int fd, int to)
{
        EACH_USER(told)
        if (told->duplicated)
                told->duplicated(fd, to);
}

static const struct verbs_client ours = {
    .arrived = arrived,
    .descriptors_lost = descriptors_lost,
    .forks = forks,
    .fork_done = fork_done,
    .forked = forked,
    .retired = retired,
    .write = written,
    .closing = closing,
    .duplicated = duplicated,
};

/* --- the library --- */

static const struct freeflow_services *find_services(void)
{
        const struct freeflow_services *found = dlsym(RTLD_DEFAULT, SERVICES_NAME);

        if (!found || found->magic != SERVICES_MAGIC || found->version != SERVICES_VERSION ||
            found->size != sizeof *found)
                return NULL;
        if (!found->attach(&ours))
                return NULL;
        atomic_store(&services, found);
        files_show();
        return found;
}

const struct freeflow_services *client_services(void)
{
        const struct freeflow_services *found = atomic_load(&services);

        return found && found->is_here() ? found : NULL;
}

void client_serve(const struct client_user *wanted)
{
        for (int i = 0; i < CLIENT_USERS; i++) {
                const struct client_user *nobody = NULL;

                if (atomic_compare_exchange_strong(&users[i], &nobody, wanted) || nobody == wanted)
                        return;
        }
}

int client_descriptor(void)
{
        const struct freeflow_services *here = client_services();
        int fd = atomic_load(&arrivals), none = fd;

        if (!here)
                return -1;
        if (fd >= 0 && here->is_own_descriptor(fd))
                return fd;
        fd = here->own_descriptor((int)sys_2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (fd < 0 || atomic_compare_exchange_strong(&arrivals, &none, fd))
                return fd;
        here->close_own(fd);
        return none;
}

/* --- messages --- */

static bool is_told(uint32_t place)
{
        return port_of_router.told[place / 64] >> (place % 64) & 1;
}

/* Has the router said something of each of so many places? The others have no GID then. */
static bool is_all(uint32_t places)
{
        for (uint32_t i = 0; i < PORT_GIDS && i < places; i++)
                if (!is_told(i))
                        return false;
        return true;
}

/* True: a GID is another one. */
static bool clear_others(void)
{
        bool changed = false;

        for (uint32_t i = 0; i < PORT_GIDS; i++)
                if (!is_told(i))
                        changed |= port_clear(i);
        return changed;
}

/* True: a GID is another one. */
static bool set_place(const struct v_device *device)
{
        struct port_place place = {
            .index = device->index,
            .queue_pairs = device->queue_pairs,
            .regions = device->regions,
            .direct_bytes = device->direct ? device->direct_bytes : 0,
            .first = device->qpn_first,
            .guid = device->guid,
        };

        memcpy(place.gid.raw, device->gid.bytes, sizeof place.gid.raw);
        if (device->index < PORT_GIDS)
                port_of_router.told[device->index / 64] |= UINT64_C(1) << (device->index % 64);
        return port_set(&place);
}

/* There is no device. But a router that has just started may not know of the container yet: what
 * the one before has said holds until this one has described a device. True: a GID is another one.
 */
static bool withdraw(void)
{
        const uint64_t nothing[PORT_GIDS / 64] = {0};
        bool described = memcmp(port_of_router.told, nothing, sizeof nothing) != 0;

        memset(port_of_router.told, 0, sizeof port_of_router.told);
        return described && clear_others();
}

static void describe(const struct verbs_message *message)
{
        const struct v_device *device = &message->device;
        bool active = port_is_active(), changed;

        if (message->epoch != port_of_router.epoch)
                return;
        changed = device->count ? set_place(device) : withdraw();
        if (is_all(device->count)) {
                changed |= device->count && clear_others();
                port_of_router.complete = true;
                atomic_store(&describer, device->count ? message->epoch + UINT64_C(1) : 0);
        }
        if (changed)
                opening_tell_gids_changed();
        if (active != port_is_active())
                opening_tell_port(!active);
}

static bool is_handled(struct verbs_message *message)
{
        EACH_USER(told)
        if (told->handle(message))
                return true;
        return false;
}

bool client_send(const void *message, size_t size, uint32_t epoch)
{
        const struct freeflow_services *here = client_services();
        enum outbox_outcome outcome = here ? outbox_send(here, message, size, epoch) : OUTBOX_LOST;

        /* Whoever waits for messages may sleep. */
        if (outcome == OUTBOX_KEPT)
                arrived();
        return outcome != OUTBOX_LOST;
}

void client_release(struct place *place)
{
        const struct freeflow_services *here = client_services();
        struct release message;

        if (here && here->release(place, &message))
                client_send(&message, sizeof message, here->epoch());
}

/* The library could not take this slot. */
static void decline(const struct verbs_message *message)
{
        const struct v_grant *grant = &message->grant;
        struct release release = {.message = {.kind = RELEASE, .size = sizeof release},
                                  .slot = grant->slot,
                                  .arena = grant->arena,
                                  .incarnation = grant->incarnation,
                                  .token = grant->token};

        client_send(&release, sizeof release, message->epoch);
}

/* Nobody wants what this message brings. */
static void give_back(const struct freeflow_services *here, struct verbs_message *message)
{
        if (message->header.kind == V_GRANT)
                client_release(&message->place);
        if (message->descriptor >= 0)
                here->close_own(message->descriptor);
}

void client_receive(void)
{
        const struct freeflow_services *here = client_services();
        int fd = client_descriptor();
        struct verbs_message message;
        uint64_t count;

        if (!here)
                return;
        mutex_take(&receiving);
        if (fd >= 0)
                sys_3(SYS_read, fd, &count, sizeof count);
        while (here->receive(&message)) {
                if (message.header.kind == V_GRANT && message.reason)
                        decline(&message);
                if (message.header.kind == V_DEVICE)
                        describe(&message);
                else if (!is_handled(&message))
                        give_back(here, &message);
        }
        mutex_release(&receiving);
        outbox_flush(here);
}

bool client_keeps(void)
{
        return !outbox_is_empty();
}

/* --- the device --- */

static uint64_t milliseconds(void)
{
        return monotonic() / 1000000;
}

/* Ask by this socket, unless that has been done. False: it is lost. */
static bool ask(const struct freeflow_services *here, uint32_t epoch)
{
        struct v_open open = {.message = {.kind = V_OPEN, .size = sizeof open},
                              .version = VERBS_VERSION,
                              .qpn_first = port_first_number()};
        bool asked;

        mutex_take(&receiving);
        if (port_of_router.epoch != epoch || !port_of_router.asked) {
                memset(&port_of_router, 0, sizeof port_of_router);
                port_of_router.epoch = epoch;
                port_of_router.asked = here->send(&open, sizeof open, epoch) == 0;
        }
        asked = port_of_router.asked;
        mutex_release(&receiving);
        return asked;
}

static bool is_described(uint32_t epoch)
{
        bool described;

        client_receive();
        mutex_take(&receiving);
        described = port_of_router.epoch == epoch && port_of_router.complete;
        mutex_release(&receiving);
        return described;
}

/* Wait until something may have come. */
static void wait_for_message(const struct freeflow_services *here, int patience)
{
        const struct timespec pause = {.tv_sec = patience / 1000, .tv_nsec = patience % 1000 * 1000000L};
        struct pollfd sources[] = {{.fd = here->router_descriptor(), .events = POLLIN},
                                   {.fd = client_descriptor(), .events = POLLIN}};

        sys_5(SYS_ppoll, sources, 2, &pause, 0, 0);
}

static bool open_before(const struct freeflow_services *here, uint64_t deadline)
{
        uint32_t epoch;

        for (;;) {
                uint64_t now = milliseconds();
                int left = now < deadline ? (int)(deadline - now) : 0;

                if (here->reach(&epoch, left) || !ask(here, epoch))
                        return false;
                if (is_described(epoch))
                        return true;
                if (!left)
                        return false;
                wait_for_message(here, left);
        }
}

bool client_epoch(uint32_t *epoch)
{
        const struct freeflow_services *here = client_services();

        if (!here)
                return false;
        *epoch = here->epoch();
        return atomic_load(&describer) == *epoch + UINT64_C(1);
}

bool client_open(int patience)
{
        uint64_t deadline = milliseconds() + (uint64_t)patience;
        const struct freeflow_services *here;
        bool described;

        /* Before the mutex: in a child of fork another thread of the parent may have had it. */
        here = client_services();
        mutex_take(&opening);
        if (!here && !atomic_load(&services))
                here = find_services();
        described = here && client_descriptor() >= 0 && open_before(here, deadline);
        mutex_release(&opening);
        return described;
}
