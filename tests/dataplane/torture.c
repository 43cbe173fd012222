/* Bytes of many connections between two processes, by every call with which a program can wait,
 * read and write.
 *
 *      torture server ADDRESS PORT
 *      torture client ADDRESS PORT SECONDS SEED CONNECTIONS THREADS
 *
 * The client plays rounds until its time is over. In a round each side forks a worker; the two
 * workers have some connections, on each of which several threads (of several processes, if the
 * round says so) read and write at once. The seed determines each byte of a stream, so every reader
 * knows what to expect.
 *
 * In an ordered stream one thread at a time reads, while others wait in other calls. In an
 * unordered one all read and write at once, and the readers count how often each byte value came.
 * Waits have no time limit, so a lost wake-up is a stall. A stall ends both sides with a list of
 * the calls that the threads wait in.
 *
 * In a round of loops all connections of a worker are in one epoll instance, each level-triggered,
 * edge-triggered or one-shot, and several threads wait there: without a time limit, for a moment,
 * not at all, in an outer instance or in poll(). Helpers fill and drain the same connections, each
 * time that a loop has had an event and never by themselves. So after a lost wake-up no thread
 * moves any bytes. Connections move to rings meanwhile. TORTURE_LOOPS=1: no other rounds.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
        PATIENCE = 10,     /* seconds without progress are a stall */
        CONNECTIONS = 256, /* at most */
        WAITERS = 4096,
        CHUNK = 256 * 1024, /* at most in one call */
        STOP = 0xffff,      /* number of a connection that ends the last round */
        LARGE = 1 << 20,
        HELPERS = 2,
};

enum mode {
        MODE_FORK = 1,      /* two processes at each end */
        MODE_SIGNALS = 2,   /* threads are interrupted all the time */
        MODE_KILL_US = 4,   /* the client's worker is killed in the middle */
        MODE_KILL_THEM = 8, /* the server's is */
        MODE_UNORDERED = 16,
        MODE_NONBLOCK = 32,
        MODE_DUP = 64,
        MODE_TOGGLE = 128, /* O_NONBLOCK changes while others wait */
        MODE_WARM = 256,   /* ping-pong first, until the connections are on rings */
        MODE_LOOPS = 512,
};

struct header {
        uint64_t magic, seed, total[2]; /* bytes client -> server, server -> client */
        uint32_t round, number, connections, threads, mode, unused;
};

struct stream {
        pthread_mutex_t turn;  /* held by the thread that reads, or writes, an ordered stream */
        _Atomic uint64_t next; /* first byte that no thread has claimed */
        _Atomic uint64_t done; /* bytes moved */
        _Atomic uint64_t counts[256];
        _Atomic bool over;
};

struct connection {
        struct header header;
        int fd;
        struct stream in, out;
        /* In loops: both streams are over; a thread has the one-shot event; the events registered
         * with epoll.
         */
        _Atomic bool finished, handled;
        uint32_t told;
};

struct waiter {
        _Atomic pid_t thread;
        _Atomic int number;
        _Atomic(const char *) what;
};

/* What the processes of one side share. */
struct shared {
        struct connection connections[CONNECTIONS];
        struct waiter waiters[WAITERS];
        _Atomic uint32_t waiting;
        _Atomic uint64_t operations, bytes, stalled;
        _Atomic uint32_t unfinished; /* connections of a round of loops that aren't over */
};

struct task {
        struct connection *connection;
        struct waiter *waiter;
        uint64_t random;
        bool writes;
};

static struct shared *shared;
/* For each connection an epoll instance that all threads of this process wait in. */
static int common[CONNECTIONS];
static bool is_server;
static struct header running;

static void fail(const char *what, int line)
{
        fprintf(stderr, "%s: %s: %s (line %d, seed %llu, round %u, mode %u)\n",
                is_server ? "server" : "client", what, strerror(errno), line,
                (unsigned long long)running.seed, running.round, running.mode);
        _exit(1);
}

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static uint64_t mix(uint64_t x)
{
        x += UINT64_C(0x9e3779b97f4a7c15);
        x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
        return x ^ (x >> 31);
}

static uint64_t any(uint64_t *state, uint64_t below)
{
        *state = mix(*state);
        return *state % below;
}

/* Byte `place` of a stream with this salt, `size` of them. */
static void fill(uint8_t *to, uint64_t salt, uint64_t place, size_t size)
{
        while (size) {
                uint64_t word = mix(salt ^ (place >> 3) * 8);
                size_t skip = place & 7, part = 8 - skip < size ? 8 - skip : size;

                word >>= skip * 8;
                memcpy(to, &word, part);
                to += part;
                place += part;
                size -= part;
        }
}

static uint64_t salt_of(struct connection *connection, bool out)
{
        return mix(connection->header.seed * 1000 + connection->header.number * 2 + (out == is_server));
}

static uint64_t total_of(struct connection *connection, bool out)
{
        return connection->header.total[out == is_server];
}

static bool may_break(void)
{
        return running.mode & (MODE_KILL_US | MODE_KILL_THEM);
}

static bool is_end(int error)
{
        return may_break() && (error == ECONNRESET || error == EPIPE);
}

/* --- waiting */

static void wait_own_epoll(int fd, bool out, uint32_t flags)
{
        struct epoll_event event = {.events = (out ? EPOLLOUT : EPOLLIN | EPOLLRDHUP) | flags};
        int instance = epoll_create1(EPOLL_CLOEXEC);

        CHECK(instance >= 0);
        CHECK(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event) == 0);
        CHECK(epoll_wait(instance, &event, 1, -1) >= 0 || errno == EINTR);
        close(instance);
}

