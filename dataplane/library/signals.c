#include "signals.h"

#include "calls.h"
#include "own.h"
#include "real.h"
#include "sys.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/signalfd.h>

/* The kernel's set, whatever the C library's size of one is. */
enum { SIGNALS = 64, SET_SIZE = SIGNALS / 8 };

static _Atomic uint32_t changes = 1; /* calls that may have changed a handler */
static _Atomic uint32_t known;       /* `changes` when the handlers were last read */
static _Atomic uint64_t failing;     /* signals whose handlers have no SA_RESTART */
static _Atomic uint64_t restarting;  /* signals whose handlers have it */
static _Atomic int signal_fd;        /* 1 + descriptor for `failing` */

/* Signals that the C library uses for itself. Calls are always restarted after them. */
static bool is_internal(int number)
{
        return number == 32 || number == 33 || number == 34;
}

static void read_handlers(void)
{
        uint32_t now_known = atomic_load(&changes);
        uint64_t fail = 0, restart = 0;
        struct sigaction action;

        for (int number = 1; number <= SIGNALS; number++) {
                if (is_internal(number) || real()->sigaction(number, NULL, &action) < 0 ||
                    action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN)
                        continue;
                if (action.sa_flags & SA_RESTART)
                        restart |= UINT64_C(1) << (number - 1);
                else
                        fail |= UINT64_C(1) << (number - 1);
        }
        atomic_store(&restarting, restart);
        atomic_store(&failing, fail);
        if (fail && restart) {
                int old = atomic_load(&signal_fd);
                long fd =
                    sys_4(SYS_signalfd4, old ? old - 1 : -1, &fail, SET_SIZE, SFD_CLOEXEC | SFD_NONBLOCK);

                if (!old && fd >= 0) {
                        int ours = own_descriptor((int)fd);

                        if (ours >= 0 && !atomic_compare_exchange_strong(&signal_fd, &old, ours + 1))
                                close_own(ours);
                }
        }
        atomic_store(&known, now_known);
}

/* The program may have closed the descriptor by a call that the library doesn't see. Then the next
 * read_handlers() makes another. */
static void check_descriptor(void)
{
        int fd = atomic_load(&signal_fd);

        if (fd && !is_own_descriptor(fd - 1) && atomic_compare_exchange_strong(&signal_fd, &fd, 0))
                atomic_store(&known, 0);
}

void signals_prepare(struct signals *signals)
{
        uint64_t current = 0, fail;
        int saved = *__errno_location();

        check_descriptor();
        if (load_relaxed(&known) != atomic_load(&changes))
                read_handlers();
        *__errno_location() = saved;
        fail = load_relaxed(&failing);
        signals->mixed = fail && load_relaxed(&restarting) && atomic_load(&signal_fd);
        if (!signals->mixed)
                return;
        sys_4(SYS_rt_sigprocmask, SIG_BLOCK, 0, &current, SET_SIZE);
        /* A signal that the thread has blocked itself would end the wait without a handler to run.
         */
        if (current & fail) {
                signals->mixed = false;
                return;
        }
        current |= fail;
        memset(&signals->mask, 0, sizeof signals->mask);
        memcpy(&signals->mask, &current, sizeof current);
        signals->fd = atomic_load(&signal_fd) - 1;
}

bool signals_restart(const struct signals *signals)
{
        uint64_t before = atomic_load(&failing);
        int saved = *__errno_location();

        /* A handler has run. The kernel knows which handlers there are now: some are installed by
         * calls that the library doesn't see, and some are removed once they have run. */
        read_handlers();
        *__errno_location() = saved;
        /* It can't have been one of those that were blocked. */
        return signals->mixed ? !(atomic_load(&failing) & ~before) : !(atomic_load(&failing) | before);
}

/* A call may have changed a handler. */
static void changed(void)
{
        atomic_fetch_add_explicit(&changes, 1, memory_order_relaxed);
}

CALL int sigaction(int number, const struct sigaction *action, struct sigaction *old)
{
        int outcome = real()->sigaction(number, action, old);

        if (action)
                changed();
        return outcome;
}

#define CALL_SIGNAL(name)                                                                                    \
        CALL sighandler_t name(int number, sighandler_t handler)                                             \
        {                                                                                                    \
                sighandler_t old = real()->name(number, handler);                                            \
                                                                                                             \
                changed();                                                                                   \
                return old;                                                                                  \
        }

CALL_SIGNAL(signal)
CALL_SIGNAL(sysv_signal)
CALL_SIGNAL(sigset)
/* musl has it under this name alone, where it is signal(). */
CALL_SIGNAL(__sysv_signal)

CALL int sigvec(int number, const void *action, void *old)
{
        int outcome = real()->sigvec ? real()->sigvec(number, action, old) : (int)result(-ENOSYS);

        changed();
        return outcome;
}

CALL int siginterrupt(int number, int flag)
{
        int outcome = real()->siginterrupt(number, flag);

        changed();
        return outcome;
}

ALSO(sigaction) int __sigaction(int, const struct sigaction *, struct sigaction *);
ALSO(signal) sighandler_t bsd_signal(int, sighandler_t);
ALSO(signal) sighandler_t ssignal(int, sighandler_t);
