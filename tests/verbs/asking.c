/* Asking for the device: `client.h`, with a libfreeflow.so and a router that are in this program.
 *
 *      asking rules
 *      asking race SECONDS SEED
 *
 * race: threads ask for devices while the router changes its mind about GIDs, loses its sockets and
 * forgets what it has described. In the end the device has the GIDs that the router has said last.
 */
#include "../../dataplane/verbs/client.h"
#include "../../dataplane/verbs/cm_device.h"
#include "../../dataplane/verbs/direct_files.h"
#include "../../dataplane/verbs/opened.h"
#include "../../dataplane/verbs/pair.h"
#include "../dataplane/check.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ASKERS = 3, PLACES = 6, QUEUE = 64 };

/* Here is another user. */
void pair_start(void)
{
}

void cm_start(void)
{
}

void direct_files_start(void)
{
}

/* --- the router, and the library */

static struct {
        pthread_mutex_t mutex;
        const struct verbs_client *client;
        uint32_t epoch;
        int outcome;          /* of reach() */
        bool opened;          /* by this epoch */
        uint8_t gids[PLACES]; /* the last byte; 0: none */
        struct verbs_message messages[QUEUE];
        uint32_t first, count;
        int in_receive;
        uint32_t opens, released, told, closed;
        bool here;
} it = {.mutex = PTHREAD_MUTEX_INITIALIZER, .here = true};

/* Under the mutex. */
static void put(struct verbs_message message)
{
        CHECK(it.count < QUEUE);
        message.epoch = it.epoch;
        it.messages[(it.first + it.count++) % QUEUE] = message;
}

static void put_device(uint32_t index, uint32_t count, uint8_t last)
{
        struct verbs_message message = {
            .device = {.message = {.kind = V_DEVICE, .size = sizeof(struct v_device)},
                       .index = index,
                       .count = count,
                       .qpn_first = 4096,
                       .queue_pairs = 10,
                       .regions = 20},
            .descriptor = -1};

        if (last) {
                message.device.gid.bytes[0] = 0xfd;
                message.device.gid.bytes[15] = last;
        }
        put(message);
}

static void put_all(void)
{
        for (uint32_t i = 0; i < PLACES; i++)
                put_device(i, PLACES, it.gids[i]);
}

static bool is_here(void)
{
        return it.here;
}

static bool attach(const struct verbs_client *client)
{
        it.client = client;
        return true;
}

static int reach(uint32_t *epoch, int patience)
{
        int outcome;

        (void)patience;
        pthread_mutex_lock(&it.mutex);
        *epoch = it.epoch;
        outcome = it.outcome;
        pthread_mutex_unlock(&it.mutex);
        return outcome;
}

static int send_message(const void *message, size_t size, uint32_t epoch)
{
        const struct v_open *open = message;
        int outcome = 0;

        if (open->message.kind == RELEASE) {
                CHECK(size == sizeof(struct release));
                it.told++;
                return 0;
        }
        CHECK(open->message.kind == V_OPEN && open->message.size == size && size == sizeof *open);
        CHECK(open->version == VERBS_VERSION);
        pthread_mutex_lock(&it.mutex);
        if (epoch != it.epoch) {
                outcome = ESTALE;
        } else {
                CHECK(!it.opened);
                it.opened = true;
                CHECK(open->qpn_first == (it.opens++ ? 4096 : 0));
                put_all();
        }
        pthread_mutex_unlock(&it.mutex);
        return outcome;
}

static bool receive(struct verbs_message *message)
{
        bool found;

        pthread_mutex_lock(&it.mutex);
        CHECK(it.in_receive++ == 0);
        found = it.count;
        if (found) {
                *message = it.messages[it.first];
                it.first = (it.first + 1) % QUEUE;
                it.count--;
        }
        it.in_receive--;
        pthread_mutex_unlock(&it.mutex);
        return found;
}

static int no_descriptor(void)
{
        return -1;
}

