/* select(): see poll_wait.h. */
#include "calls.h"

#include "poll_wait.h"
#include "scratch.h"
#include "sleep.h"

#include <errno.h>
#include <limits.h>
#include <string.h>

static bool is_in(const fd_set *set, int fd)
{
        return set && ((const unsigned long *)(const void *)set)[(unsigned)fd / (8 * sizeof(long))] >>
                              ((unsigned)fd % (8 * sizeof(long))) &
                          1;
}

static void put(fd_set *set, int fd)
{
        ((unsigned long *)(void *)set)[(unsigned)fd / (8 * sizeof(long))] |=
            1ul << ((unsigned)fd % (8 * sizeof(long)));
}

static void clear(fd_set *set, int size)
{
        if (set)
                memset(set, 0, ((size_t)size + 8 * sizeof(long) - 1) / (8 * sizeof(long)) * sizeof(long));
}

/* List the descriptors of the sets for poll(). Returns how many there are. */
static nfds_t to_poll(int size, const fd_set *in, const fd_set *out, const fd_set *except, struct pollfd *fds)
{
        nfds_t count = 0;

        for (int fd = 0; fd < size; fd++) {
                short events = (is_in(in, fd) ? POLLIN | POLLRDNORM | POLLRDBAND : 0) |
                               (is_in(out, fd) ? POLLOUT | POLLWRNORM | POLLWRBAND : 0) |
                               (is_in(except, fd) ? POLLPRI : 0);

                if (events)
                        fds[count++] = (struct pollfd){.fd = fd, .events = events};
        }
        return count;
}

static int to_sets(const struct pollfd *fds, nfds_t count, int size, fd_set *in, fd_set *out, fd_set *except)
{
        int found = 0;

        for (nfds_t i = 0; i < count; i++)
                if (fds[i].revents & POLLNVAL)
                        return (int)result(-EBADF);
        clear(in, size);
        clear(out, size);
        clear(except, size);
        for (nfds_t i = 0; i < count; i++) {
                short got = fds[i].revents, wanted = fds[i].events;

                if (wanted & POLLIN && got & (POLLIN | POLLRDNORM | POLLRDBAND | POLLHUP | POLLERR)) {
                        put(in, fds[i].fd);
                        found++;
                }
                if (wanted & POLLOUT && got & (POLLOUT | POLLWRNORM | POLLWRBAND | POLLERR)) {
                        put(out, fds[i].fd);
                        found++;
                }
                if (wanted & POLLPRI && got & POLLPRI) {
                        put(except, fds[i].fd);
                        found++;
                }
        }
        return found;
}

/* How many descriptors are in the sets. */
static nfds_t set_count(int size, const fd_set *in, const fd_set *out, const fd_set *except)
{
        const unsigned long *sets[] = {(const void *)in, (const void *)out, (const void *)except};
        const int width = 8 * sizeof(long);
        nfds_t count = 0;

        for (int word = 0; word * width < size; word++) {
                unsigned long all = 0;

                for (int i = 0; i < 3; i++)
                        all |= sets[i] ? sets[i][word] : 0;
                if (size - word * width < width)
                        all &= (1ul << (size - word * width)) - 1;
                for (; all; all &= all - 1)
                        count++;
        }
        return count;
}

/* What a select() needs besides its sets. Few descriptors are on the stack, which may be small. */
struct selection {
        struct pollfd *fds, few[POLL_FEW];
        uint64_t *keys, few_keys[POLL_FEW];
        struct scratch own[2];
        bool scratch;
        nfds_t counted; /* descriptors that poll_kernel_begin() was called for */
};

static bool select_begin(struct selection *s, nfds_t count)
{
        s->fds = s->few;
        s->keys = s->few_keys;
        s->scratch = count > POLL_FEW;
        s->counted = 0;
        if (!s->scratch)
                return true;
        s->fds = scratch_take(SCRATCH_SELECT, count * sizeof *s->fds, &s->own[0]);
        if (!s->fds)
                return false;
        s->keys = scratch_take(SCRATCH_KEYS, count * sizeof *s->keys, &s->own[1]);
        if (!s->keys)
                scratch_return(SCRATCH_SELECT, &s->own[0]);
        return s->keys;
}

