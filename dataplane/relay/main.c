/* freeflow-relay: moves the rings of this host's processes to and from other hosts. There is one
 * per host. It is a child of the router, which sends it requests on descriptor 3
 * (relay_protocol.h).
 *
 * Each file includes only files further down:
 *
 *      main                            the loop
 *      router_requests                 the router's requests
 *      verbs, loopback, tcp, stream    transports
 *      transports                      those that are open
 *      tcp_receive, tcp_send           the two halves of tcp
 *      verbs_pair, verbs_memory        queue pairs and registered memory of verbs
 *      verbs_device                    its device
 *      link                            the way to one peer's relay, and its messages
 *      mirror_receive, mirror_send     what a message says about one connection
 *      mirror_end                      how a connection ends or falls back to TCP
 *      mirror_scan                     what the process does in its rings
 *      mirror                          one connection: its state
 *      source                          a process's connections over one link
 *      queue.h, transport.h            a link as its connections see it; the transports' contract
 *      arenas                          memory and bells that are shared with processes
 *      usage                           what each arena and link uses of the relay
 *      answers                         messages to the router
 *      context                         descriptors, clock, counters
 *      confine                         capabilities and system calls
 *      records                         encryption between two relays
 *      relay_protocol.h, wire.h        messages of router and relay, and of two relays
 *      list.h                          lists
 *
 * One thread moves all bytes, in turns: receive what links have brought, scan the rings of active
 * connections, send what they have, ring the bells of processes that have got something. An idle
 * connection costs nothing in a turn, and nothing in a turn blocks. When a turn finds no work the
 * thread spins as the library's waiters do (spin.h), then makes all connections idle and sleeps in
 * epoll: on the router's socket, the bells of arenas, and the transports' descriptors. Without
 * RDMA it lets others run between two turns of a spin, because a process or the other relay may
 * need the core to produce what it waits for. It so keeps the core from halting, and a wake-up of a
 * halted core takes longer than a turn.
 *
 * When the router's socket closes, or on SIGTERM, all connections fall back to TCP. The relay
 * delivers what they have sent as long as their links live; connections that are not done by then
 * are reset.
 */
#include "../library/spin.h"
#include "../library/sys.h"
#include "arenas.h"
#include "confine.h"
#include "context.h"
#include "link.h"
#include "mirror_end.h"
#include "mirror_scan.h"
#include "moves.h"
#include "router_requests.h"
#include "transports.h"
#include "usage.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum {
        POLL_TURNS = 32, /* turns between polls of descriptors while there is work */
        BUSY_US = 100,   /* microseconds between them, if turns take long */
        POLL_US = 16,    /* microseconds between them while spinning */
        ALONE_US = 5,    /* a yield that took no longer than this had nobody to yield to */
        LATE_US = 300,   /* one that took longer had somebody who works rather than answers */
        CROWDED = 100,   /* ms without yields after that */
        LINGER = 100,    /* ms for the last messages to arrive */
};

static struct spinner spinner;
static bool leaving;           /* all connections have been asked to fall back to TCP */
static uint64_t crowded_until; /* ns: others use the core until then */