static int own_descriptor(int fd)
{
        return fd;
}

static bool is_own_descriptor(int fd)
{
        return fd >= 0 && fcntl(fd, F_GETFD) >= 0;
}

static void close_own(int fd)
{
        it.closed++;
        close(fd);
}

static uint32_t epoch_now(void)
{
        return it.epoch;
}

static bool release(struct place *place, struct release *message)
{
        if (!atomic_exchange(&place->incarnation, 0))
                return false;
        it.released++;
        *message = (struct release){.message = {RELEASE, sizeof *message}};
        return true;
}

__attribute__((visibility("default"))) struct freeflow_services freeflow_services = {
    .magic = SERVICES_MAGIC,
    .version = SERVICES_VERSION,
    .size = sizeof freeflow_services,
    .is_here = is_here,
    .attach = attach,
    .reach = reach,
    .epoch = epoch_now,
    .send = send_message,
    .receive = receive,
    .router_descriptor = no_descriptor,
    .own_descriptor = own_descriptor,
    .is_own_descriptor = is_own_descriptor,
    .close_own = close_own,
    .release = release,
};

/* --- rules */

static int count_devices(void)
{
        int count;
        struct ibv_device **list = ibv_get_device_list(&count);

        CHECK(list && (list[0] != NULL) == count);
        ibv_free_device_list(list);
        return count;
}

/* Services that are others than this build's are not used. */
static void check_services(void)
{
        freeflow_services.magic++;
        CHECK(!client_open(0) && !it.client);
        freeflow_services.magic--;
        freeflow_services.version++;
        CHECK(!client_open(0) && !it.client);
        freeflow_services.version--;
        freeflow_services.size--;
        CHECK(!client_open(0) && !it.client);
        freeflow_services.size++;
        it.outcome = EPROTONOSUPPORT;
        CHECK(!client_open(0) && it.client && client_services() == &freeflow_services);
        CHECK(!it.opens && count_devices() == 0);
        it.outcome = 0;
}

static void check_messages(void)
{
        uint32_t before;

        it.gids[0] = 1;
        CHECK(client_open(0) && it.opens == 1 && count_devices() == 1 && it.opens == 1);
        /* What another socket has brought says nothing about this one. */
        it.epoch--;
        put_device(0, PLACES, 0);
        it.epoch++;
        CHECK(client_open(0) && port_is_active());
        /* Nobody wants these. Both slots are given back. */
        put((struct verbs_message){
            .header = {.kind = V_GRANT}, .place = {.incarnation = 7}, .descriptor = -1});
        put((struct verbs_message){.header = {.kind = V_GRANT}, .reason = 1, .descriptor = -1});
        before = it.closed;
        put((struct verbs_message){.header = {.kind = V_CONNECTION}, .descriptor = dup(0)});
        client_receive();
        CHECK(it.released == 1 && it.told == 2 && it.closed == before + 1);
}

static uint32_t handled;

static bool handle(struct verbs_message *message)
{
        CHECK(message->header.kind == V_GRANT && message->reason == handled++);
        return true;
}

static void count_forked(void)
{
        handled = 100;
}

static const struct client_user user = {.handle = handle, .forked = count_forked, .retired = count_forked};

static void check_user(void)
{
        client_serve(&user);
        for (uint32_t i = 0; i < 3; i++)
                put((struct verbs_message){.header = {.kind = V_GRANT}, .reason = i, .descriptor = -1});
        client_receive();
        CHECK(handled == 3);
}

static bool is_readable(int fd)
{
        struct pollfd one = {.fd = fd, .events = POLLIN};

        return poll(&one, 1, 0) == 1;
}

