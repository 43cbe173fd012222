#include "pump.h"

#include "sparse.h"
#include "sys.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum {
        PIECE = 64 * 1024,
        DESCRIPTORS_CLOSED = 65536, /* where the kernel has no close_range() */
};

/* One direction: bytes on their way. */
struct way {
        int from, to;
        size_t first, last; /* in `buffer` */
        bool over;          /* the source has ended, and the target has been shut down */
        unsigned char buffer[PIECE];
};

static void close_between(unsigned first, unsigned last)
{
        if (first > last || sys_3(SYS_close_range, first, last, 0) >= 0)
                return;
        for (unsigned fd = first; fd <= last && fd < DESCRIPTORS_CLOSED; fd++)
                sys_1(SYS_close, fd);
}

/* A descriptor that the pump keeps open would keep its file's other end waiting for a close. */
static void keep_only(int one, int other)
{
        unsigned low = (unsigned)(one < other ? one : other), high = (unsigned)(one < other ? other : one);

        if (low)
                close_between(0, low - 1);
        close_between(low + 1, high - 1);
        close_between(high + 1, UINT32_MAX);
}

static long get(struct pump *pump, struct way *way)
{
        size_t most = PIECE;
        long got;

        if (way->from == pump->tcp && pump->before && pump->before < most)
                most = pump->before;
        if (way->from == pump->tcp && !pump->before && pump->size) {
                got = (long)(pump->size < most ? pump->size : most);
                memcpy(way->buffer, pump->bytes, (size_t)got);
                pump->bytes += got;
                pump->size -= (size_t)got;
                return got;
        }
        got = sys_6(SYS_recvfrom, way->from, way->buffer, most, MSG_DONTWAIT, 0, 0);
        if (got > 0 && way->from == pump->tcp && pump->before)
                pump->before -= (uint64_t)got;
        return got;
}

/* Move what can be moved now. */
static void step(struct pump *pump, struct way *way)
{
        while (!way->over) {
                long moved;

                if (way->first == way->last) {
                        moved = get(pump, way);
                        if (moved == -EAGAIN)
                                return;
                        if (moved <= 0) {
                                way->over = true;
                                sys_2(SYS_shutdown, way->to, SHUT_WR);
                                return;
                        }
                        way->first = 0;
                        way->last = (size_t)moved;
                }
                moved = sys_6(SYS_sendto, way->to, way->buffer + way->first, way->last - way->first,
                              MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0);
                if (moved == -EAGAIN)
                        return;
                if (moved < 0) {
                        way->over = true;
                        /* The sender gets an error, as if the reader were gone. */
                        sys_2(SYS_shutdown, way->from, SHUT_RD);
                        return;
                }
                way->first += (size_t)moved;
        }
}

/* `ways`: one for each direction, zeroed. */
__attribute__((noreturn)) static void run(struct pump *pump, int ours, struct way *ways)
{
        struct way *in = &ways[0], *out = &ways[1];
        uint64_t all = UINT64_MAX;

        sys_4(SYS_rt_sigprocmask, 0 /* SIG_BLOCK */, &all, 0, sizeof all);
        keep_only(pump->tcp, ours);
        in->from = out->to = pump->tcp;
        in->to = out->from = ours;
        for (;;) {
                struct pollfd polled[2] = {{.fd = pump->tcp}, {.fd = ours}};

                step(pump, in);
                step(pump, out);
                if (in->over && out->over)
                        sys_1(SYS_exit_group, 0);
                if (!in->over)
                        polled[in->first == in->last ? 0 : 1].events |=
                            in->first == in->last ? POLLIN : POLLOUT;
                if (!out->over)
                        polled[out->first == out->last ? 1 : 0].events |=
                            out->first == out->last ? POLLIN : POLLOUT;
                /* A descriptor that would only report its end isn't polled. */
                for (int i = 0; i < 2; i++)
                        if (!polled[i].events)
                                polled[i].fd = -1;
                sys_5(SYS_ppoll, polled, 2, 0, 0, 0);
        }
}

bool pump_start(struct pump *pump)
{
        /* Not a static buffer: its pages would lie between the library's variables in every
         * program. */
        const size_t size = 2 * sizeof(struct way);
        struct way *ways = reserve(size, MAP_PRIVATE);
        int pair[2];
        long child;

        if (!ways)
                return false;
        if (sys_4(SYS_socketpair, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
                sys_2(SYS_munmap, ways, size);
                return false;
        }
        /* Without a signal at its exit: it isn't one of the children that the program waits for. */
        child = sys_5(SYS_clone, 0, 0, 0, 0, 0);
        if (child == 0)
                run(pump, pair[1], ways);
        sys_2(SYS_munmap, ways, size);
        sys_1(SYS_close, pair[1]);
        if (child < 0) {
                sys_1(SYS_close, pair[0]);
                return false;
        }
        pump->program = pair[0];
        return true;
}
