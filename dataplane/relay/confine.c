/* A call that is not listed fails with ENOSYS, and the kernel logs it: a newer C library or driver
 * may try one, and goes on without it. The relay must not end for that, since its connections would
 * be reset. Calls by which a process gets hold of something else end it.
 */
#include "confine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <seccomp.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *const allowed[] = {
    /* the relay */
    "close", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "exit", "exit_group",
    "fcntl", "getrandom", "getsockopt", "lseek", "madvise", "mmap", "munmap", "poll", "ppoll", "read",
    "readv", "recvfrom", "recvmsg", "sendmsg", "sendto", "setsockopt", "shutdown", "signalfd4", "write",
    "writev",
    /* the C library */
    "arch_prctl", "brk", "clock_gettime", "clock_nanosleep", "futex", "getcpu", "getegid", "geteuid",
    "getgid", "getpid", "getrlimit", "gettid", "gettimeofday", "getuid", "membarrier", "mprotect", "mremap",
    "nanosleep", "prlimit64", "restart_syscall", "riscv_hwprobe", "rseq", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "sched_getaffinity", "sched_yield", "set_robust_list", "setrlimit", "sigaltstack",
    "sysinfo", "tgkill", "time", "uname",
    /* threads, which connect queue pairs; libraries that are loaded when a device is opened */
    "clone", "clone3", "set_tid_address", "access", "faccessat", "faccessat2", "fstat", "fstatfs",
    "getdents64", "lstat", "newfstatat", "pread64", "readlink", "readlinkat", "stat", "statfs", "statx",
    /* devices */
    "bind", "eventfd2", "flock", "get_mempolicy", "getsockname", "ioctl", "mbind", "mlock", "munlock",
    "pipe2", "pwrite64", "sched_setaffinity", "set_mempolicy"};

#ifdef FREEFLOW_MEMORY
static const char *const of_memory[] = {"ftruncate", "memfd_create", "pidfd_getfd", "pidfd_open"};
#endif

/* What no honest relay does. */
static const char *const deadly[] = {
    /* other programs and processes */
    "execve", "execveat", "fork", "vfork", "kill", "tkill", "ptrace", "process_vm_readv", "process_vm_writev",
    /* connections */
    "accept", "accept4", "connect", "listen",
    /* other rights, and other files */
    "chroot", "keyctl", "mount", "mount_setattr", "move_mount", "open_by_handle_at", "open_tree",
    "personality", "pivot_root", "setns", "setresuid", "setuid", "swapon", "umount2", "unshare",
    /* the kernel */
    "bpf", "delete_module", "finit_module", "init_module", "io_uring_setup", "kexec_file_load", "kexec_load",
    "perf_event_open", "userfaultfd"};

/* Keeps what it has of `kept`. */
static int drop_capabilities(uint64_t kept)
{
        struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
        struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];

        if (syscall(SYS_capget, &header, data))
                return errno;
        for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
                data[i].permitted &= (uint32_t)(kept >> (32 * i));
                data[i].effective = data[i].permitted;
                data[i].inheritable = 0;
        }
        return syscall(SYS_capset, &header, data) ? errno : 0;
}

/* Names that this machine's kernel does not have are skipped. Negative errno. */
static int add(scmp_filter_ctx filter, uint32_t action, const char *const *names, size_t count_of)
{
        int error = 0;

        for (size_t i = 0; i < count_of && !error; i++) {
                int number = seccomp_syscall_resolve_name(names[i]);

                if (number >= 0)
                        error = seccomp_rule_add(filter, action, number, 0);
        }
        return error;
}

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

static int filter_calls(void)
{
        scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ERRNO(ENOSYS));
        int error;

        if (!filter)
                return ENOMEM;
        /* The kernel may not have a log. */
        (void)seccomp_attr_set(filter, SCMP_FLTATR_CTL_LOG, 1);
        error = add(filter, SCMP_ACT_ALLOW, allowed, COUNT_OF(allowed));
#ifdef FREEFLOW_MEMORY
        if (!error)
                error = add(filter, SCMP_ACT_ALLOW, of_memory, COUNT_OF(of_memory));
#endif
        if (!error)
                error = add(filter, SCMP_ACT_KILL_PROCESS, deadly, COUNT_OF(deadly));
        /* libibverbs asks the kernel which devices there are. */
        if (!error)
                error = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(socket), 1,
                                         SCMP_A0(SCMP_CMP_EQ, AF_NETLINK));
        /* Libraries, and devices; nothing that is made or emptied by that. */
        if (!error)
                error = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(openat), 1,
                                         SCMP_A2(SCMP_CMP_MASKED_EQ, O_CREAT | O_TRUNC, 0));
        if (!error)
                error = seccomp_load(filter);
        seccomp_release(filter);
        return -error;
}

int confine(void)
{
        uint64_t kept = UINT64_C(1) << CAP_IPC_LOCK;
        int error;

#ifdef FREEFLOW_MEMORY
        kept |= UINT64_C(1) << CAP_SYS_PTRACE;
#endif
        error = drop_capabilities(kept);
        if (!error && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
                error = errno;
        return error ? error : filter_calls();
}
