/* The C library's functions behind the calls that the library wraps, and those that it uses. */
#ifndef FREEFLOW_REAL_H
#define FREEFLOW_REAL_H

#include <aio.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#define REAL_FUNCTIONS(F)                                                                                    \
        F(int, socket, (int, int, int))                                                                      \
        F(int, connect, (int, const struct sockaddr *, socklen_t))                                           \
        F(int, accept, (int, struct sockaddr *, socklen_t *))                                                \
        F(int, accept4, (int, struct sockaddr *, socklen_t *, int))                                          \
        F(int, listen, (int, int))                                                                           \
        F(int, shutdown, (int, int))                                                                         \
        F(int, setsockopt, (int, int, int, const void *, socklen_t))                                         \
        F(int, getsockopt, (int, int, int, void *, socklen_t *))                                             \
        F(int, close, (int))                                                                                 \
        F(int, close_range, (unsigned, unsigned, int))                                                       \
        F(void, closefrom, (int))                                                                            \
        F(int, dup, (int))                                                                                   \
        F(int, dup2, (int, int))                                                                             \
        F(int, dup3, (int, int, int))                                                                        \
        F(int, fcntl, (int, int, ...))                                                                       \
        F(int, fcntl64, (int, int, ...))                                                                     \
        F(int, ioctl, (int, unsigned long, ...))                                                             \
        F(ssize_t, read, (int, void *, size_t))                                                              \
        F(ssize_t, readv, (int, const struct iovec *, int))                                                  \
        F(ssize_t, preadv2, (int, const struct iovec *, int, off_t, int))                                    \
        F(ssize_t, pwritev2, (int, const struct iovec *, int, off_t, int))                                   \
        F(ssize_t, write, (int, const void *, size_t))                                                       \
        F(ssize_t, writev, (int, const struct iovec *, int))                                                 \
        F(ssize_t, send, (int, const void *, size_t, int))                                                   \
        F(ssize_t, sendto, (int, const void *, size_t, int, const struct sockaddr *, socklen_t))             \
        F(ssize_t, sendmsg, (int, const struct msghdr *, int))                                               \
        F(int, sendmmsg, (int, struct mmsghdr *, unsigned, int))                                             \
        F(ssize_t, recv, (int, void *, size_t, int))                                                         \
        F(ssize_t, recvfrom, (int, void *, size_t, int, struct sockaddr *, socklen_t *))                     \
        F(ssize_t, recvmsg, (int, struct msghdr *, int))                                                     \
        F(int, recvmmsg, (int, struct mmsghdr *, unsigned, int, struct timespec *))                          \
        F(ssize_t, sendfile, (int, int, off_t *, size_t))                                                    \
        F(ssize_t, splice, (int, off64_t *, int, off64_t *, size_t, unsigned))                               \
        F(int, poll, (struct pollfd *, nfds_t, int))                                                         \
        F(int, ppoll, (struct pollfd *, nfds_t, const struct timespec *, const sigset_t *))                  \
        F(int, select, (int, fd_set *, fd_set *, fd_set *, struct timeval *))                                \
        F(int, pselect, (int, fd_set *, fd_set *, fd_set *, const struct timespec *, const sigset_t *))      \
        F(int, epoll_create, (int))                                                                          \
        F(int, epoll_create1, (int))                                                                         \
        F(int, epoll_ctl, (int, int, int, struct epoll_event *))                                             \
        F(int, epoll_wait, (int, struct epoll_event *, int, int))                                            \
        F(int, epoll_pwait, (int, struct epoll_event *, int, int, const sigset_t *))                         \
        F(int, epoll_pwait2, (int, struct epoll_event *, int, const struct timespec *, const sigset_t *))    \
        F(FILE *, fdopen, (int, const char *))                                                               \
        F(int, vdprintf, (int, const char *, va_list))                                                       \
        F(int, __vdprintf_chk, (int, int, const char *, va_list))                                            \
        F(int, aio_read, (struct aiocb *))                                                                   \
        F(int, aio_write, (struct aiocb *))                                                                  \
        F(int, lio_listio, (int, struct aiocb *const *, int, struct sigevent *))                             \
        F(void *, _IO_file_attach, (void *, int))                                                            \
        F(void, backtrace_symbols_fd, (void *const *, int, int))                                             \
        F(int, sigaction, (int, const struct sigaction *, struct sigaction *))                               \
        F(sighandler_t, signal, (int, sighandler_t))                                                         \
        F(sighandler_t, sysv_signal, (int, sighandler_t))                                                    \
        F(sighandler_t, __sysv_signal, (int, sighandler_t))                                                  \
        F(sighandler_t, sigset, (int, sighandler_t))                                                         \
        F(int, sigvec, (int, const void *, void *))                                                          \
        F(int, siginterrupt, (int, int))                                                                     \
        F(void, _exit, (int))                                                                                \
        F(int, execve, (const char *, char *const *, char *const *))                                         \
        F(int, execv, (const char *, char *const *))                                                         \
        F(int, execvp, (const char *, char *const *))                                                        \
        F(int, execvpe, (const char *, char *const *, char *const *))                                        \
        F(int, fexecve, (int, char *const *, char *const *))                                                 \
        F(int, execveat, (int, const char *, char *const *, char *const *, int))                             \
        F(int, posix_spawn,                                                                                  \
          (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,             \
           char *const *, char *const *))                                                                    \
        F(int, posix_spawnp,                                                                                 \
          (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,             \
           char *const *, char *const *))                                                                    \
        F(int, posix_spawn_file_actions_adddup2, (posix_spawn_file_actions_t *, int, int))                   \
        F(pid_t, fork, (void))

/* What we only use. */
#define USED_FUNCTIONS(F)                                                                                    \
        F(int, clock_gettime, (clockid_t, struct timespec *))                                                \
        F(int, sched_getcpu, (void))                                                                         \
        F(void, pthread_testcancel, (void))                                                                  \
        F(int, pthread_key_create, (pthread_key_t *, void (*)(void *)))                                      \
        F(int, pthread_setspecific, (pthread_key_t, const void *))                                           \
        F(int, raise, (int))                                                                                 \
        F(int, vsnprintf, (char *, size_t, const char *, va_list))                                           \
        F(int, __vsnprintf_chk, (char *, size_t, int, size_t, const char *, va_list))                        \
        F(int, __register_atfork, (void (*)(void), void (*)(void), void (*)(void), void *))                  \
        F(int, pthread_atfork, (void (*)(void), void (*)(void), void (*)(void)))

struct real {
#define FIELD(type, name, arguments) type(*name) arguments;
        REAL_FUNCTIONS(FIELD)
        USED_FUNCTIONS(FIELD)
#undef FIELD
        const ptrdiff_t *rseq_offset; /* glibc 2.35 and later */
};

extern struct real real_functions;
void real_find(void);
/* A function that isn't called often enough to be looked up at the start; NULL. */
void *real_named(const char *name);

/* Other libraries' constructors may call us before ours ran. */
static inline struct real *real(void)
{
        if (__builtin_expect(!real_functions.read, 0))
                real_find();
        return &real_functions;
}

int *__errno_location(void);

/* The kernel's way of returning to the C library's. */
static inline long result(long value)
{
        if (value < 0 && value > -4096) {
                *__errno_location() = (int)-value;
                return -1;
        }
        return value;
}

#endif