static void select_end(struct selection *s)
{
        poll_kernel_end(s->counted, s->keys);
        if (!s->scratch)
                return;
        scratch_return(SCRATCH_SELECT, &s->own[0]);
        scratch_return(SCRATCH_KEYS, &s->own[1]);
}

/* Returns true if the call was done, with its result in `*ready`. Otherwise the kernel has to be
 * called now.
 */
static bool select_rings(struct selection *s, int size, fd_set *in, fd_set *out, fd_set *except,
                         int64_t timeout, const sigset_t *mask, int *ready)
{
        nfds_t count = to_poll(size, in, out, except, s->fds);

        switch (poll_needs(s->fds, count)) {
        case POLL_KERNEL_COUNTED:
                s->counted = count;
                if (poll_kernel_begin(s->fds, count, s->keys))
                        return false;
                poll_kernel_end(count, s->keys);
                s->counted = 0;
                /* fall through */
        case POLL_RINGS:
                *ready = poll_wait(s->fds, count, timeout, mask);
                if (*ready >= 0)
                        *ready = to_sets(s->fds, count, size, in, out, except);
                return true;
        case POLL_KERNEL:
                break;
        }
        return false;
}

/* Linux writes the time that is left. */
static void subtract(struct timeval *timeout, uint64_t spent)
{
        int64_t s = (int64_t)(spent / 1000000000), us = (int64_t)(spent % 1000000000 / 1000);

        timeout->tv_sec -= s;
        timeout->tv_usec -= us;
        if (timeout->tv_usec < 0) {
                timeout->tv_usec += 1000000;
                timeout->tv_sec--;
        }
        if (timeout->tv_sec < 0)
                *timeout = (struct timeval){0};
}

CALL int select(int size, fd_set *in, fd_set *out, fd_set *except, struct timeval *timeout)
{
        struct timespec time = {0};
        struct selection s;
        uint64_t begin;
        int found;

        if (!process.on || size <= 0 || (timeout && (timeout->tv_sec < 0 || timeout->tv_usec < 0)))
                return real()->select(size, in, out, except, timeout);
        if (!select_begin(&s, set_count(size, in, out, except)))
                return -1;
        if (timeout) {
                time.tv_sec = timeout->tv_sec;
                if (__builtin_add_overflow(time.tv_sec, timeout->tv_usec / 1000000, &time.tv_sec))
                        time.tv_sec = LONG_MAX;
                time.tv_nsec = timeout->tv_usec % 1000000 * 1000;
        }
        begin = timeout ? now() : 0;
        if (!select_rings(&s, size, in, out, except, sleep_timespec(timeout ? &time : NULL), NULL, &found)) {
                found = real()->select(size, in, out, except, timeout);
        } else if (timeout) {
                *timeout = (struct timeval){time.tv_sec, time.tv_nsec / 1000};
                subtract(timeout, now() - begin);
        }
        select_end(&s);
        return found;
}

CALL int pselect(int size, fd_set *in, fd_set *out, fd_set *except, const struct timespec *timeout,
                 const sigset_t *mask)
{
        struct selection s;
        int found;

        if (!process.on || size <= 0 || !sleep_is_timespec(timeout))
                return real()->pselect(size, in, out, except, timeout, mask);
        if (!select_begin(&s, set_count(size, in, out, except)))
                return -1;
        if (!select_rings(&s, size, in, out, except, sleep_timespec(timeout), mask, &found))
                found = real()->pselect(size, in, out, except, timeout, mask);
        select_end(&s);
        return found;
}

ALSO(select) int __select(int, fd_set *, fd_set *, fd_set *, struct timeval *);
