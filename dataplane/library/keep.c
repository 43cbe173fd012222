#include "keep.h"

#include "clock.h"
#include "kernel_file.h"
#include "sys.h"

#include <netinet/in.h>
#include <netinet/tcp.h>

enum {
        SHARE = 4,     /* probes in the time after which a connection is forgotten */
        LONGEST = 300, /* s */
        MOST = 127,    /* probes: the kernel's maximum */
        FRESH = 10000, /* ms for which the container's time isn't read again */
};

static const char path[] = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";

/* Seconds between two probes. */
static uint32_t interval(void)
{
        static _Atomic uint32_t known, read_at;
        uint32_t time = load_relaxed(&known), present = ticks();
        uint64_t timeout;

        if (time && present - load_relaxed(&read_at) < FRESH)
                return time;
        timeout = kernel_file_number(path) / SHARE;
        time = timeout < 1 ? 1 : timeout < LONGEST ? (uint32_t)timeout : LONGEST;
        store_relaxed(&known, time);
        store_relaxed(&read_at, present);
        return time;
}

/* Set the kernel's values: the program's own, or ours, which are more probes in the same time. */
static void apply(int fd, struct end *end, bool ours)
{
        int on = atomic_load(&end->keep_on), idle = atomic_load(&end->keep_idle);
        int pause = atomic_load(&end->keep_pause), count = atomic_load(&end->keep_count);
        int most = (int)interval();

        if (ours && (!on || idle > most || pause > most)) {
                int64_t patience = on ? idle + (int64_t)pause * count : INT64_MAX;

                idle = pause = most;
                count = patience / most < MOST ? (int)(patience / most) : MOST;
                on = 1;
        }
        sys_set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, idle);
        sys_set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, pause);
        sys_set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, count ? count : 1);
        sys_set_option(fd, SOL_SOCKET, SO_KEEPALIVE, on);
}

void keep_begin(int fd, struct end *end)
{
        int on = sys_option(fd, SOL_SOCKET, SO_KEEPALIVE), idle = sys_option(fd, IPPROTO_TCP, TCP_KEEPIDLE);
        int pause = sys_option(fd, IPPROTO_TCP, TCP_KEEPINTVL),
            count = sys_option(fd, IPPROTO_TCP, TCP_KEEPCNT);

        if (atomic_load(&end->kept) || on < 0 || idle <= 0 || pause <= 0 || count <= 0)
                return;
        atomic_store(&end->keep_on, on);
        atomic_store(&end->keep_idle, idle);
        atomic_store(&end->keep_pause, pause);
        atomic_store(&end->keep_count, count);
        atomic_store(&end->kept, 1);
        apply(fd, end, true);
}

void keep_end(int fd, struct end *end)
{
        if (atomic_exchange(&end->kept, 0))
                apply(fd, end, false);
}

/* Where the program's own value of an option is kept. */
static _Atomic int32_t *place(struct end *end, int level, int name)
{
        if (level == SOL_SOCKET && name == SO_KEEPALIVE)
                return &end->keep_on;
        if (level != IPPROTO_TCP)
                return NULL;
        return name == TCP_KEEPIDLE    ? &end->keep_idle
               : name == TCP_KEEPINTVL ? &end->keep_pause
               : name == TCP_KEEPCNT   ? &end->keep_count
                                       : NULL;
}

void keep_set(int fd, struct end *end, int level, int name)
{
        _Atomic int32_t *own = place(end, level, name);
        int value;

        if (!own || !atomic_load(&end->kept))
                return;
        value = sys_option(fd, level, name);
        if (value >= 0)
                atomic_store(own, value);
        apply(fd, end, true);
}

bool keep_get(const struct end *end, int level, int name, int *value)
{
        _Atomic int32_t *own = place((struct end *)(uintptr_t)end, level, name);

        if (!own || !atomic_load(&end->kept))
                return false;
        *value = atomic_load(own);
        return true;
}
