/* Calls that close, duplicate and control descriptors. */
#include "calls.h"

#include "closing.h"
#include "emulate.h"
#include "ends.h"
#include "fallback.h"
#include "handover.h"
#include "inherit.h"
#include "own.h"
#include "poller.h"
#include "protocol.h"
#include "sys.h"
#include "verbs_client.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sockios.h>
#include <stdarg.h>
#include <sys/ioctl.h>

/* The descriptor is about to be closed, by close() or because another one replaces it. */
static void before_close(int fd)
{
        uint64_t key;
        struct end *end;

        if (!process.on || (unsigned)fd >= DESCRIPTORS || !load_relaxed(&process.fds[fd]))
                return;
        end = end_of(fd, &key);
        if (!in_this_process())
                return;
        if (end)
                close_ring(fd, end, key);
        poller_closed(fd);
        verbs_closing(fd);
        if (end)
                end_forget(fd);
}

CALL int close(int fd)
{
        if (__builtin_expect(is_own_descriptor(fd), 0))
                return (int)result(-EBADF);
        before_close(fd);
        return real()->close(fd);
}

/* A descriptor is about to be duplicated. */
static void before_dup(int old)
{
        uint64_t key;
        struct end *end = end_of(old, &key);

        if (end && !in_this_process())
                inherit(old, end, key);
}

static int alias(int old, int new)
{
        int saved = *__errno_location();
        uint64_t key;
        struct end *end;

        if (new < 0 || !process.on || (unsigned)old >= DESCRIPTORS || !load_relaxed(&process.fds[old]) ||
            !in_this_process())
                return new;
        end = end_of(old, &key);
        if (end) {
                end_alias(old, new);
                /* The C library's standard streams read and write without the library. */
                if (new <= 2)
                        hand_over(new, end, key, REASON_STDIO);
        } else {
                poller_alias(old, new);
                verbs_alias(old, new);
        }
        *__errno_location() = saved;
        return new;
}

CALL int dup(int fd)
{
        before_dup(fd);
        return alias(fd, real()->dup(fd));
}

CALL int dup3(int old, int new, int flags)
{
        uint64_t key;

        if (!process.on)
                return real()->dup3(old, new, flags);
        if (is_own_descriptor(old))
                return (int)result(-EBADF);
        if (is_own_descriptor(new))
                return (int)result(-EBUSY);
        /* Only a dup3() that succeeds closes the other one. */
        if (old != new && (end_of(old, &key) || sys_2(SYS_fcntl, old, F_GETFD) >= 0))
                before_close(new);
        before_dup(old);
        return alias(old, real()->dup3(old, new, flags));
}

CALL int dup2(int old, int new)
{
        if (!process.on)
                return real()->dup2(old, new);
        if (old == new || is_own_descriptor(old) || is_own_descriptor(new))
                return is_own_descriptor(new) ? (int)result(old == new ? -EBADF : -EBUSY)
                                              : real()->dup2(old, new);
        if (sys_2(SYS_fcntl, old, F_GETFD) >= 0)
                before_close(new);
        before_dup(old);
        return alias(old, real()->dup2(old, new));
}

static int control(int fd, int command, long argument)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        int outcome;

        if (end && (command == F_DUPFD || command == F_DUPFD_CLOEXEC))
                before_dup(fd);
        /* The kernel sends signals for its own events, and not for those of a ring. */
        if (end && command == F_SETFL && argument & O_ASYNC)
                fall_back(fd, end, key, REASON_OPTION);
        outcome =
            real()->fcntl64 ? real()->fcntl64(fd, command, argument) : real()->fcntl(fd, command, argument);
        if (outcome < 0)
                return outcome;
        if (command == F_DUPFD || command == F_DUPFD_CLOEXEC)
                return alias(fd, outcome);
        if (end && command == F_SETFL)
                atomic_store(&end->nonblocking, (argument & O_NONBLOCK) != 0);
        return outcome;
}

CALL int fcntl(int fd, int command, ...)
{
        va_list list;
        long argument;

        va_start(list, command);
        argument = va_arg(list, long);
        va_end(list);
        return control(fd, command, argument);
}

ALSO(fcntl) int fcntl64(int, int, ...);
ALSO(fcntl) int __fcntl(int, int, ...);

CALL int ioctl(int fd, unsigned long request, ...)
{
        uint64_t key;
        struct end *end;
        va_list list;
        void *argument;
        int outcome;

        va_start(list, request);
        argument = va_arg(list, void *);
        va_end(list);
        end = end_of(fd, &key);
        if (end && request == FIOASYNC && argument && *(int *)argument)
                fall_back(fd, end, key, REASON_OPTION);
        outcome = real()->ioctl(fd, request, argument);
        end = outcome < 0 ? NULL : end_of(fd, &key);
        if (!end)
                return outcome;
        if (request == FIONBIO)
                atomic_store(&end->nonblocking, *(int *)argument != 0);
        if (request == FIONREAD)
                *(int *)argument = emulate_unread(end, *(int *)argument);
        /* Bytes that are left in a ring come before TCP's mark. */
        if (request == SIOCATMARK && *(int *)argument && emulate_unread(end, 0))
                *(int *)argument = 0;
        return outcome;
}

/* The library's own stay open: a program that closes all descriptors doesn't mean those that it
 * doesn't know.
 */
static int close_all(unsigned first, unsigned last, int flags)
{
        unsigned from = first;

        if (first > last)
                return (int)result(-EINVAL);
        for (unsigned fd = first; fd <= last && fd < DESCRIPTORS; fd++) {
                long closed;

                if (!load_relaxed(&process.fds[fd]))
                        continue;
                if (!is_own_descriptor((int)fd)) {
                        before_close((int)fd);
                        continue;
                }
                closed = fd > from ? sys_3(SYS_close_range, from, fd - 1, flags) : 0;
                if (closed < 0)
                        return (int)result(closed);
                from = fd + 1;
        }
        return from > last ? 0 : (int)result(sys_3(SYS_close_range, from, last, flags));
}

CALL int close_range(unsigned first, unsigned last, int flags)
{
        if (!process.on || flags)
                return (int)result(sys_3(SYS_close_range, first, last, flags));
        return close_all(first, last, 0);
}

static bool close_theirs(int fd, const char *link)
{
        (void)link;
        if (!is_own_descriptor(fd))
                close(fd);
        return true;
}

CALL void closefrom(int first)
{
        int saved = *__errno_location();

        if (first < 0)
                first = 0;
        if (!process.on && real()->closefrom)
                real()->closefrom(first);
        /* Linux before 5.9 has no close_range(). */
        else if (close_all((unsigned)first, UINT_MAX, 0) < 0)
                each_descriptor(first, close_theirs);
        *__errno_location() = saved;
}

/* The C library's streams read and write without the library. */
CALL FILE *fdopen(int fd, const char *mode)
{
        hand_over_descriptor(fd, REASON_STDIO);
        return real()->fdopen(fd, mode);
}

ALSO(close) int __close(int);
ALSO(fdopen) __attribute__((malloc)) FILE *_IO_fdopen(int, const char *);
ALSO(dup2) int __dup2(int, int);
