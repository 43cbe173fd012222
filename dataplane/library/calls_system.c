/* Calls that change how the whole process works (retire.h), and system calls by number. */
#include "calls.h"

#include "protocol.h"
#include "retire.h"
#include "router.h"
#include "sys.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <unistd.h>

/* Even if the kernel then refuses the filter: the program wants to confine itself. */
static void confine(void)
{
        retire_heirs();
        retire(REASON_SANDBOX);
}

CALL TAKES_MORE int prctl(int option, ...)
{
        unsigned long argument[4];
        va_list list;

        va_start(list, option);
        for (int i = 0; i < 4; i++)
                argument[i] = va_arg(list, unsigned long);
        va_end(list);
        if (option == PR_SET_SECCOMP)
                confine();
        return (int)result(sys_5(SYS_prctl, option, argument[0], argument[1], argument[2], argument[3]));
}

/* The router's path is gone afterwards, so the library connects before. */
CALL int chroot(const char *path)
{
        router_connect();
        return (int)result(sys_1(SYS_chroot, path));
}

CALL int unshare(int flags)
{
        if (flags & CLONE_NEWNS)
                router_connect();
        return (int)result(sys_1(SYS_unshare, flags));
}

CALL int setns(int fd, int flags)
{
        if (!flags || flags & CLONE_NEWNS)
                router_connect();
        return (int)result(sys_2(SYS_setns, fd, flags));
}

/* A library that binds to the C library before it binds to us, and one in a namespace with a C
 * library of its own. The C library takes its search paths from its caller, so these are jumps. */
CALL void *dlopen(const char *file, int mode)
{
        void *(*next)(const char *, int) = real_named("dlopen");

        if (file && mode & RTLD_DEEPBIND)
                retire(REASON_RAW);
        return next(file, mode);
}

CALL void *dlmopen(Lmid_t space, const char *file, int mode)
{
        void *(*next)(Lmid_t, const char *, int) = real_named("dlmopen");

        if (file && (space != LM_ID_BASE || mode & RTLD_DEEPBIND))
                retire(REASON_RAW);
        return next(space, file, mode);
}

/* System calls by number that the library wraps because of what they do to descriptors, or to the
 * process. True: done, with its outcome. */
static bool is_known(long number, const long *a, long *outcome)
{
        switch (number) {
        case SYS_close:
                *outcome = close((int)a[0]);
                return true;
        case SYS_close_range:
                *outcome = close_range((unsigned)a[0], (unsigned)a[1], (int)a[2]);
                return true;
        case SYS_dup:
                *outcome = dup((int)a[0]);
                return true;
#ifdef SYS_dup2
        case SYS_dup2:
                *outcome = dup2((int)a[0], (int)a[1]);
                return true;
#endif
        case SYS_dup3:
                *outcome = dup3((int)a[0], (int)a[1], (int)a[2]);
                return true;
        case SYS_fcntl:
                *outcome = fcntl((int)a[0], (int)a[1], a[2]);
                return true;
        case SYS_exit_group:
                _exit((int)a[0]);
        case SYS_execve:
                *outcome = execve((const char *)a[0], (char *const *)a[1], (char *const *)a[2]);
                return true;
        case SYS_execveat:
                *outcome = execveat((int)a[0], (const char *)a[1], (char *const *)a[2], (char *const *)a[3],
                                    (int)a[4]);
                return true;
        default:
                return false;
        }
}

static bool copies(long number, const long *a)
{
#ifdef SYS_fork
        if (number == SYS_fork)
                return true;
#endif
        /* The first word of what clone3 is given are the flags. */
        return (number == SYS_clone && !(a[0] & CLONE_VM)) ||
               (number == SYS_clone3 && a[1] >= (long)sizeof(uint64_t) && !(*(uint64_t *)a[0] & CLONE_VM));
}

CALL TAKES_MORE long syscall(long number, ...)
{
        long a[6], outcome;
        bool copied;
        va_list list;

        va_start(list, number);
        for (int i = 0; i < 6; i++)
                a[i] = va_arg(list, long);
        va_end(list);
        if (!process.on)
                return result(sys6(number, a[0], a[1], a[2], a[3], a[4], a[5]));
        if (is_known(number, a, &outcome))
                return outcome;
        if (number == SYS_seccomp && (a[0] == SECCOMP_SET_MODE_STRICT || a[0] == SECCOMP_SET_MODE_FILTER))
                confine();
        if (number == SYS_prctl && a[0] == PR_SET_SECCOMP)
                confine();
        if (number == SYS_chroot || number == SYS_pivot_root ||
            ((number == SYS_unshare && a[0] & CLONE_NEWNS) || number == SYS_setns))
                router_connect();
        copied = copies(number, a);
        if (copied)
                family_fork();
        outcome = sys6(number, a[0], a[1], a[2], a[3], a[4], a[5]);
        if (copied && outcome)
                family_fork_done(outcome > 0);
        if (number == SYS_io_uring_setup && outcome >= 0)
                retire(REASON_RAW);
        return result(outcome);
}