static void on_signal(struct watch *watch, UNUSED uint32_t events)
{
        struct signalfd_siginfo info;

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

/* True: there was work. */
static bool turn(void)
{
        bool any = transports_poll();

        any = mirrors_scan() || any;
        any = links_flush() || any;
        any = transports_flush() || any;
        arenas_ring();
        count(COUNT_TURNS, 1);
        return any;
}

/* Of two times; 0: never. */
static uint64_t earlier(uint64_t one, uint64_t other)
{
        return !one || (other && other < one) ? other : one;
}

/* Does what is due. Returns when the next tick is due; 0: none is. */
static uint64_t tick(uint64_t present)
{
        const uint64_t all[] = {
            mirrors_scan_tick(present),
            mirrors_end_tick(present),
            links_tick(present),
            transports_tick(present),
        };
        uint64_t first = 0;

        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
                first = earlier(first, all[i]);
        return first;
}

/* Lets others run, then takes one turn. Processes that wait for a core get it at once, but one that
 * computes keeps it for a time slice: then sleeping is better, since a wake-up would interrupt it.
 * True: there was work. */
static bool yield_once(uint64_t *present)
{
        uint64_t before = *present, yielded;
        bool found;

        sched_yield();
        yielded = now();
        found = watches_poll(0);
        found = turn() || found;
        *present = now();
        if (!found)
                usage_spun(*present - (yielded - before < ALONE_US * 1000 ? before : yielded));
        if (yielded - before > LATE_US * 1000)
                crowded_until = *present + CROWDED * UINT64_C(1000000);
        return found;
}

static bool spin_once(uint64_t *present)
{
        bool found = false;

        for (int i = 0; i < SPIN_CHECKS && !found; i++) {
                relax();
                found = turn();
        }
        *present = now();
        return found;
}

/* Takes turns without sleeping as long as that pays (spin.h). True: there was work. */
static bool spin(void)
{
        uint64_t budget = mirrors_are_active() ? spin_budget(&spinner) : 0, start, present, polled;
        bool found = false;

        if (!budget)
                return false;
        start = present = polled = now();
        if (present < crowded_until)
                return false;
        do {
                found = relay.yields ? yield_once(&present) : spin_once(&present);
                if (!found && present - polled >= POLL_US * 1000) {
                        found = watches_poll(0);
                        tick(present);
                        polled = present;
                }
        } while (!found && present - start < budget);
        spin_learn(&spinner, found, budget, present - start);
        if (found)
                count(COUNT_SPINS, 1);
        return found;
}

static void sleep_now(void)
{
        uint64_t start = now(), due = tick(start);
        int timeout = -1;

        /* Work that arrived before bells and transport were armed would not wake us. */
        if (!mirrors_make_idle() || !transports_arm())
                return;
        /* Some rest that did not at the tick. */
        due = earlier(due, arenas_resume_at(start));
        /* Ticks and connections that became idle may have made bells due. */
        arenas_ring();
        if (relay.stop_at && (!due || due > start + 1000000))
                due = start + 1000000;
        if (due)
                timeout = due > start ? (int)((due - start + 999999) / 1000000) : 0;
        count(COUNT_SLEEPS, 1);
        watches_poll(timeout);
        spin_slept(&spinner, now() - start);
}

static void run(void)
{
        uint64_t polled = now();

        for (unsigned turns = 0;; turns++) {
                bool any = turn();
                uint64_t present = any ? now() : 0;

                relay.core = settings.spin && !relay.yields ? (uint32_t)sched_getcpu() + 1 : 0;
                if (any && (turns % POLL_TURNS == 0 || present - polled >= BUSY_US * 1000)) {
                        watches_poll(0);
                        tick(present);
                        polled = present;
                }
                if (!any && !spin()) {
                        sleep_now();
                        polled = now();
                }
                if (!relay.stop_at)
                        continue;
                if (!leaving)
                        mirrors_leave();
                leaving = true;
                if (mirrors_have_left() || now() >= relay.stop_at)
                        return;
        }
}

/* Resets what has not fallen back to TCP, and lets the last messages arrive. */
static void finish(void)
{
        uint64_t until = now() + LINGER * UINT64_C(1000000);

        mirrors_break();
        arenas_ring();
        while (!links_are_idle() && now() < until)
                if (!turn())
                        watches_poll(1);
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
        int error;

        context_start();
        allow_descriptors();
        mirrors_start(&moves_of_mirrors);
        arenas_start(mirror_activate);
        lent_files_start(moves_revoke);
        watch_signals();
        router_requests_start();
#ifndef FREEFLOW_TEST
        error = confine();
#else
        /* Sanitizers need more. */
        error = 0;
#endif
        if (error)
                relay_die("giving up capabilities and system calls", error);
        run();
        finish();
        return 0;
}
