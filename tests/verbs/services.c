/* A stand-in for libibverbs: uses the library's services, with the record layer on its rings.
 *
 *      services talk PEER COUNT QUEUES SEED     exchange so many messages with the process that has
 *                                               GID 10.0.0.PEER, over each of so many queue pairs
 *      services alone COUNT QUEUES SEED         the same between queue pairs of this process
 *      services SCENARIO [ARGUMENT]...          see `scenarios`
 *
 * The library is preloaded. `say()` and `hear()` keep in step with the test.
 */
#include "../../dataplane/library/services.h"
#include "../../dataplane/library/sys.h"
#include "../../dataplane/verbs/record.c"
#include "../dataplane/check.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
        PATIENCE = 60 * 1000, /* ms */
        QUEUES = 16,
        LONGEST = 64 * 1024,
};

/* One queue pair, and what is left to do for it. */
struct queue {
        struct place place;
        struct record_sender sender;
        struct record_receiver receiver;
        uint32_t qpn, send, receive; /* messages that are still to come */
        uint64_t dice[2];            /* of what is sent and of what is received */
        bool hot, closing, closed;
};

/* An arena, and the bell for it. */
struct heard {
        uint32_t arena;
        int bell;
        uint32_t places;
};

static const struct freeflow_services *services;
static struct v_device device;
static uint32_t epoch;
static struct queue queues[QUEUES];
static struct heard heard[QUEUES];
static uint32_t count, arenas;
static _Atomic uint32_t arrivals, forks, losses, retirements;
static uint32_t due, done; /* calls around forks */
static int told = -1;      /* eventfd: arrived() */

static void say(const char *what)
{
        puts(what);
        fflush(stdout);
}

static void hear(void)
{
        char line[16];

        CHECK(fgets(line, sizeof line, stdin));
}

/* --- the client --- */

static void arrived(void)
{
        uint64_t one = 1;

        atomic_fetch_add(&arrivals, 1);
        if (told >= 0)
                sys_3(SYS_write, told, &one, sizeof one);
}

static void descriptors_lost(void)
{
        atomic_fetch_add(&losses, 1);
}

static void fork_is_due(void)
{
        due++;
}

static void fork_done(bool made)
{
        CHECK(made && due == 1);
        due = 0;
        done++;
}

static void forked(void)
{
        atomic_fetch_add(&forks, 1);
}

static void retired(void)
{
        atomic_fetch_add(&retirements, 1);
}

static struct {
        int fd, to;
        char bytes[16];
        size_t size;
        int closings, duplicates;
} seen;

static ssize_t write_seen(int fd, const void *buffer, size_t size)
{
        seen.fd = fd;
        seen.size = size;
        memcpy(seen.bytes, buffer, size < sizeof seen.bytes ? size : sizeof seen.bytes);
        return size == 13 ? -EINVAL : (ssize_t)size;
}

static void closing(int fd)
{
        seen.fd = fd;
        seen.closings++;
}

static void duplicated(int fd, int to)
{
        seen.fd = fd;
        seen.to = to;
        seen.duplicates++;
}

static const struct verbs_client client = {
    .arrived = arrived,
    .descriptors_lost = descriptors_lost,
    .forks = fork_is_due,
    .fork_done = fork_done,
    .forked = forked,
    .retired = retired,
    .write = write_seen,
    .closing = closing,
    .duplicated = duplicated,
};

static void find_services(void)
{
        services = dlsym(RTLD_DEFAULT, SERVICES_NAME);
        CHECK(services && services->magic == SERVICES_MAGIC && services->version == SERVICES_VERSION);
        CHECK(services->size == sizeof *services);
}