/* An epoll instance in poll(), or in another instance. */
static void wait_nested(int fd, bool out, bool by_poll)
{
        struct epoll_event event = {.events = out ? EPOLLOUT : EPOLLIN};
        int inner = epoll_create1(EPOLL_CLOEXEC), outer = epoll_create1(EPOLL_CLOEXEC);
        struct pollfd poll_inner = {.fd = inner, .events = POLLIN};

        CHECK(inner >= 0 && outer >= 0);
        CHECK(epoll_ctl(inner, EPOLL_CTL_ADD, fd, &event) == 0);
        if (by_poll) {
                CHECK(poll(&poll_inner, 1, -1) >= 0 || errno == EINTR);
        } else {
                event.events = EPOLLIN;
                CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, inner, &event) == 0);
                CHECK(epoll_wait(outer, &event, 1, -1) >= 0 || errno == EINTR);
        }
        close(outer);
        close(inner);
}

static void wait_select(int fd, bool out, bool p)
{
        fd_set set;
        int result;

        FD_ZERO(&set);
        FD_SET(fd, &set);
        if (p)
                result = pselect(fd + 1, out ? NULL : &set, out ? &set : NULL, NULL, NULL, NULL);
        else
                result = select(fd + 1, out ? NULL : &set, out ? &set : NULL, NULL, NULL);
        CHECK(result >= 0 || errno == EINTR);
}

static void wait_shared(struct connection *connection)
{
        struct epoll_event event;

        CHECK(epoll_wait(common[connection->header.number], &event, 1, -1) >= 0 || errno == EINTR);
}