static void check_arrivals(void)
{
        int fd = client_descriptor();

        CHECK(fd >= 0 && fd == client_descriptor() && !is_readable(fd));
        it.client->arrived();
        it.client->arrived();
        CHECK(is_readable(fd));
        client_receive();
        CHECK(!is_readable(fd));
        /* Somebody else has closed it. */
        close(fd);
        it.client->descriptors_lost();
        it.client->arrived();
        fd = client_descriptor();
        CHECK(fd >= 0 && !is_readable(fd));
}

static void check_ends(void)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        struct ibv_context *context = ibv_open_device(list[0]);
        union ibv_gid gid;
        int status;
        pid_t child = fork();

        ibv_free_device_list(list);
        if (!child) {
                it.client->forked();
                CHECK(handled == 100 && opened_is_lost(context) && !port_is_active());
                it.epoch++;
                it.opens = it.opened = 0;
                CHECK(count_devices() == 1 && opened_is_lost(context));
                _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && !status);
        CHECK(ibv_query_gid(context, 1, 0, &gid) == 0);
        it.client->retired();
        it.here = false;
        CHECK(handled == 100 && ibv_query_gid(context, 1, 0, &gid) < 0 && errno == EIO);
        CHECK(!count_devices() && !client_services() && client_descriptor() < 0);
        CHECK(ibv_close_device(context) == 0);
}

/* --- race */

static _Atomic bool ends;
static _Atomic uint64_t asked;

static void *ask(void *argument)
{
        uint64_t random = seed + (uintptr_t)argument;

        while (!atomic_load(&ends)) {
                struct ibv_device **list = ibv_get_device_list(NULL);
                struct ibv_context *context;
                union ibv_gid gid;

                CHECK(list);
                if (list[0]) {
                        context = ibv_open_device(list[0]);
                        CHECK(context && ibv_query_gid(context, 1, (int)any(&random, PLACES), &gid) == 0);
                        CHECK(ibv_close_device(context) == 0);
                }
                ibv_free_device_list(list);
                atomic_fetch_add(&asked, 1);
        }
        return NULL;
}

/* Under the mutex. */
static void change(uint64_t *random)
{
        if (any(random, 10) == 0) {
                it.epoch++;
                it.opened = false;
                it.outcome = any(random, 3) == 0 ? ENOTCONN : 0;
        } else if (it.opened && it.count <= QUEUE / 2) {
                it.gids[any(random, PLACES)] = (uint8_t)any(random, 3);
                if (any(random, 10))
                        put_all();
                else
                        put_device(0, 0, 0);
        }
}

static void race(time_t until)
{
        uint64_t random = ~seed;
        pthread_t askers[ASKERS];

        CHECK(client_open(0));
        for (uintptr_t i = 0; i < ASKERS; i++)
                CHECK(pthread_create(&askers[i], NULL, ask, (void *)i) == 0);
        while (time(NULL) < until) {
                usleep(any(&random, 100));
                pthread_mutex_lock(&it.mutex);
                change(&random);
                pthread_mutex_unlock(&it.mutex);
                it.client->arrived();
        }
        atomic_store(&ends, true);
        for (int i = 0; i < ASKERS; i++)
                CHECK(pthread_join(askers[i], NULL) == 0);
        it.outcome = 0;
        CHECK(client_open(0));
        put_all();
        CHECK(client_open(0));
        for (uint32_t i = 0; i < PLACES; i++) {
                union ibv_gid gid = {.raw = {0}};

                CHECK(port_gid(i, &gid) == (it.gids[i] != 0) && gid.raw[15] == it.gids[i]);
        }
        printf("asked %llu, opened %u\n", (unsigned long long)asked, it.opens);
}

int main(int arguments, char **argument)
{
        if (arguments == 2 && strcmp(argument[1], "rules") == 0) {
                check_services();
                check_messages();
                check_user();
                check_arrivals();
                check_ends();
                return 0;
        }
        if (arguments != 4)
                return 2;
        seed = strtoull(argument[3], NULL, 0);
        it.gids[0] = 1;
        race(time(NULL) + 1 + atoi(argument[2]));
        return 0;
}