static void start(void)
{
        find_services();
        CHECK(services->is_here() && services->attach(&client) && services->attach(&client));
        told = services->own_descriptor(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
        CHECK(told >= 0 && services->is_own_descriptor(told));
}

/* --- the router --- */

static void await_message(struct verbs_message *message)
{
        while (!services->receive(message)) {
                struct pollfd polled[] = {{.fd = services->router_descriptor(), .events = POLLIN},
                                          {.fd = told, .events = POLLIN}};
                uint64_t times;

                CHECK(poll(polled, 2, PATIENCE) > 0);
                if (polled[1].revents)
                        sys_3(SYS_read, told, &times, sizeof times);
        }
        CHECK(message->epoch == services->epoch());
}

static void open_device(void)
{
        struct v_open message = {.message = {V_OPEN, sizeof message}, .version = VERBS_VERSION};
        struct verbs_message answer;

        CHECK(services->reach(&epoch, PATIENCE) == 0 && epoch == services->epoch());
        CHECK(services->send(&message, sizeof message, epoch) == 0);
        await_message(&answer);
        CHECK(answer.header.kind == V_DEVICE && answer.descriptor == -1);
        device = answer.device;
}

static struct verbs_gid gid_of(uint32_t number)
{
        struct verbs_gid gid = {.bytes = {[10] = 0xff, [11] = 0xff, [12] = 10, [15] = (uint8_t)number}};

        return gid;
}

static void ask(struct queue *queue, struct verbs_gid peer, uint32_t peer_qpn)
{
        struct v_queue_pair message = {.message = {V_QUEUE_PAIR, sizeof message},
                                       .request = queue->qpn + 1,
                                       .qpn = queue->qpn,
                                       .peer_qpn = peer_qpn,
                                       .type = 2,
                                       .peer_gid = peer};

        CHECK(services->send(&message, sizeof message, epoch) == 0);
}

static void take_grant(void)
{
        struct verbs_message message;
        struct queue *queue;
        uint32_t i = 0;

        await_message(&message);
        CHECK(message.header.kind == V_GRANT && !message.reason && message.descriptor == -1);
        queue = &queues[message.grant.qpn - device.qpn_first];
        CHECK(message.grant.request == queue->qpn + 1 && !queue->place.incarnation);
        queue->place = message.place;
        CHECK(queue->place.incarnation == message.grant.incarnation);
        CHECK(queue->place.side == message.grant.side && queue->place.slot == message.grant.slot);
        record_send_from(&queue->sender, services->sends(&queue->place));
        record_receive_from(&queue->receiver, services->receives(&queue->place));
        queue->hot = true;
        while (i < arenas && heard[i].arena != queue->place.arena)
                i++;
        if (i == arenas)
                heard[arenas++] = (struct heard){.arena = queue->place.arena, .bell = -1};
        heard[i].places++;
}

/* Queue pairs with those of another process, or among themselves. */
static void pair_up(uint32_t peer)
{
        for (uint32_t i = 0; i < count; i++) {
                queues[i].qpn = device.qpn_first + i;
                ask(&queues[i], peer ? gid_of(peer) : device.gid, device.qpn_first + (peer ? i : (i ^ 1)));
        }
        for (uint32_t i = 0; i < count; i++)
                take_grant();
}

static void release(struct queue *queue)
{
        struct v_end message = {.message = {V_QUEUE_PAIR_END, sizeof message}, .number = queue->qpn};
        struct release released;

        for (uint32_t i = 0; i < arenas; i++)
                if (heard[i].arena == queue->place.arena && !--heard[i].places && heard[i].bell >= 0)
                        services->bell_return(heard[i].arena, heard[i].bell);
        CHECK(services->release(&queue->place, &released) && !queue->place.incarnation);
        services->send(&released, sizeof released, epoch);
        CHECK(!services->release(&queue->place, &released));
        services->send(&message, sizeof message, epoch);
}

/* --- messages --- */

static unsigned char buffer[LONGEST];

static uint32_t length_of(const struct queue *queue, uint64_t *dice)
{
        uint64_t most = record_piece(&queue->sender.view);

        return (uint32_t)any(dice, any(dice, 4) ? 256 : most + 1);
}

static void fill(unsigned char first, uint32_t length)
{
        for (uint32_t i = 0; i < length; i++)
                buffer[i] = (unsigned char)(first + i * 7);
}

/* Send one message. False: there is none, or no room. */
static bool send_one(struct queue *queue)
{
        uint64_t dice = queue->dice[0];
        uint32_t length = queue->send ? length_of(queue, &dice) : 0;
        unsigned char first = (unsigned char)any(&dice, 256);
        struct iovec vec = {.iov_base = buffer, .iov_len = length};
        struct cursor cursor = {.vec = &vec};
        struct record record = {
            .operation = RECORD_SEND, .flags = RECORD_FIRST | RECORD_LAST, .length = length, .total = length};

        if (queue->closing)
                return false;
        if (!queue->send)
                record = (struct record){.operation = RECORD_CLOSE};
        fill(first, length);
        if (record_put(&queue->sender, &record, &cursor) != RECORD_OK)
                return false;
        CHECK(record_publish(&queue->sender));
        services_wake(services, &queue->sender.view.ring->receivers, &queue->place);
        queue->closing = !queue->send;
        queue->send -= queue->send != 0;
        queue->dice[0] = dice;
        return true;
}

static bool receive_one(struct queue *queue)
{
        static unsigned char taken[LONGEST];
        const struct record *now = &queue->receiver.now;
        enum record_outcome outcome = queue->closed ? RECORD_WAIT : record_next(&queue->receiver);
        struct iovec vec = {.iov_base = taken, .iov_len = sizeof taken};
        struct cursor cursor = {.vec = &vec};

        CHECK(outcome != RECORD_CORRUPT);
        if (outcome == RECORD_WAIT)
                return false;
        if (now->operation == RECORD_CLOSE) {
                CHECK(!queue->receive);
                queue->closed = true;
        } else {
                uint32_t length = length_of(queue, &queue->dice[1]);

                CHECK(queue->receive-- && now->operation == RECORD_SEND && now->length == length);
                fill((unsigned char)any(&queue->dice[1], 256), length);
                record_take(&queue->receiver, &cursor, length);
                CHECK(memcmp(taken, buffer, length) == 0);
        }
        record_done(&queue->receiver);
        services_wake(services, &queue->receiver.view.ring->senders, &queue->place);
        return true;
}

static bool work(struct queue *queue)
{
        bool sent = send_one(queue);

        return receive_one(queue) || sent;
}

/* Nothing can be done for it now: have its bell rung when that changes. */
static void arm(struct queue *queue)
{
        for (uint32_t i = 0; i < arenas; i++)
                if (heard[i].arena == queue->place.arena && heard[i].bell >= 0) {
                        wait_begin(&queue->receiver.view.ring->receivers, heard[i].bell);
                        if (!queue->closing)
                                wait_begin(&queue->sender.view.ring->senders, heard[i].bell);
                        queue->hot = false;
                }
        if (work(queue))
                queue->hot = true;
}

static void sleep_on_bells(void)
{
        struct pollfd polled[QUEUES + 1] = {
            [QUEUES] = {.fd = services->router_descriptor(), .events = POLLIN}};
        struct verbs_message message;
        int patience = PATIENCE;

        for (uint32_t i = 0; i < QUEUES; i++) {
                polled[i] = (struct pollfd){.fd = -1, .events = POLLIN};
                if (i >= arenas || !heard[i].places)
                        continue;
                if (heard[i].bell >= 0)
                        polled[i].fd = services->bell_descriptor(heard[i].arena, heard[i].bell);
                if (heard[i].bell < 0)
                        patience = 16;
                else if (!services->bell_is_known(heard[i].arena, heard[i].bell) && patience > 1000)
                        patience = 1000;
        }
        /* Nobody rings: a wake-up was lost. */
        CHECK(poll(polled, QUEUES + 1, patience) > 0 || patience < PATIENCE);
        CHECK(!services->receive(&message));
        for (uint32_t i = 0; i < arenas; i++)
                if (polled[i].revents) {
                        uint64_t slots;

                        CHECK(services->bell_drain(heard[i].arena, heard[i].bell));
                        slots = services->bell_slots(heard[i].arena, heard[i].bell);
                        for (uint32_t q = 0; q < count; q++)
                                if (queues[q].place.arena == heard[i].arena &&
                                    slots >> queues[q].place.slot & 1)
                                        queues[q].hot = true;
                }
        /* Who sleeps without a bell, or with one that can't be rung, looks by itself. */
        for (uint32_t q = 0; q < count && patience < PATIENCE; q++)
                queues[q].hot = true;
}

static void converse(uint32_t messages)
{
        for (uint32_t i = 0; i < count; i++) {
                uint64_t side = atomic_load(&queues[i].place.side), number = queues[i].place.slot;

                queues[i].send = queues[i].receive = messages;
                queues[i].closing = queues[i].closed = false;
                queues[i].dice[0] = seed + number * 1000 + side;
                queues[i].dice[1] = seed + number * 1000 + 1 - side;
        }
        for (bool busy = true; busy;) {
                bool hot = false;

                busy = false;
                for (uint32_t i = 0; i < arenas; i++)
                        if (heard[i].bell < 0)
                                heard[i].bell = services->bell_take(heard[i].arena);
                for (uint32_t i = 0; i < count; i++) {
                        if (queues[i].hot && !work(&queues[i]))
                                arm(&queues[i]);
                        hot = hot || (queues[i].hot && heard[0].bell >= 0);
                        busy = busy || !queues[i].closing || !queues[i].closed;
                }
                if (busy && !hot)
                        sleep_on_bells();
        }
}

/* --- scenarios --- */

static _Atomic bool paired;

/* Takes messages from the socket, as any thread with a TCP connection does. */
static void *interfere(void *unused)
{
        while (!atomic_load(&paired)) {
                uint32_t ignored;

                services->reach(&ignored, 0);
                usleep(100);
        }
        return unused;
}

static void meet(uint32_t peer, char **arguments)
{
        uint32_t messages = (uint32_t)atoi(arguments[0]);
        pthread_t thread;

        seed = strtoull(arguments[2], NULL, 0);
        count = (uint32_t)atoi(arguments[1]);
        start();
        open_device();
        say("open");
        CHECK(pthread_create(&thread, NULL, interfere, NULL) == 0);
        hear();
        pair_up(peer);
        atomic_store(&paired, true);
        CHECK(pthread_join(thread, NULL) == 0);
        converse(messages);
        for (uint32_t i = 0; i < count; i++)
                release(&queues[i]);
        CHECK(!forks && !losses && !retirements);
}

static void talk(char **arguments)
{
        meet((uint32_t)atoi(arguments[0]), arguments + 1);
}

static void alone(char **arguments)
{
        meet(0, arguments);
}

/* A slot that isn't what the router says it is. */
static void declined(char **arguments)
{
        struct verbs_message message;
        struct release release;

        (void)arguments;
        count = 2;
        start();
        open_device();
        for (uint32_t i = 0; i < 2; i++) {
                queues[i].qpn = device.qpn_first + i;
                ask(&queues[i], device.gid, device.qpn_first + 1 - i);
        }
        for (uint32_t i = 0; i < 2; i++) {
                await_message(&message);
                CHECK(message.header.kind == V_GRANT && message.reason == REASON_CORRUPT);
                CHECK(!message.place.incarnation && !services->release(&message.place, &release));
                release = (struct release){.message = {RELEASE, sizeof release},
                                           .slot = message.grant.slot,
                                           .arena = message.grant.arena,
                                           .incarnation = message.grant.incarnation,
                                           .token = message.grant.token};
                services->send(&release, sizeof release, epoch);
        }
}

/* Every connection to the router ends, and rings go on. */
static void restarted(char **arguments)
{
        struct v_end message = {.message = {V_QUEUE_PAIR_END, sizeof message}};
        uint32_t before;

        (void)arguments;
        count = 2;
        start();
        open_device();
        pair_up(0);
        before = epoch;
        say("paired");
        hear();
        seed = 1;
        converse(1000);
        CHECK(services->send(&message, sizeof message, before) == ESTALE);
        CHECK(services->epoch() != before);
        while (services->reach(&epoch, PATIENCE) == ENOTCONN)
                usleep(10000);
        CHECK(epoch != before && services->send(&message, sizeof message, before) == ESTALE);
        open_device();
        release(&queues[0]);
        release(&queues[1]);
}

/* More messages than are kept: none is lost, and of V_DEVICE the last one counts. */
static void queue_of_messages(char **arguments)
{
        uint32_t messages = (uint32_t)atoi(arguments[0]), ignored;
        struct verbs_message message;

        start();
        open_device();
        say("open");
        hear();
        atomic_store(&arrivals, 0);
        CHECK(services->reach(&ignored, 0) == 0);
        CHECK(atomic_load(&arrivals) >= SERVICES_QUEUE);
        await_message(&message);
        CHECK(message.header.kind == V_DEVICE && message.device.guid == 5);
        for (uint32_t i = 0; i < messages; i++) {
                await_message(&message);
                CHECK(message.header.kind == V_REFUSE && message.refuse.number == i);
        }
        CHECK(!services->receive(&message));
}

/* write(), close() and dup() of a claimed descriptor. */
static void descriptors(char **arguments)
{
        int fd = eventfd(0, EFD_CLOEXEC), other, third;
        uint64_t value;

        (void)arguments;
        find_services();
        CHECK(!services->claim(fd));
        start();
        CHECK(services->claim(fd) && !services->claim(1 << 20));
        CHECK(write(fd, "123456789abc", 12) == 12 && seen.fd == fd && seen.size == 12);
        CHECK(memcmp(seen.bytes, "123456789abc", 12) == 0);
        CHECK(write(fd, "0123456789abc", 13) == -1 && errno == EINVAL);
        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0 && read(fd, &value, 8) == -1 && errno == EAGAIN);

        CHECK((other = dup(fd)) >= 0 && seen.fd == fd && seen.to == other);
        CHECK((third = fcntl(fd, F_DUPFD_CLOEXEC, 100)) >= 100 && seen.to == third && seen.duplicates == 2);
        CHECK(write(third, "x", 1) == 1 && seen.fd == third);
        CHECK(dup2(fd, other) == other && seen.closings == 1 && seen.duplicates == 3);
        CHECK(write(other, "x", 1) == 1 && seen.fd == other);

        CHECK(close(fd) == 0 && seen.fd == fd && seen.closings == 2);
        CHECK(open("/dev/null", O_RDWR) == fd && write(fd, "12", 2) == 2 && seen.fd == fd && seen.size == 1);
        CHECK(close(fd) == 0 && seen.closings == 2);
        CHECK(close_range((unsigned)other, (unsigned)third, 0) == 0 && seen.closings == 4);

        /* The library's own are spared. */
        CHECK(close(told) == -1 && errno == EBADF && fcntl(told, F_GETFD) == FD_CLOEXEC);
        closefrom(3);
        CHECK(fcntl(told, F_GETFD) == FD_CLOEXEC && services->is_own_descriptor(told));
        services->close_own(told);
        CHECK(fcntl(told, F_GETFD) == -1 && !services->is_own_descriptor(told));
}

