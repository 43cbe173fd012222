#include "router.h"

#include "arena.h"
#include "budget.h"
#include "calls.h"
#include "clock.h"
#include "family.h"
#include "lock.h"
#include "protocol.h"
#include "settings.h"
#include "statistics.h"
#include "sys.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

enum {
        RETRY = 1000,        /* ms between attempts to reach a router that isn't there */
        SEND_PATIENCE = 20,  /* ms that what must not be lost waits for room */
        EAGER_PATIENCE = 3,  /* ms */
        LONGEST_SPIN = 1000, /* us */
};

#define BUILD_ID_SIZE 32
extern const char freeflow_build[BUILD_ID_SIZE];

struct settings settings = {.enabled = 1,
                            .operations = 4,
                            .age = 10000,
                            .bytes = 0,
                            .bulk = 1 << 20,
                            .spin = 50,
                            .ring_limit = RING_SIZE};

static struct {
        struct lock lock;
        int fd; /* 1 + descriptor */
        _Atomic uint32_t epoch;
        uint32_t failed; /* ticks() of the last failure, 0: none */
        _Atomic uint32_t looked;
} router;

/* Descriptors that came with a message: whoever keeps one puts -1 in its place. */
enum { MOST_DESCRIPTORS = 4 };
struct given {
        int fds[MOST_DESCRIPTORS];
        int count;
};

uint32_t router_epoch(void)
{
        return atomic_load_explicit(&router.epoch, memory_order_relaxed);
}

static void disconnect(long why)
{
        /* Closed by a call that we didn't see: the number is whose it is now, and the router is there. */
        bool lost = why == -EBADF || why == -ENOTSOCK;

        if (router.fd && lost) {
                own_lost();
                fd_set_word(router.fd - 1, 0);
        } else if (router.fd)
                close_own(router.fd - 1);
        router.fd = 0;
        router.failed = lost ? 0 : ticks() | 1;
        atomic_fetch_add(&router.epoch, 1);
}

/* Returns 0, or an errno. */
static int say(const void *message, size_t size, int patience)
{
        struct iovec vec = {.iov_base = (void *)(uintptr_t)message, .iov_len = size};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};

        if (!router.fd)
                return ENOTCONN;
        for (;;) {
                long sent = sys_3(SYS_sendmsg, router.fd - 1, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
                struct pollfd room = {.fd = router.fd - 1, .events = POLLOUT};
                struct timespec time = {.tv_nsec = (long)patience * 1000000};

                if (sent >= 0)
                        return 0;
                if (sent == -EINTR)
                        continue;
                if (sent != -EAGAIN) {
                        disconnect(sent);
                        return (int)-sent;
                }
                if (!patience || sys_5(SYS_ppoll, &room, 1, &time, 0, 0) <= 0)
                        return EAGAIN;
                patience = 0;
        }
}