static void wait_for(struct task *task, int fd)
{
        struct pollfd one = {.fd = fd, .events = task->writes ? POLLOUT : POLLIN};
        uint64_t means = any(&task->random, 10);

        if (fd >= FD_SETSIZE && (means == 2 || means == 3))
                means = 0;
        if (task->writes && means == 9)
                means = 1;
        switch (means) {
#define BY(number, call)                                                                                     \
        case number:                                                                                         \
                atomic_store(&task->waiter->what, task->writes ? #call " to write" : #call " to read");      \
                call;                                                                                        \
                break;
                BY(0, (void)poll(&one, 1, -1))
                BY(1, (void)ppoll(&one, 1, NULL, NULL))
                BY(2, wait_select(fd, task->writes, false))
                BY(3, wait_select(fd, task->writes, true))
                BY(4, wait_own_epoll(fd, task->writes, 0))
                BY(5, wait_own_epoll(fd, task->writes, EPOLLET))
                BY(6, wait_own_epoll(fd, task->writes, EPOLLONESHOT))
                BY(7, wait_nested(fd, task->writes, true))
                BY(8, wait_nested(fd, task->writes, false))
                BY(9, wait_shared(task->connection))
#undef BY
        }
        atomic_store(&task->waiter->what, "running");
}

/* --- moving bytes */

static ssize_t read_some(struct task *task, int fd, uint8_t *to, size_t size, bool wait)
{
        struct iovec parts[2] = {{to, size / 2}, {to + size / 2, size - size / 2}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        struct mmsghdr several = {.msg_hdr = message};
        int flags = wait ? 0 : MSG_DONTWAIT;
        ssize_t got;

        atomic_store(&task->waiter->what, wait ? "blocking read" : "read at once");
        switch (any(&task->random, wait ? 6 : 4)) {
        case 0:
                got = recv(fd, to, size, flags);
                break;
        case 1:
                got = recvmsg(fd, &message, flags);
                break;
        case 2:
                got = recvfrom(fd, to, size, flags, NULL, NULL);
                break;
        case 3:
                got = recvmmsg(fd, &several, 1, flags, NULL) == 1 ? (ssize_t)several.msg_len : -1;
                break;
        case 4:
                got = read(fd, to, size);
                break;
        default:
                got = readv(fd, parts, 2);
        }
        atomic_store(&task->waiter->what, "running");
        return got;
}

/* The kernel moves them: from a file, or from a pipe. */
static ssize_t send_file(int fd, const uint8_t *from, size_t size)
{
        off_t offset = 0;
        int file = memfd_create("torture", MFD_CLOEXEC);
        ssize_t sent;

        CHECK(file >= 0);
        CHECK(write(file, from, size) == (ssize_t)size);
        sent = sendfile(fd, file, &offset, size);
        CHECK(sent < 0 || offset == sent);
        close(file);
        return sent;
}

static ssize_t send_spliced(int fd, const uint8_t *from, size_t size)
{
        int ends[2];
        ssize_t sent;

        if (size > 4096)
                size = 4096;
        CHECK(pipe2(ends, O_CLOEXEC) == 0);
        CHECK(write(ends[1], from, size) == (ssize_t)size);
        sent = splice(ends[0], NULL, fd, NULL, size, 0);
        close(ends[0]);
        close(ends[1]);
        return sent;
}

static ssize_t write_some(struct task *task, int fd, const uint8_t *from, size_t size, bool wait)
{
        struct iovec parts[2] = {{(void *)(uintptr_t)from, size / 3},
                                 {(void *)(uintptr_t)(from + size / 3), size - size / 3}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        struct mmsghdr several = {.msg_hdr = message};
        int flags = MSG_NOSIGNAL | (wait ? 0 : MSG_DONTWAIT);
        ssize_t sent;

        atomic_store(&task->waiter->what, wait ? "blocking write" : "write at once");
        switch (any(&task->random, wait ? 8 : 4)) {
        case 0:
                sent = send(fd, from, size, flags);
                break;
        case 1:
                sent = sendmsg(fd, &message, flags);
                break;
        case 2:
                sent = sendto(fd, from, size, flags, NULL, 0);
                break;
        case 3:
                sent = sendmmsg(fd, &several, 1, flags) == 1 ? (ssize_t)several.msg_len : -1;
                break;
        case 4:
                sent = write(fd, from, size);
                break;
        case 5:
                sent = writev(fd, parts, 2);
                break;
        case 6:
                sent = send_file(fd, from, size);
                break;
        default:
                sent = send_spliced(fd, from, size);
        }
        atomic_store(&task->waiter->what, "running");
        return sent;
}

static size_t some_size(uint64_t *random, bool is_large)
{
        switch (any(random, 8)) {
        case 0:
                return 1;
        case 1:
                return 1 + any(random, is_large ? CHUNK : 8192);
        case 2:
                return 1 + any(random, is_large ? 65536 : 4096);
        default:
                return 1 + any(random, 600);
        }
}

static void progress(uint64_t bytes)
{
        atomic_fetch_add(&shared->operations, 1);
        atomic_fetch_add(&shared->bytes, bytes);
}

static void compare(struct connection *connection, uint64_t place, const uint8_t *got, size_t size,
                    const char *how)
{
        uint8_t wanted[4096];

        for (size_t done = 0; done < size; done += sizeof wanted) {
                size_t part = size - done < sizeof wanted ? size - done : sizeof wanted;

                fill(wanted, salt_of(connection, false), place + done, part);
                for (size_t i = 0; i < part; i++)
                        if (wanted[i] != got[done + i]) {
                                fprintf(
                                    stderr, "%s: byte %llu of connection %u is wrong (%s of %zu at %llu)\n",
                                    is_server ? "server" : "client", (unsigned long long)(place + done + i),
                                    connection->header.number, how, size, (unsigned long long)place);
                                errno = 0;
                                fail("wrong byte", __LINE__);
                        }
        }
}

static void peek(struct task *task, int fd, uint8_t *buffer, uint64_t place)
{
        int unread = -1;
        ssize_t got = recv(fd, buffer, some_size(&task->random, false), MSG_PEEK | MSG_DONTWAIT);

        if (got > 0) {
                compare(task->connection, place, buffer, (size_t)got, "peek");
                CHECK(ioctl(fd, FIONREAD, &unread) == 0);
                CHECK(unread >= got);
        }
}

static bool read_ordered(struct task *task, int fd, uint8_t *buffer, bool wait)
{
        struct stream *in = &task->connection->in;
        size_t size = some_size(&task->random, total_of(task->connection, false) > LARGE);
        uint64_t place;
        ssize_t got;

        atomic_store(&task->waiter->what, "its turn to read");
        CHECK(pthread_mutex_lock(&in->turn) == 0);
        place = atomic_load(&in->done);
        if (any(&task->random, 16) == 0)
                peek(task, fd, buffer, place);
        got = read_some(task, fd, buffer, size, wait);
        if (got > 0) {
                compare(task->connection, place, buffer, (size_t)got, "read");
                atomic_store(&in->done, place + (uint64_t)got);
                progress((uint64_t)got);
        } else if (got == 0) {
                atomic_store(&in->over, true);
        }
        CHECK(pthread_mutex_unlock(&in->turn) == 0);
        if (got >= 0)
                return true;
        if (is_end(errno))
                atomic_store(&in->over, true);
        else
                CHECK(errno == EAGAIN || errno == EINTR);
        return atomic_load(&in->over);
}

static bool read_unordered(struct task *task, int fd, uint8_t *buffer, bool wait)
{
        struct stream *in = &task->connection->in;
        size_t size = some_size(&task->random, total_of(task->connection, false) > LARGE);
        ssize_t got = read_some(task, fd, buffer, size, wait);

        if (got > 0) {
                for (ssize_t i = 0; i < got; i++)
                        atomic_fetch_add_explicit(&in->counts[buffer[i]], 1, memory_order_relaxed);
                atomic_fetch_add(&in->done, (uint64_t)got);
                progress((uint64_t)got);
                return true;
        }
        if (got == 0 || is_end(errno)) {
                atomic_store(&in->over, true);
                return true;
        }
        CHECK(errno == EAGAIN || errno == EINTR);
        return false;
}

/* Send all bytes, by any call. If the stream is ordered, no other thread may send in between. */
static bool write_whole(struct task *task, int fd, const uint8_t *from, size_t size)
{
        struct stream *out = &task->connection->out;

        for (size_t done = 0; done < size;) {
                bool wait = any(&task->random, 3) == 0;
                ssize_t sent = write_some(task, fd, from + done, size - done, wait);

                if (sent > 0) {
                        done += (size_t)sent;
                        atomic_fetch_add(&out->done, (uint64_t)sent);
                        progress((uint64_t)sent);
                } else if (is_end(errno)) {
                        atomic_store(&out->over, true);
                        return false;
                } else {
                        CHECK(sent < 0 && (errno == EAGAIN || errno == EINTR));
                        if (errno == EAGAIN)
                                wait_for(task, fd);
                }
        }
        return true;
}

static void write_next(struct task *task, int fd, uint8_t *buffer)
{
        struct stream *out = &task->connection->out;
        uint64_t total = total_of(task->connection, true);
        size_t size = some_size(&task->random, total > LARGE);
        bool is_ordered = !(running.mode & MODE_UNORDERED);
        uint64_t place;

        if (is_ordered) {
                atomic_store(&task->waiter->what, "its turn to write");
                CHECK(pthread_mutex_lock(&out->turn) == 0);
        }
        place = atomic_fetch_add(&out->next, size);
        if (place < total) {
                if (size > total - place)
                        size = total - place;
                fill(buffer, salt_of(task->connection, true), place, size);
                write_whole(task, fd, buffer, size);
        }
        if (is_ordered)
                CHECK(pthread_mutex_unlock(&out->turn) == 0);
        if (atomic_load(&out->done) == total && !atomic_exchange(&out->over, true))
                CHECK(shutdown(task->connection->fd, SHUT_WR) == 0 || is_end(errno) || errno == ENOTCONN);
        if (place >= total)
                atomic_store(&task->waiter->what, "wrote all");
}

static void toggle(struct task *task, int fd)
{
        int flags = fcntl(fd, F_GETFL);

        CHECK(flags >= 0);
        CHECK(fcntl(fd, F_SETFL, any(&task->random, 2) ? flags | O_NONBLOCK : flags & ~O_NONBLOCK) == 0);
}

static void *work(void *argument)
{
        struct task *task = argument;
        struct connection *connection = task->connection;
        struct stream *stream = task->writes ? &connection->out : &connection->in;
        uint8_t *buffer = malloc(CHUNK);
        int fd = connection->fd;

        CHECK(buffer);
        atomic_store(&task->waiter->thread, (pid_t)syscall(SYS_gettid));
        while (!atomic_load(&stream->over)) {
                if (running.mode & MODE_DUP && any(&task->random, 8) == 0) {
                        if (fd != connection->fd)
                                close(fd);
                        fd = any(&task->random, 4) ? dup(connection->fd) : connection->fd;
                        CHECK(fd >= 0);
                }
                if (running.mode & MODE_TOGGLE && any(&task->random, 16) == 0)
                        toggle(task, fd);
                if (task->writes) {
                        if (atomic_load(&stream->next) >= total_of(connection, true))
                                break;
                        write_next(task, fd, buffer);
                } else {
                        bool is_ordered = !(running.mode & MODE_UNORDERED);
                        bool wait = any(&task->random, 4) == 0;

                        if (any(&task->random, 4) == 0)
                                wait_for(task, fd);
                        if (!(is_ordered ? read_ordered : read_unordered)(task, fd, buffer, wait))
                                wait_for(task, fd);
                }
        }
        if (fd != connection->fd)
                close(fd);
        free(buffer);
        atomic_store(&task->waiter->what, "over");
        atomic_store(&task->waiter->thread, 0);
        return NULL;
}

/* --- loops: several threads in one epoll instance */

static struct {
        int instance, outer;
        sem_t work; /* for the helpers */
} loops;

static bool is_finished(void)
{
        return running.mode & MODE_LOOPS && atomic_load(&shared->unfinished) == 0;
}

static uint32_t kind_number(const struct connection *connection)
{
        return mix(connection->header.seed + connection->header.number * 7 + connection->header.round * 77 +
                   is_server) %
               4;
}

static uint32_t kind_of(const struct connection *connection)
{
        static const uint32_t kinds[] = {0, EPOLLET, EPOLLONESHOT, EPOLLET | EPOLLONESHOT};

        return kinds[kind_number(connection)];
}

static uint32_t interest(struct connection *connection)
{
        return kind_of(connection) | (atomic_load(&connection->in.over) ? 0u : EPOLLIN | EPOLLRDHUP) |
               (atomic_load(&connection->out.over) ? 0u : EPOLLOUT);
}

/* One direction of a connection is over. If it was the last one, tell the other threads. */
static void finish(struct connection *connection, struct stream *stream)
{
        struct stream *other = stream == &connection->in ? &connection->out : &connection->in;
        bool last;

        if (atomic_exchange(&stream->over, true))
                return;
        progress(0);
        CHECK(pthread_mutex_lock(&connection->in.turn) == 0);
        last = atomic_load(&other->over) && !atomic_exchange(&connection->finished, true);
        CHECK(pthread_mutex_unlock(&connection->in.turn) == 0);
        if (last)
                atomic_fetch_sub(&shared->unfinished, 1);
}

/* No more bytes for now: a call has moved nothing, or less than requested, from which some programs
 * conclude this. */
enum much { ONCE, UNTIL_SHORT, UNTIL_NOTHING };

static bool goes_on(enum much much, ssize_t moved, size_t size)
{
        return much != ONCE && (moved > 0 ? much == UNTIL_NOTHING || (size_t)moved == size : errno == EINTR);
}

static void drain(struct task *task, struct connection *connection, uint8_t *buffer, enum much much)
{
        struct stream *in = &connection->in;
        size_t size;
        bool over = false;
        ssize_t got;

        CHECK(pthread_mutex_lock(&in->turn) == 0);
        do {
                uint64_t place = atomic_load(&in->done);

                if (atomic_load(&in->over))
                        break;
                size = 1 + any(&task->random, CHUNK);
                got = read_some(task, connection->fd, buffer, size, false);
                if (got > 0) {
                        compare(connection, place, buffer, (size_t)got, "loop");
                        atomic_store(&in->done, place + (uint64_t)got);
                        progress((uint64_t)got);
                } else if (got == 0 || is_end(errno)) {
                        over = true;
                } else {
                        CHECK(errno == EAGAIN || errno == EINTR);
                }
        } while (!over && goes_on(much, got, size));
        CHECK(pthread_mutex_unlock(&in->turn) == 0);
        if (over)
                finish(connection, in);
}

static void fill_up(struct task *task, struct connection *connection, uint8_t *buffer, enum much much)
{
        struct stream *out = &connection->out;
        uint64_t total = total_of(connection, true);
        bool over = false;
        ssize_t sent;
        size_t size;

        CHECK(pthread_mutex_lock(&out->turn) == 0);
        do {
                uint64_t place = atomic_load(&out->done);

                size = 1 + any(&task->random, any(&task->random, 2) ? CHUNK : 600);
                if (atomic_load(&out->over) || place == total)
                        break;
                if (size > total - place)
                        size = total - place;
                fill(buffer, salt_of(connection, true), place, size);
                sent = write_some(task, connection->fd, buffer, size, false);
                if (sent > 0) {
                        atomic_store(&out->done, place + (uint64_t)sent);
                        progress((uint64_t)sent);
                } else if (is_end(errno)) {
                        over = true;
                } else {
                        CHECK(errno == EAGAIN || errno == EINTR);
                }
                over = over || atomic_load(&out->done) == total;
        } while (!over && goes_on(much, sent, size));
        if (over && !atomic_load(&out->over))
                CHECK(shutdown(connection->fd, SHUT_WR) == 0 || is_end(errno) || errno == ENOTCONN);
        CHECK(pthread_mutex_unlock(&out->turn) == 0);
        if (over)
                finish(connection, out);
}

static void handle(struct task *task, const struct epoll_event *event, uint8_t *buffer)
{
        struct connection *connection = &shared->connections[event->data.u32];
        uint32_t kind = kind_of(connection);
        struct epoll_event next = {.data.u32 = event->data.u32};
        const uint32_t ended = EPOLLRDHUP | EPOLLHUP | EPOLLERR;
        enum much much = !(kind & EPOLLET)                                ? ONCE
                         : event->events & ended || any(&task->random, 2) ? UNTIL_NOTHING
                                                                          : UNTIL_SHORT;

        sem_post(&loops.work);
        if (kind & EPOLLONESHOT)
                CHECK(!atomic_exchange(&connection->handled, true));
        if (event->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                drain(task, connection, buffer, much);
        if (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
                fill_up(task, connection, buffer, much);
        CHECK(pthread_mutex_lock(&connection->out.turn) == 0);
        next.events = interest(connection);
        if (kind & EPOLLONESHOT)
                atomic_store(&connection->handled, false);
        /* With no event left to wait for, EPOLLHUP and EPOLLERR would be reported for ever. */
        if (kind & EPOLLONESHOT || next.events != connection->told)
                CHECK(epoll_ctl(loops.instance, next.events == kind ? EPOLL_CTL_DEL : EPOLL_CTL_MOD,
                                connection->fd, &next) == 0 ||
                      errno == ENOENT);
        connection->told = next.events;
        CHECK(pthread_mutex_unlock(&connection->out.turn) == 0);
}

static void *loop(void *argument)
{
        struct task *task = argument;
        struct epoll_event events[8];
        struct pollfd one = {.fd = loops.instance, .events = POLLIN};
        uint8_t *buffer = malloc(CHUNK);

        CHECK(buffer);
        atomic_store(&task->waiter->thread, (pid_t)syscall(SYS_gettid));
        while (!is_finished()) {
                int size = any(&task->random, 3) ? 1 + (int)any(&task->random, 8) : 1, count = 0;

                switch (any(&task->random, 12)) {
                case 0:
                        atomic_store(&task->waiter->what, "poll around the loop");
                        (void)poll(&one, 1, -1);
                        break;
                case 1:
                        atomic_store(&task->waiter->what, "instance around the loop");
                        (void)epoll_wait(loops.outer, events, 1, -1);
                        break;
                case 2:
                        atomic_store(&task->waiter->what, "loop, for a moment");
                        count = epoll_wait(loops.instance, events, size, 1 + (int)any(&task->random, 3));
                        break;
                case 3:
                case 4:
                case 5:
                case 6:
                        count = epoll_wait(loops.instance, events, size, 0);
                        break;
                default:
                        atomic_store(&task->waiter->what, "loop, for ever");
                        count = epoll_wait(loops.instance, events, size, -1);
                }
                atomic_store(&task->waiter->what, "running");
                CHECK(count >= 0 || errno == EINTR);
                for (int i = 0; i < count; i++)
                        handle(task, &events[i], buffer);
        }
        free(buffer);
        atomic_store(&task->waiter->thread, 0);
        return NULL;
}

static void *help(void *argument)
{
        struct task *task = argument;
        uint8_t *buffer = malloc(CHUNK);

        CHECK(buffer);
        atomic_store(&task->waiter->thread, (pid_t)syscall(SYS_gettid));
        for (;;) {
                struct connection *connection = &shared->connections[any(&task->random, running.connections)];
                enum much much = any(&task->random, 2) ? UNTIL_NOTHING : ONCE;

                atomic_store(&task->waiter->what, "a helper's job");
                if (sem_wait(&loops.work) != 0)
                        CHECK(errno == EINTR);
                if (is_finished())
                        break;
                atomic_store(&task->waiter->what, "helping");
                if (any(&task->random, 2))
                        drain(task, connection, buffer, much);
                else
                        fill_up(task, connection, buffer, much);
        }
        free(buffer);
        atomic_store(&task->waiter->thread, 0);
        return NULL;
}

static void start_loops(void)
{
        CHECK(sem_init(&loops.work, 0, 0) == 0);
        CHECK((loops.instance = epoll_create1(EPOLL_CLOEXEC)) >= 0);
        CHECK((loops.outer = epoll_create1(EPOLL_CLOEXEC)) >= 0);
        CHECK(epoll_ctl(loops.outer, EPOLL_CTL_ADD, loops.instance,
                        &(struct epoll_event){.events = EPOLLIN}) == 0);
        atomic_store(&shared->unfinished, running.connections);
        for (uint32_t i = 0; i < running.connections; i++) {
                struct connection *connection = &shared->connections[i];
                struct epoll_event event = {.events = interest(connection), .data.u32 = i};

                connection->told = event.events;
                atomic_store(&connection->finished, false);
                atomic_store(&connection->handled, false);
                CHECK(epoll_ctl(loops.instance, EPOLL_CTL_ADD, connection->fd, &event) == 0);
        }
}

/* --- a worker */

static void interrupted(int number)
{
        (void)number;
}

static void list_waiters(void)
{
        static const char *const kinds[] = {" (level)", " (edge)", " (once)", " (edge, once)"};

        fprintf(stderr, "%s: nothing moved for %d s (seed %llu, round %u, mode %u)\n",
                is_server ? "server" : "client", PATIENCE, (unsigned long long)running.seed, running.round,
                running.mode);
        for (uint32_t i = 0; i < running.connections; i++) {
                struct connection *connection = &shared->connections[i];

                fprintf(stderr, "  connection %u%s: read %llu of %llu%s, wrote %llu of %llu%s\n", i,
                        running.mode & MODE_LOOPS ? kinds[kind_number(connection)] : "",
                        (unsigned long long)atomic_load(&connection->in.done),
                        (unsigned long long)total_of(connection, false),
                        atomic_load(&connection->in.over) ? " and the end" : "",
                        (unsigned long long)atomic_load(&connection->out.done),
                        (unsigned long long)total_of(connection, true),
                        atomic_load(&connection->out.over) ? " and the end" : "");
        }
        for (uint32_t i = 0; i < atomic_load(&shared->waiting); i++)
                if (atomic_load(&shared->waiters[i].thread))
                        fprintf(stderr, "  thread %d, connection %d: %s\n",
                                atomic_load(&shared->waiters[i].thread),
                                atomic_load(&shared->waiters[i].number),
                                atomic_load(&shared->waiters[i].what));
}

static void start_thread(pthread_t *thread, struct task *task, void *(*run)(void *))
{
        uint32_t place = atomic_fetch_add(&shared->waiting, 1);

        CHECK(place < WAITERS);
        task->waiter = &shared->waiters[place];
        atomic_store(&task->waiter->number, task->connection ? (int)task->connection->header.number : -1);
        atomic_store(&task->waiter->what, "starting");
        CHECK(pthread_create(thread, NULL, run, task) == 0);
}

static uint32_t most_threads(void)
{
        return running.mode & MODE_LOOPS ? running.threads + 1 + HELPERS
                                         : running.connections * running.threads * 2;
}

/* The threads run when this returns. */
static uint32_t start_threads(pthread_t *threads, struct task *tasks, uint64_t random)
{
        uint32_t count = 0;

        if (running.mode & MODE_LOOPS) {
                start_loops();
                for (; count < most_threads(); count++) {
                        tasks[count] = (struct task){.random = mix(random + count)};
                        start_thread(&threads[count], &tasks[count], count < HELPERS ? help : loop);
                }
                return count;
        }
        for (uint32_t i = 0; i < running.connections; i++) {
                struct connection *connection = &shared->connections[i];
                struct epoll_event event = {.events = EPOLLIN};

                common[i] = epoll_create1(EPOLL_CLOEXEC);
                CHECK(common[i] >= 0);
                CHECK(epoll_ctl(common[i], EPOLL_CTL_ADD, connection->fd, &event) == 0);
                for (uint32_t j = 0; j < running.threads * 2; j++) {
                        tasks[count] = (struct task){
                            .connection = connection,
                            .random = mix(random + count),
                            .writes = j & 1,
                        };
                        start_thread(&threads[count], &tasks[count], work);
                        count++;
                }
        }
        return count;
}

/* Wait for all threads, interrupt them, and end everything when no byte moves. */
static void watch(pthread_t *threads, struct task *tasks, uint32_t count, uint64_t random)
{
        uint64_t last = UINT64_MAX;
        time_t since = time(NULL);
        bool dies = running.mode & (is_server ? MODE_KILL_THEM : MODE_KILL_US);
        uint64_t mortal = any(&random, 200);

        for (uint32_t joined = 0; joined < count;) {
                uint64_t moved = atomic_load(&shared->operations);
                struct timespec deadline;

                clock_gettime(CLOCK_REALTIME, &deadline);
                deadline.tv_nsec += 5 * 1000 * 1000;
                if (deadline.tv_nsec >= 1000000000) {
                        deadline.tv_nsec -= 1000000000;
                        deadline.tv_sec++;
                }
                if (pthread_timedjoin_np(threads[joined], NULL, &deadline) == 0) {
                        joined++;
                        continue;
                }
                if (dies && mortal-- == 0)
                        kill(getpid(), SIGKILL);
                if (is_finished()) {
                        for (uint32_t i = joined; i < count; i++)
                                if (atomic_load(&tasks[i].waiter->thread))
                                        pthread_kill(threads[i], SIGUSR1);
                } else if (running.mode & MODE_SIGNALS) {
                        uint32_t chosen = joined + (uint32_t)any(&random, count - joined);

                        if (atomic_load(&tasks[chosen].waiter->thread))
                                pthread_kill(threads[chosen], SIGUSR1);
                }
                if (moved != last) {
                        last = moved;
                        since = time(NULL);
                } else if (time(NULL) - since > PATIENCE && !atomic_exchange(&shared->stalled, 1)) {
                        list_waiters();
                        _exit(3);
                }
        }
}

static void check_count(const char *direction, struct connection *connection, struct stream *stream,
                        uint64_t total)
{
        uint64_t done = atomic_load(&stream->done);

        if (done == total)
                return;
        fprintf(stderr, "%s: connection %u %s: %" PRIu64 " bytes instead of %" PRIu64 "\n",
                is_server ? "server" : "client", connection->header.number, direction, done, total);
        CHECK(done == total);
}

static void check_counts(struct connection *connection)
{
        struct stream *in = &connection->in;
        static uint64_t wanted[256];
        uint8_t bytes[4096];

        check_count("in", connection, in, total_of(connection, false));
        check_count("out", connection, &connection->out, total_of(connection, true));
        if (!(running.mode & MODE_UNORDERED))
                return;
        memset(wanted, 0, sizeof wanted);
        for (uint64_t place = 0; place < total_of(connection, false); place += sizeof bytes) {
                uint64_t part = total_of(connection, false) - place;

                if (part > sizeof bytes)
                        part = sizeof bytes;
                fill(bytes, salt_of(connection, false), place, part);
                for (uint64_t i = 0; i < part; i++)
                        wanted[bytes[i]]++;
        }
        for (int i = 0; i < 256; i++)
                CHECK(wanted[i] == atomic_load(&in->counts[i]));
}

static void prepare(struct stream *stream)
{
        pthread_mutexattr_t attributes;

        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        memset(stream, 0, sizeof *stream);
        CHECK(pthread_mutex_init(&stream->turn, &attributes) == 0);
}

static void run_worker(void)
{
        uint32_t most = most_threads();
        pthread_t *threads = calloc(most, sizeof *threads);
        struct task *tasks = calloc(most, sizeof *tasks);
        uint64_t random = mix(running.seed ^ (is_server ? 77 : 99) ^ running.round);
        pid_t second = 0;
        uint32_t count;
        int status = 0;

        CHECK(threads && tasks);
        for (uint32_t i = 0; i < running.connections; i++) {
                struct connection *connection = &shared->connections[i];

                prepare(&connection->in);
                prepare(&connection->out);
                if (running.mode & MODE_NONBLOCK)
                        fcntl(connection->fd, F_SETFL, O_NONBLOCK);
        }
        if (running.mode & MODE_FORK) {
                CHECK((second = fork()) >= 0);
                random = mix(random + (second == 0));
        }
        count = start_threads(threads, tasks, random);
        watch(threads, tasks, count, random);
        free(threads);
        free(tasks);
        if (running.mode & MODE_FORK) {
                if (!second)
                        exit(0);
                CHECK(waitpid(second, &status, 0) == second);
                CHECK(status == 0);
        }
        if (!may_break())
                for (uint32_t i = 0; i < running.connections; i++)
                        check_counts(&shared->connections[i]);
        for (uint32_t i = 0; i < running.connections; i++)
                close(shared->connections[i].fd);
        exit(0);
}

/* End with the worker's status, unless the round had it killed. */
static void wait_worker(pid_t worker)
{
        bool dies = running.mode & (is_server ? MODE_KILL_THEM : MODE_KILL_US);
        int status;

        CHECK(waitpid(worker, &status, 0) == worker);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
                return;
        if (dies && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
                return;
        fprintf(stderr, "%s: worker ended with status %#x (seed %llu, round %u, mode %u)\n",
                is_server ? "server" : "client", status, (unsigned long long)running.seed, running.round,
                running.mode);
        exit(1);
}

/* --- the two sides */

static bool read_header(int fd, struct header *header)
{
        size_t done = 0;

        while (done < sizeof *header) {
                ssize_t got = recv(fd, (char *)header + done, sizeof *header - done, 0);

                if (got <= 0)
                        return false;
                done += (size_t)got;
        }
        return header->magic == UINT64_C(0x656d61656d6f6e);
}

static uint64_t kernel_bytes(int fd)
{
        struct tcp_info info;
        socklen_t size = sizeof info;

        memset(&info, 0, sizeof info);
        CHECK(syscall(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0);
        return info.tcpi_bytes_sent + info.tcpi_bytes_received;
}

static void warm_up(int fd)
{
        char byte = 'c';

        for (int i = 0; byte == 'c'; i++) {
                uint64_t before = kernel_bytes(fd);

                CHECK(send(fd, &byte, 1, 0) == 1 && recv(fd, &byte, 1, 0) == 1 && byte == 'c');
                if (kernel_bytes(fd) == before || i > 40)
                        byte = 'd';
                else if (i > 4)
                        usleep(500);
        }
        CHECK(send(fd, &byte, 1, 0) == 1 && recv(fd, &byte, 1, 0) == 1 && byte == 'd');
}

static void warm_up_server(int fd)
{
        char byte;

        do
                CHECK(recv(fd, &byte, 1, 0) == 1 && send(fd, &byte, 1, 0) == 1);
        while (byte != 'd');
}

static void accept_rest(int listener)
{
        for (uint32_t next = 1; next < running.connections;) {
                struct header header;
                int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

                CHECK(fd >= 0);
                if (!read_header(fd, &header) || header.round != running.round || header.number != next) {
                        close(fd);
                        continue;
                }
                if (running.mode & MODE_WARM)
                        warm_up_server(fd);
                shared->connections[next].fd = fd;
                shared->connections[next].header = header;
                next++;
        }
}

static void serve(const struct sockaddr_in *address)
{
        int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
        uint64_t rounds = 0;

        CHECK(listener >= 0);
        CHECK(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
        CHECK(bind(listener, (const struct sockaddr *)address, sizeof *address) == 0);
        CHECK(listen(listener, 1024) == 0);
        for (;; rounds++) {
                struct header header;
                int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
                pid_t worker;

                CHECK(fd >= 0);
                if (!read_header(fd, &header) || (header.number != 0 && header.number != STOP)) {
                        close(fd);
                        continue;
                }
                if (header.number == STOP)
                        break;
                running = header;
                atomic_store(&shared->waiting, 0);
                atomic_store(&shared->stalled, 0);
                shared->connections[0].fd = fd;
                shared->connections[0].header = header;
                CHECK((worker = fork()) >= 0);
                if (!worker) {
                        if (running.mode & MODE_WARM)
                                warm_up_server(fd);
                        accept_rest(listener);
                        run_worker();
                }
                close(fd);
                wait_worker(worker);
        }
}

static int dial(const struct sockaddr_in *address, const struct header *header)
{
        int fd, tries = 0;

        for (;;) {
                CHECK((fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) >= 0);
                if (connect(fd, (const struct sockaddr *)address, sizeof *address) == 0)
                        break;
                CHECK(errno == ECONNREFUSED && tries++ < 500);
                close(fd);
                usleep(10 * 1000);
        }
        if (send(fd, header, sizeof *header, MSG_NOSIGNAL) != sizeof *header)
                CHECK(is_end(errno));
        return fd;
}

static struct header choose(uint64_t *random, uint64_t seed, uint32_t round, uint32_t connections,
                            uint32_t threads)
{
        static const uint64_t sizes[] = {1, 100, 5000, 300000, 300000, 3 << 20, 12 << 20};
        uint32_t mode = 0;
        struct header made = {
            .magic = UINT64_C(0x656d61656d6f6e),
            .seed = seed,
            .round = round,
            .threads = 1 + (uint32_t)any(random, threads),
        };

        made.connections = 1 + (uint32_t)any(random, any(random, 2)    ? connections
                                                     : connections < 4 ? connections
                                                                       : 4);
        for (uint32_t bit = MODE_FORK; bit <= MODE_LOOPS; bit <<= 1)
                if (any(random, bit == MODE_KILL_US || bit == MODE_KILL_THEM || bit == MODE_FORK ? 6 : 2) ==
                    0)
                        mode |= bit;
        /* A killed process would hold the lock of the reader for ever. */
        if (mode & (MODE_KILL_US | MODE_KILL_THEM))
                mode &= ~(uint32_t)MODE_FORK;
        if (getenv("TORTURE_LOOPS"))
                mode |= MODE_LOOPS;
        /* No thread interrupts a wait without a time limit there, or waits in another call. */
        if (mode & MODE_LOOPS)
                mode &= MODE_LOOPS | MODE_KILL_US | MODE_KILL_THEM | MODE_NONBLOCK | MODE_WARM;
        made.mode = mode;
        made.total[0] = 1 + any(random, sizes[any(random, 7)] + 1);
        made.total[1] = 1 + any(random, sizes[any(random, 7)] + 1);
        for (int i = 0; i < 2; i++)
                if (made.total[i] * made.connections > (UINT64_C(48) << 20))
                        made.total[i] = (UINT64_C(48) << 20) / made.connections;
        return made;
}

static void play(const struct sockaddr_in *address, char **arguments)
{
        time_t end = time(NULL) + atoi(arguments[0]);
        uint64_t seed = strtoull(arguments[1], NULL, 0), random = mix(seed);
        uint32_t round = 0;

        printf("seed %llu\n", (unsigned long long)seed);
        fflush(stdout);
        CHECK(atoi(arguments[2]) > 0 && atoi(arguments[2]) <= CONNECTIONS && atoi(arguments[3]) > 0);
        while (time(NULL) < end) {
                pid_t worker;

                running = choose(&random, seed, round++, (uint32_t)atoi(arguments[2]),
                                 (uint32_t)atoi(arguments[3]));
                atomic_store(&shared->waiting, 0);
                atomic_store(&shared->stalled, 0);
                CHECK((worker = fork()) >= 0);
                if (!worker) {
                        for (uint32_t i = 0; i < running.connections; i++) {
                                struct connection *connection = &shared->connections[i];

                                connection->header = running;
                                connection->header.number = i;
                                connection->fd = dial(address, &connection->header);
                                if (running.mode & MODE_WARM)
                                        warm_up(connection->fd);
                        }
                        run_worker();
                }
                wait_worker(worker);
        }
        running.number = STOP;
        close(dial(address, &running));
        printf("rounds %u operations %llu bytes %llu\n", round,
               (unsigned long long)atomic_load(&shared->operations),
               (unsigned long long)atomic_load(&shared->bytes));
}

int main(int count, char **arguments)
{
        struct sockaddr_in address = {.sin_family = AF_INET};
        struct sigaction action = {.sa_handler = interrupted};

        if (count < 4 || (strcmp(arguments[1], "server") != 0 && count != 8)) {
                fprintf(
                    stderr,
                    "torture server ADDRESS PORT | client ADDRESS PORT SECONDS SEED CONNECTIONS THREADS\n");
                return 2;
        }
        is_server = strcmp(arguments[1], "server") == 0;
        CHECK(inet_pton(AF_INET, arguments[2], &address.sin_addr) == 1);
        address.sin_port = htons((uint16_t)atoi(arguments[3]));
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED);
        signal(SIGPIPE, SIG_IGN);
        sigaction(SIGUSR1, &action, NULL);
        if (is_server)
                serve(&address);
        else
                play(&address, arguments + 4);
        return 0;
}