static void await_child(pid_t child)
{
        int status;

        CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

/* What children see, and that they can't give back what is their parent's. */
static void children(char **arguments)
{
        volatile bool here = true;
        struct release message;
        uint32_t ignored;
        pid_t child;

        (void)arguments;
        count = 2;
        start();
        open_device();
        pair_up(0);
        for (int way = 0; way < 2; way++) {
                child = way ? (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) : fork();
                if (!child) {
                        CHECK(way || (forks == 1 && due == 1));
                        CHECK(services->is_here() && forks == 1);
                        CHECK(!services->release(&queues[0].place, &message));
                        CHECK(services->epoch() != epoch && services->router_descriptor() < 0);
                        CHECK(services->reach(&ignored, PATIENCE) == 0 && services->attach(&client));
                        _exit(0);
                }
                await_child(child);
                CHECK(!due && done == (uint32_t)way + 1);
        }
        child = vfork();
        if (!child) {
                here = services->is_here();
                _exit(0);
        }
        await_child(child);
        CHECK(!here && !forks && services->epoch() == epoch);
        say("none released");
        hear();
        seed = 2;
        converse(1000);
        release(&queues[0]);
        release(&queues[1]);
}

/* A child that is killed leaves its arenas' numbers to its family. */
static void killed(char **arguments)
{
        uint32_t *numbers = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        pid_t child;
        int status;

        (void)arguments;
        count = 2;
        start();
        child = fork();
        if (!child) {
                open_device();
                pair_up(0);
                numbers[0] = queues[0].place.arena;
                numbers[1] = queues[1].place.arena;
                kill(getpid(), SIGKILL);
        }
        CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
        open_device();
        pair_up(0);
        CHECK(numbers[0] != numbers[1]);
        CHECK(queues[0].place.arena + queues[1].place.arena == numbers[0] + numbers[1]);
        seed = 3;
        converse(1000);
        release(&queues[0]);
        release(&queues[1]);
}

/* Exchange something over a new connection. */
static void use_tcp(void)
{
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
        socklen_t size = sizeof address;
        int listener = socket(AF_INET, SOCK_STREAM, 0), ends[2] = {socket(AF_INET, SOCK_STREAM, 0)};
        char byte;

        CHECK(bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 1) == 0);
        CHECK(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
        CHECK(connect(ends[0], (struct sockaddr *)&address, size) == 0);
        CHECK((ends[1] = accept(listener, NULL, NULL)) >= 0);
        for (int i = 0; i < 100; i++)
                CHECK(write(ends[i & 1], "x", 1) == 1 && read(ends[~i & 1], &byte, 1) == 1);
        close(ends[0]);
        close(ends[1]);
        close(listener);
}

/* Connections may be used past the library from now on, and are not accelerated. Verbs go on. */
static void bypassed(char **arguments)
{
        uint32_t ignored;

        (void)arguments;
        count = 2;
        start();
        open_device();
        pair_up(0);
        for (int i = 0; i < 2; i++)
                CHECK(dlopen("libm.so.6", RTLD_NOW | RTLD_DEEPBIND) && services->is_here() && !retirements);
        say("bypassed");
        hear();
        CHECK(services->reach(&ignored, 0) == 0);
        use_tcp();
        seed = 4;
        converse(1000);
        release(&queues[0]);
        release(&queues[1]);
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, NULL, 0, 0);
        CHECK(!services->is_here() && retirements == 1);
}