static bool call(void)
{
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        const char *path = environment("FREEFLOW_ROUTER");
        struct hello hello = {.message = {.kind = HELLO, .size = sizeof hello},
                              .version = PROTOCOL_VERSION,
                              .layout_version = FREEFLOW_VERSION};
        size_t length;
        int fd;

        if (router.fd)
                return true;
        if (router.failed && (int32_t)(ticks() - router.failed) < RETRY)
                return false;
        path = path ? path : ROUTER_SOCKET;
        length = strlen(path);
        if (length >= sizeof address.sun_path)
                return false;
        memcpy(address.sun_path, path, length);
        fd =
            own_descriptor((int)sys_3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        if (fd < 0) {
                router.failed = ticks() | 1;
                return false;
        }
        if (sys_3(SYS_connect, fd, &address, offsetof(struct sockaddr_un, sun_path) + length + 1) < 0) {
                close_own(fd);
                router.failed = ticks() | 1;
                return false;
        }
        router.fd = fd + 1;
        router.failed = 0;
        memcpy(hello.build, freeflow_build, sizeof hello.build);
        return say(&hello, sizeof hello, 0) == 0;
}

/* What somebody waits for: a socket that has been lost is replaced. */
static bool say_surely(const void *message, size_t size)
{
        for (int i = 0; i < 2; i++) {
                int failed = call() ? say(message, size, 0) : ENOTCONN;

                if (failed != EBADF && failed != ENOTSOCK)
                        return !failed;
        }
        return false;
}

/* A signal handler that comes while its thread is in here does without the router. */
static bool enter(enum taken *taken)
{
        *taken = lock_take(&router.lock, self());
        return *taken == LOCK_TAKEN;
}

void router_connect(void)
{
        enum taken taken;

        if (!process.on || settings.welcomed || !in_this_process() || !enter(&taken))
                return;
        call();
        lock_release(&router.lock, taken);
}

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

bool router_request(struct end *end, int fd)
{
        struct request request = {.message = {.kind = REQUEST, .size = sizeof request},
                                  .connection = end_number(end)};
        uint32_t size = sizeof request.cookie;
        enum taken taken;
        bool asked = false;

        if (!enter(&taken))
                return false;
        /* Two threads may have come this far: asked twice, the two ends could be given different slots. */
        if (atomic_load(&end->stage) == STAGE_CANDIDATE && call() &&
            name_of(fd, SYS_getsockname, &request.local) && name_of(fd, SYS_getpeername, &request.remote) &&
            sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_COOKIE, &request.cookie, &size) == 0) {
                uint32_t stage = STAGE_CANDIDATE;

                if (is_loopback(&request.remote) && !process.loopback) {
                        atomic_store(&end->reason, REASON_FOREIGN);
                        atomic_compare_exchange_strong(&end->stage, &stage, STAGE_REFUSED);
                } else {
                        atomic_store(&end->cookie, request.cookie);
                        atomic_store(&end->epoch, atomic_load(&router.epoch));
                        asked = atomic_compare_exchange_strong(&end->stage, &stage, STAGE_REQUESTED) &&
                                say(&request, sizeof request, 0) == 0;
                        stage = STAGE_REQUESTED;
                        if (asked)
                                statistics_count(&statistics.asked);
                        else
                                atomic_compare_exchange_strong(&end->stage, &stage, STAGE_CANDIDATE);
                }
        }
        lock_release(&router.lock, taken);
        return asked;
}

/* The end that an answer is for, STAGE_ANSWERING; NULL: there is none any more. */
static struct end *asked_for(uint32_t connection, uint64_t cookie)
{
        struct end *end = connection < ENDS ? &family->ends[connection] : NULL;
        uint32_t asked = STAGE_REQUESTED, answered = STAGE_ANSWERING;

        if (!end || !atomic_compare_exchange_strong(&end->stage, &asked, STAGE_ANSWERING))
                return NULL;
        /* Now it stays what it is: but what is it? */
        if (atomic_load(&end->generation) & 1 && atomic_load(&end->cookie) == cookie)
                return end;
        atomic_compare_exchange_strong(&end->stage, &answered, STAGE_REQUESTED);
        return NULL;
}

static void answered(struct end *end, uint32_t reason)
{
        uint32_t stage = STAGE_ANSWERING;

        atomic_store(&end->reason, reason);
        atomic_compare_exchange_strong(&end->stage, &stage, reason ? STAGE_REFUSED : STAGE_GRANTED);
        statistics_count(reason ? &statistics.refused : &statistics.granted);
}

