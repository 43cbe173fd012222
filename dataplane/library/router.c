#include "router.h"

#include "clock.h"
#include "hooks.h"
#include "own.h"
#include "protocol.h"
#include "settings.h"
#include "statistics.h"
#include "sys.h"
#include "verbs_protocol.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

enum {
        PATIENCE = 20, /* ms that a message which must not be lost waits for room */
        RETRY = 1000,  /* ms between attempts to reach a router that isn't there */
        MOST_DESCRIPTORS = 4,
};

static const char build[sizeof((struct hello *)0)->build] = FREEFLOW_BUILD;

static struct {
        struct lock lock;
        int fd; /* 1 + descriptor */
        bool held;
        _Atomic uint32_t epoch;
        uint32_t failed; /* ticks() of the last failure, 0: none */
} router;

uint32_t router_epoch(void)
{
        return load_relaxed(&router.epoch);
}

bool router_begin(void)
{
        return lock_take(&router.lock, self()) == LOCK_TAKEN;
}

void router_end(void)
{
        lock_release(&router.lock, LOCK_TAKEN);
}

static void disconnect(long why)
{
        /* Closed by a call that the library did not see: the number may be the program's now, and
         * the router is still there. */
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

/* False: there is no room within so many ms. */
static bool wait_for_room(int fd, int patience)
{
        struct pollfd room = {.fd = fd, .events = POLLOUT};
        struct timespec time = {.tv_nsec = (long)patience * 1000000};

        return patience && sys_5(SYS_ppoll, &room, 1, &time, 0, 0) > 0;
}

int router_send(const void *message, size_t size, int patience)
{
        struct iovec vec = {.iov_base = (void *)(uintptr_t)message, .iov_len = size};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};

        if (!router.fd)
                return ENOTCONN;
        for (;;) {
                long sent = sys_3(SYS_sendmsg, router.fd - 1, &header, MSG_DONTWAIT | MSG_NOSIGNAL);

                if (sent >= 0)
                        return 0;
                if (sent == -EINTR)
                        continue;
                if (sent != -EAGAIN) {
                        disconnect(sent);
                        return (int)-sent;
                }
                if (!wait_for_room(router.fd - 1, patience))
                        return EAGAIN;
                patience = 0;
        }
}

static bool failed(int fd)
{
        if (fd >= 0)
                close_own(fd);
        router.failed = ticks() | 1;
        return false;
}

bool router_reach(void)
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
        if (fd < 0 ||
            sys_3(SYS_connect, fd, &address, offsetof(struct sockaddr_un, sun_path) + length + 1) < 0)
                return failed(fd);
        router.fd = fd + 1;
        router.failed = 0;
        memcpy(hello.build, build, sizeof hello.build);
        return router_send(&hello, sizeof hello, 0) == 0;
}

void router_connect(void)
{
        if (!process.on || settings.welcomed || !in_this_process() || !router_begin())
                return;
        router_reach();
        router_end();
}

/* --- receiving --- */

/* Take one message; false: there is none. */
static bool receive_one(void)
{
        union {
                struct cmsghdr header;
                char room[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
        } control;
        union {
                struct message message;
                struct welcome welcome;
                struct grant grant;
                struct v_connection connection; /* the longest */
        } buffer;
        struct iovec vec = {.iov_base = &buffer, .iov_len = sizeof buffer};
        struct msghdr header = {
            .msg_iov = &vec, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
        int descriptors[MOST_DESCRIPTORS] = {-1, -1, -1, -1}, count = 0;
        long got;

        if (!router.fd || router.held)
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

                        bytes = bytes < sizeof descriptors ? bytes : sizeof descriptors;
                        memcpy(descriptors, CMSG_DATA(part), bytes);
                        count = (int)(bytes / sizeof(int));
                }
        hooks.received(&buffer, (size_t)got, descriptors, count);
        return true;
}

void router_take(void)
{
        while (receive_one())
                ;
}

void router_receive(void)
{
        if (!router_begin())
                return;
        router_take();
        router_end();
}

void router_hold(bool held)
{
        router.held = held;
}

int router_descriptor(void)
{
        return router.fd - 1;
}

/* --- sending --- */

/* Send a message that somebody waits for: a socket that has been lost is replaced. */
static bool send_surely(const void *message, size_t size)
{
        int failure = EBADF;

        if (!router_begin())
                return false;
        for (int i = 0; i < 2 && (failure == EBADF || failure == ENOTSOCK); i++)
                failure = router_reach() ? router_send(message, size, 0) : ENOTCONN;
        router_end();
        return !failure;
}

void router_note(struct end *end, uint32_t reason)
{
        struct note note = {.message = {.kind = NOTE, .size = sizeof note},
                            .reason = reason,
                            .cookie = atomic_load(&end->cookie)};

        statistics_reason(reason);
        if (!note.cookie || !router_begin())
                return;
        router_send(&note, sizeof note, 0);
        router_end();
}

bool router_bell(uint16_t kind, uint64_t arena, uint64_t token, uint32_t side, uint32_t index)
{
        struct bell bell = {.message = {.kind = kind, .size = sizeof bell},
                            .index = index,
                            .arena = arena,
                            .token = token,
                            .side = side};

        return send_surely(&bell, sizeof bell);
}

struct release release_of(uint64_t arena, uint64_t token, uint32_t slot, uint64_t incarnation)
{
        return (struct release){.message = {.kind = RELEASE, .size = sizeof(struct release)},
                                .slot = slot,
                                .arena = arena,
                                .incarnation = incarnation,
                                .token = token};
}

void router_send_release(const struct release *release)
{
        router_send(release, sizeof *release, PATIENCE);
}

void router_release(const struct release *release)
{
        int patience = PATIENCE, failure, fd;
        bool wait;

        do {
                if (!router_begin())
                        return;
                failure = router_send(release, sizeof *release, 0);
                fd = router_descriptor();
                router_end();
                /* Without the lock: there may be no room until another thread has read what the
                 * router says. */
                wait = failure == EAGAIN && wait_for_room(fd, patience);
                patience = 0;
        } while (wait);
}

/* The socket is the parent's: a child makes its own. */
void router_forked(void)
{
        atomic_store(&router.lock.word, 0);
        if (router.fd)
                close_own(router.fd - 1);
        router.fd = 0;
        router.failed = 0;
        atomic_fetch_add(&router.epoch, 1);
}

void router_disconnect(void)
{
        if (!router_begin())
                return;
        disconnect(0);
        router_end();
}