/* The process confines itself. */
static void confined(char **arguments)
{
        struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog filter = {.len = 1, .filter = &allow};
        struct verbs_message message;

        (void)arguments;
        start();
        open_device();
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && !retirements);
        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0 && retirements == 1);
        CHECK(!services->is_here() && services->reach(&epoch, 0) == ENODEV);
        CHECK(services->send(&epoch, sizeof epoch, services->epoch()) == ESTALE);
        CHECK(!services->receive(&message) && services->router_descriptor() < 0);
        CHECK(fcntl(told, F_GETFD) == -1);
}

/* There is no device, because of this errno. */
static void absent(char **arguments)
{
        int expected = atoi(arguments[0]);

        find_services();
        CHECK(services->attach(&client) == (expected != ENODEV));
        errno = EXDEV;
        CHECK(services->reach(&epoch, 100) == expected && errno == EXDEV);
}

static const struct {
        const char *name;
        int arguments;
        void (*run)(char **arguments);
} scenarios[] = {
    {"talk", 4, talk},
    {"alone", 3, alone},
    {"declined", 0, declined},
    {"restarted", 0, restarted},
    {"queue", 1, queue_of_messages},
    {"descriptors", 0, descriptors},
    {"children", 0, children},
    {"killed", 0, killed},
    {"bypassed", 0, bypassed},
    {"confined", 0, confined},
    {"absent", 1, absent},
};

int main(int argc, char **argv)
{
        signal(SIGPIPE, SIG_IGN);
        for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
                if (argc > 1 && strcmp(argv[1], scenarios[i].name) == 0 &&
                    argc == 2 + scenarios[i].arguments) {
                        scenarios[i].run(argv + 2);
                        return 0;
                }
        fprintf(stderr, "usage: see services.c\n");
        return 2;
}