static void granted(const struct grant *grant, struct given *given)
{
        struct end *end = asked_for(grant->connection, grant->cookie);
        uint32_t reason;

        if (!end) {
                reason = REASON_NOT_FOUND;
        } else {
                reason = end_held_elsewhere(end)
                             ? REASON_SHARED
                             : arena_attach(end, grant->arena, grant->token, grant->side, grant->slot,
                                            grant->incarnation, given->fds[0], &given->fds[1]);
                answered(end, reason);
        }
        if (reason) {
                struct release release = {.message = {.kind = RELEASE, .size = sizeof release},
                                          .slot = grant->slot,
                                          .arena = grant->arena,
                                          .incarnation = grant->incarnation,
                                          .token = grant->token};

                say(&release, sizeof release, SEND_PATIENCE);
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

static void take(const void *buffer, size_t size, struct given *given)
{
        const struct message *message = buffer;

        switch (message->kind) {
        case WELCOME: {
                const struct welcome *welcome = buffer;

                if (size != sizeof *welcome || welcome->version != PROTOCOL_VERSION ||
                    welcome->layout_version != FREEFLOW_VERSION) {
                        settings.enabled = 0;
                        break;
                }
                if (!settings.welcomed)
                        budget_start();
                settings.welcomed = true;
                settings.enabled = welcome->enabled;
                settings.operations = chosen("FREEFLOW_UPGRADE_OPERATIONS", welcome->operations);
                settings.age = chosen("FREEFLOW_UPGRADE_AGE", welcome->age);
                settings.bytes = chosen("FREEFLOW_UPGRADE_BYTES", welcome->bytes);
                settings.bulk = chosen("FREEFLOW_UPGRADE_BULK", welcome->bulk);
                settings.spin = at_most(chosen("FREEFLOW_SPIN", welcome->spin), LONGEST_SPIN);
                /* What the host allows is the most that a container may choose. */
                settings.ring_limit = at_most(chosen("FREEFLOW_RING_LIMIT", welcome->ring_limit),
                                              at_most(welcome->ring_limit, RING_SIZE));
                if (settings.ring_limit < PAGE)
                        settings.ring_limit = PAGE;
                break;
        }
        case GRANT:
                if (size == sizeof(struct grant) && given->count)
                        granted(buffer, given);
                break;
        case REFUSE: {
                const struct refuse *refuse = buffer;
                struct end *end =
                    size == sizeof *refuse ? asked_for(refuse->connection, refuse->cookie) : NULL;

                if (end)
                        answered(end, refuse->reason ? refuse->reason : REASON_OFF);
                break;
        }
        case HEAR:
        case RING: {
                const struct bell *bell = buffer;

                if (size != sizeof *bell)
                        break;
                if (message->kind == HEAR)
                        bell_received(bell->arena, bell->side, bell->index, &given->fds[0]);
                else
                        bell_ringer_received(bell->arena, bell->side, bell->index, &given->fds[0]);
                break;
        }
        default:
                break;
        }
        for (int i = 0; i < given->count; i++)
                if (given->fds[i] >= 0)
                        bell_discard(given->fds[i]);
}

/* Take one message; false: there is none. */
static bool listen_once(void)
{
        union {
                struct cmsghdr header;
                char room[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
        } control;
        union {
                struct message message;
                struct welcome welcome;
                struct grant grant;
                uint64_t words[32];
        } buffer;
        struct iovec vec = {.iov_base = &buffer, .iov_len = sizeof buffer};
        struct msghdr header = {
            .msg_iov = &vec, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
        struct given given = {.fds = {-1, -1, -1, -1}};
        long got;

        if (!router.fd)
                return false;
        got = sys_3(SYS_recvmsg, router.fd - 1, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got == -EAGAIN || got == -EINTR)
                return false;
        if (got < (long)sizeof buffer.message) {
                disconnect(got);
                return false;
        }
        for (struct cmsghdr *part = CMSG_FIRSTHDR(&header); part; part = CMSG_NXTHDR(&header, part))
                if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS &&
                    part->cmsg_len > CMSG_LEN(0)) {
                        size_t bytes = part->cmsg_len - CMSG_LEN(0);

                        bytes = bytes < sizeof given.fds ? bytes : sizeof given.fds;
                        memcpy(given.fds, CMSG_DATA(part), bytes);
                        given.count = (int)(bytes / sizeof(int));
                }
        take(&buffer, (size_t)got, &given);
        return true;
}

/* For tests: who asks early gets the answer early, instead of some operations later. */
static void look_eagerly(struct end *end)
{
        uint64_t deadline = now() + EAGER_PATIENCE * UINT64_C(1000000);
        enum taken taken;

        if (!enter(&taken))
                return;
        while (router.fd && atomic_load(&end->stage) == STAGE_REQUESTED) {
                struct pollfd answer = {.fd = router.fd - 1, .events = POLLIN};
                struct timespec time = {.tv_nsec = 1000000};

                if (listen_once())
                        continue;
                if (now() >= deadline)
                        break;
                sys_5(SYS_ppoll, &answer, 1, &time, 0, 0);
        }
        lock_release(&router.lock, taken);
}

void router_poll(struct end *end)
{
        uint32_t tick = ticks();
        enum taken taken;

        if (process.eager && atomic_load_explicit(&end->operations, memory_order_relaxed) < 4) {
                look_eagerly(end);
                return;
        }

        /* At first after every few operations, then with the clock. */
        if (atomic_load_explicit(&router.looked, memory_order_relaxed) == tick &&
            atomic_load_explicit(&end->operations, memory_order_relaxed) % 8)
                return;
        atomic_store_explicit(&router.looked, tick, memory_order_relaxed);
        if (!enter(&taken))
                return;
        while (listen_once())
                ;
        lock_release(&router.lock, taken);
}

void router_receive(void)
{
        enum taken taken;

        if (!enter(&taken))
                return;
        while (listen_once())
                ;
        lock_release(&router.lock, taken);
}

void router_note(struct end *end, uint32_t reason)
{
        struct note note = {.message = {.kind = NOTE, .size = sizeof note},
                            .reason = reason,
                            .cookie = atomic_load(&end->cookie)};
        enum taken taken;

        statistics_reason(reason);
        if (!note.cookie || !enter(&taken))
                return;
        if (router.fd)
                say(&note, sizeof note, 0);
        lock_release(&router.lock, taken);
}

static bool say_bell(uint16_t kind, uint64_t arena, uint64_t token, uint32_t side, uint32_t index)
{
        struct bell bell = {.message = {.kind = kind, .size = sizeof bell},
                            .index = index,
                            .arena = arena,
                            .token = token,
                            .side = side};
        enum taken taken;
        bool sent;

        if (!enter(&taken))
                return false;
        sent = say_surely(&bell, sizeof bell);
        lock_release(&router.lock, taken);
        return sent;
}

bool router_bell(uint64_t arena, uint64_t token, uint32_t side, uint32_t index)
{
        return say_bell(BELL, arena, token, side, index);
}

void router_fetch(uint64_t arena, uint64_t token, uint32_t side, uint32_t index)
{
        say_bell(FETCH, arena, token, side, index);
}

void router_release(uint64_t arena, uint64_t token, uint32_t slot, uint64_t incarnation)
{
        struct release release = {.message = {.kind = RELEASE, .size = sizeof release},
                                  .slot = slot,
                                  .arena = arena,
                                  .incarnation = incarnation,
                                  .token = token};
        enum taken taken;

        if (!enter(&taken))
                return;
        if (router.fd)
                say(&release, sizeof release, SEND_PATIENCE);
        lock_release(&router.lock, taken);
}

/* The socket is the parent's: a child calls on its own. */
void router_forked(void)
{
        atomic_store(&router.lock.word, 0);
        if (router.fd)
                close_own(router.fd - 1);
        router.fd = 0;
        router.failed = 0;
        atomic_fetch_add(&router.epoch, 1);
}

void router_retire(void)
{
        enum taken taken;

        if (!enter(&taken))
                return;
        disconnect(0);
        lock_release(&router.lock, taken);
}
