/* freeflow-relay: moves the rings of this host's processes to and from other hosts. One process per host, a
 * child of the router, which it hears on descriptor 3 (protocol.h). To read on: link.h (what leads to a
 * peer), mirror.h (one connection, and what keeps it whole), transport.h (how bytes get there), wire.h (what
 * relays say).
 *
 * One thread moves all bytes, in turns: take what links have brought, look at the rings of the connections
 * that are active, give what they have to the links. Nothing in a turn is done for a connection that rests,
 * and nothing waits. When a turn finds nothing the thread spins as the library's waiters do (spin.h), then
 * lets all connections rest and sleeps in epoll: on the router's socket, the bells of arenas, and what the
 * transport has.
 *
 * When the router goes, or says so by SIGTERM, all connections are asked to go back to TCP, and what they
 * have sent is brought to its end as long as links live; the rest sees a reset.
 */
#include "relay.h"

#include "../library/spin.h"
#include "../library/sys.h"
#include "arenas.h"
#include "control.h"
#include "link.h"
#include "mirror.h"
#include "transport.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum {
        EVENTS = 64,
        KERNEL = 32,    /* turns between looks at descriptors while there is work */
        KERNEL_US = 16, /* the same while spinning */
        DRAIN = 2000,   /* ms for all to leave at the end */
        FAREWELL = 100, /* ms for what was said last to arrive */
};

struct relay relay = {.epoll = -1};
struct settings settings;

static struct spinner spinner;

void relay_die(const char *what, int error)
{
        fprintf(stderr, "freeflow-relay: %s: %s\n", what, strerror(error));
        exit(1);
}

uint64_t relay_random(void)
{
        uint64_t number;

        while (getrandom(&number, sizeof number, 0) != (ssize_t)sizeof number)
                ;
        return number;
}

bool watch_add(struct watch *watch, uint32_t events)
{
        struct epoll_event event = {.events = events, .data.ptr = watch};

        count(COUNT_CALLS, 1);
        return epoll_ctl(relay.epoll, EPOLL_CTL_ADD, watch->fd, &event) == 0 ||
               (errno == EEXIST && epoll_ctl(relay.epoll, EPOLL_CTL_MOD, watch->fd, &event) == 0);
}

/* What the kernel has said and nobody has been called for yet. */
static struct epoll_event said[EVENTS];
static int said_count;

void watch_remove(struct watch *watch)
{
        for (int i = 0; i < said_count; i++)
                if (said[i].data.ptr == watch)
                        said[i].data.ptr = NULL;
        if (watch->fd >= 0)
                epoll_ctl(relay.epoll, EPOLL_CTL_DEL, watch->fd, NULL);
}

/* Spinning on the only core keeps it from those that are waited for. */
static bool has_cores(void)
{
        cpu_set_t set;

        return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 1;
}

void relay_spin(uint32_t time)
{
        settings.spin = has_cores() ? time : 0;
}

void relay_stop(void)
{
        if (relay.stop_at)
                return;
        relay.stop_at = now() + DRAIN * UINT64_C(1000000);
        mirrors_leave();
}

static void on_signal(struct watch *watch, uint32_t events)
{
        struct signalfd_siginfo info;

        (void)events;
        if (read(watch->fd, &info, sizeof info) == (ssize_t)sizeof info)
                relay_stop();
}

static void watch_signals(void)
{
        static struct watch signals = {.call = on_signal};
        sigset_t set;

        sigemptyset(&set);
        sigaddset(&set, SIGTERM);
        sigaddset(&set, SIGINT);
        sigprocmask(SIG_BLOCK, &set, NULL);
        signal(SIGPIPE, SIG_IGN);
        signals.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
        if (signals.fd < 0 || !watch_add(&signals, EPOLLIN))
                relay_die("waiting for signals", errno);
}

/* ms as epoll_wait() takes them. */
static bool ask_kernel(int timeout)
{
        int got = epoll_wait(relay.epoll, said, EVENTS, timeout);

        count(COUNT_CALLS, 1);
        said_count = got > 0 ? got : 0;
        for (int i = 0; i < said_count; i++) {
                struct watch *watch = said[i].data.ptr;

                /* One that is gone since has none. */
                if (watch)
                        watch->call(watch, said[i].events);
        }
        said_count = 0;
        return got > 0;
}

/* Did anything happen? */
static bool turn(void)
{
        bool any = relay.transport && relay.transport->poll();

        any = mirrors_look() || any;
        any = links_flush() || any;
        count(COUNT_TURNS, 1);
        return any;
}

/* What is due by time; when to come again, 0: nothing waits. */
static uint64_t beat(uint64_t present)
{
        const uint64_t all[] = {
            mirrors_beat(present),
            links_beat(present),
            relay.transport && relay.transport->beat ? relay.transport->beat(present) : 0,
        };
        uint64_t first = 0;

        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
                if (all[i] && (!first || all[i] < first))
                        first = all[i];
        return first;
}

/* Look for work as long as that pays. */
static bool spin(void)
{
        uint64_t budget = mirrors_active() ? spin_budget(&spinner) : 0, start, present, asked;
        bool found = false;

        if (!budget)
                return false;
        start = present = asked = now();
        do {
                for (int i = 0; i < SPIN_LOOKS && !found; i++) {
                        relax();
                        found = turn();
                }
                present = now();
                if (!found && present - asked >= KERNEL_US * 1000) {
                        found = ask_kernel(0);
                        beat(present);
                        asked = present;
                }
        } while (!found && present - start < budget);
        spin_learn(&spinner, found, budget, present - start);
        if (found)
                count(COUNT_SPINS, 1);
        return found;
}

static void sleep_now(void)
{
        uint64_t start = now(), due = beat(start);
        int timeout = -1;

        /* Who has news after all, or gets something now, doesn't sleep. */
        if (!mirrors_rest() || (relay.transport && !relay.transport->arm()))
                return;
        if (relay.stop_at && (!due || due > start + 1000000))
                due = start + 1000000;
        if (due)
                timeout = due > start ? (int)((due - start + 999999) / 1000000) : 0;
        count(COUNT_SLEEPS, 1);
        ask_kernel(timeout);
        spin_slept(&spinner, now() - start);
}

static void run(void)
{
        for (unsigned turns = 0;; turns++) {
                bool any = turn();

                relay.core = settings.spin ? (uint32_t)sched_getcpu() + 1 : 0;
                if (any && turns % KERNEL == 0) {
                        ask_kernel(0);
                        beat(now());
                }
                if (!any && !spin())
                        sleep_now();
                if (relay.stop_at && (mirrors_left() || now() >= relay.stop_at))
                        return;
        }
}

static void say_farewell(void)
{
        uint64_t until = now() + FAREWELL * UINT64_C(1000000);

        mirrors_break();
        while (!links_quiet() && now() < until)
                if (!turn())
                        ask_kernel(1);
}

/* Each bell of each process is a descriptor here. */
static void allow_descriptors(void)
{
        struct rlimit limit;

        if (getrlimit(RLIMIT_NOFILE, &limit))
                return;
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
}

int main(void)
{
        relay.epoll = epoll_create1(EPOLL_CLOEXEC);
        if (relay.epoll < 0)
                relay_die("epoll", errno);
        allow_descriptors();
        arenas_start();
        mirrors_start();
        watch_signals();
        control_start();
        run();
        say_farewell();
        return 0;
}
