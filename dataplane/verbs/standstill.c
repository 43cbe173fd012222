#include "standstill.h"

#include "monotonic.h"
#include "mutex.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>

enum {
        MOST_THREADS = 1024,
        STACK = 64 * 1024,
        PATIENCE = 100, /* ms: for threads to stand still */
        LOOKS = 50,     /* at a thread, before */
        PAUSE = 20000,  /* ns between two of them */
};

enum { ENDED = -1 };

/* What the helper is told, and says. One thread at a time is here. */
static struct {
        struct mutex mutex;
        int32_t process, caller; /* IDs */
        uintptr_t caller_stack, caller_block;
        _Atomic bool may_trace;
        void (*act)(void *argument);
        void *argument;
        bool done;
        uint64_t deadline;
        /* Threads that were stopped, and the signal that each was about to get. */
        uint32_t count;
        struct held {
                int32_t thread, signal;
        } held[MOST_THREADS];
        _Alignas(64) unsigned char stack[STACK];
} helper;

/* --- a process in this memory */

/* Make one that runs `run` on the helper's stack and ends with it. Its end is told by no signal.
 * Returns its ID. */
static long spawn(void (*run)(void))
{
        const unsigned long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_UNTRACED;
        void *top = helper.stack + STACK;
#if defined(__x86_64__)
        long made;
        register long r8 __asm__("r8") = 0;
        register long r10 __asm__("r10") = 0;
        register void (*r12)(void) __asm__("r12") = run;

        __asm__ volatile("syscall\n\t"
                         "test %%rax, %%rax\n\t"
                         "jnz 1f\n\t"
                         "xor %%ebp, %%ebp\n\t"
                         "call *%[run]\n\t"
                         "xor %%edi, %%edi\n\t"
                         "mov %[exit], %%eax\n\t"
                         "syscall\n\t"
                         "hlt\n"
                         "1:"
                         : "=a"(made)
                         : "0"((long)SYS_clone), "D"(flags), "S"(top), "d"(0L), "r"(r8),
                           "r"(r10), [run] "r"(r12), [exit] "i"(SYS_exit)
                         : "rcx", "r11", "memory", "cc");
        return made;
#else
        register long x8 __asm__("x8") = SYS_clone;
        register unsigned long x0 __asm__("x0") = flags;
        register void *x1 __asm__("x1") = top;
        register long x2 __asm__("x2") = 0;
        register long x3 __asm__("x3") = 0;
        register long x4 __asm__("x4") = 0;
        register void (*x19)(void) __asm__("x19") = run;

        __asm__ volatile("svc 0\n\t"
                         "cbnz x0, 1f\n\t"
                         "mov x29, #0\n\t"
                         "blr %[run]\n\t"
                         "mov x0, #0\n\t"
                         "mov x8, %[exit]\n\t"
                         "svc 0\n\t"
                         "1:"
                         : "+r"(x0)
                         : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), [run] "r"(x19), [exit] "i"(SYS_exit)
                         : "memory", "cc");
        return (long)x0;
#endif
}

/* --- what the helper does */

static bool is_held(int32_t thread)
{
        for (uint32_t i = 0; i < helper.count; i++)
                if (helper.held[i].thread == thread)
                        return true;
        return false;
}

/* Wait until it stands still, or has ended. False: it does neither. */
static bool await(struct held *held)
{
        int status = 0;
        long got;

        for (int i = 0; !(got = sys_4(SYS_wait4, held->thread, &status, __WALL | WNOHANG, 0)); i++) {
                if (i < LOOKS) {
                        relax();
                        continue;
                }
                if (monotonic() > helper.deadline)
                        return false;
                sys_sleep(PAUSE);
        }
        if (got < 0 || !WIFSTOPPED(status))
                held->signal = ENDED;
        else if (status >> 16 != PTRACE_EVENT_STOP)
                held->signal = WSTOPSIG(status);
        return true;
}

/* Stop a thread. False: that can't be done. */
static bool stop(int32_t thread)
{
        long failure;

        if (helper.count == MOST_THREADS)
                return false;
        failure = sys_4(SYS_ptrace, PTRACE_SEIZE, thread, 0, 0);
        if (failure)
                return failure == -ESRCH;
        helper.held[helper.count++] = (struct held){.thread = thread};
        sys_4(SYS_ptrace, PTRACE_INTERRUPT, thread, 0, 0);
        return true;
}

static void release_all(void)
{
        for (uint32_t i = 0; i < helper.count; i++)
                if (helper.held[i].signal != ENDED)
                        sys_4(SYS_ptrace, PTRACE_DETACH, helper.held[i].thread, 0, helper.held[i].signal);
}

static bool is_between(uintptr_t address, uintptr_t first, uintptr_t end)
{
        return address >= first && address < end;
}

bool standstill_has_stack(uintptr_t first, uintptr_t end)
{
        if (is_between(helper.caller_stack, first, end) || is_between(helper.caller_block, first, end))
                return true;
        for (uint32_t i = 0; i < helper.count; i++) {
                struct user_regs_struct registers = {0};
                struct iovec vec = {.iov_base = &registers, .iov_len = sizeof registers};
                uintptr_t block = 0;

                if (helper.held[i].signal == ENDED)
                        continue;
                if (sys_4(SYS_ptrace, PTRACE_GETREGSET, helper.held[i].thread, NT_PRSTATUS, &vec))
                        return true;
#if defined(__x86_64__)
                block = registers.fs_base;
                if (is_between(registers.rsp, first, end) || is_between(block, first, end))
                        return true;
#else
                vec = (struct iovec){.iov_base = &block, .iov_len = sizeof block};
                sys_4(SYS_ptrace, PTRACE_GETREGSET, helper.held[i].thread, NT_ARM_TLS, &vec);
                if (is_between(registers.sp, first, end) || is_between(block, first, end))
                        return true;
#endif
        }
        return false;
}

static uintptr_t thread_pointer(void)
{
        uintptr_t block;

#if defined(__x86_64__)
        __asm__("mov %%fs:0, %0" : "=r"(block));
#else
        __asm__("mrs %0, tpidr_el0" : "=r"(block));
#endif
        return block;
}

static int32_t number_of(const char *text)
{
        int32_t number = 0;

        for (; *text >= '0' && *text <= '9'; text++)
                number = number * 10 + *text - '0';
        return *text ? 0 : number;
}

/* linux/dirent.h isn't given to programs. */
struct thread_entry {
        uint64_t inode;
        int64_t offset;
        uint16_t size;
        uint8_t type;
        char name[];
};

/* Stop those threads that the list has now. False: one can't be. */
static bool stop_listed(long list)
{
        _Alignas(struct thread_entry) char buffer[4096];
        long got;

        sys_3(SYS_lseek, list, 0, 0);
        while ((got = sys_3(SYS_getdents64, list, buffer, sizeof buffer)) > 0)
                for (long at = 0; at < got;) {
                        const struct thread_entry *entry = (const void *)(buffer + at);
                        int32_t thread = number_of(entry->name);

                        at += entry->size;
                        if (thread && thread != helper.caller && !is_held(thread) && !stop(thread))
                                return false;
                }
        return got == 0;
}

/* /proc/PID/task */
static long open_list(void)
{
        char path[32] = "/proc/", digits[12];
        int length = 6, count = 0;

        for (int32_t left = helper.process; left; left /= 10)
                digits[count++] = (char)('0' + left % 10);
        while (count)
                path[length++] = digits[--count];
        for (const char *rest = "/task"; *rest; rest++)
                path[length++] = *rest;
        path[length] = 0;
        return sys_4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
}

/* A thread that runs may make others: until none is new. */
static bool hold_all(void)
{
        long list = open_list();
        uint32_t before;
        bool held = list >= 0;

        do {
                before = helper.count;
                held = held && stop_listed(list);
                for (uint32_t i = before; held && i < helper.count; i++)
                        held = await(&helper.held[i]);
        } while (held && helper.count != before);
        if (list >= 0)
                sys_1(SYS_close, list);
        return held;
}

static void help(void)
{
        /* Nobody else would end it, if the process is killed; nor if it was before this call. */
        if (sys_5(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) ||
            (int32_t)sys_0(SYS_getppid) != helper.process)
                return;
        helper.deadline = monotonic() + UINT64_C(1000000) * PATIENCE;
        while (!atomic_load_explicit(&helper.may_trace, memory_order_acquire)) {
                if (monotonic() > helper.deadline)
                        return;
                sys_0(SYS_sched_yield);
        }
        if (hold_all()) {
                helper.act(helper.argument);
                helper.done = true;
        }
        release_all();
}

/* --- */

/* Do only parents trace their children here (Yama's mode 1)? */
static bool is_restricted(void)
{
        long file =
            sys_4(SYS_openat, AT_FDCWD, "/proc/sys/kernel/yama/ptrace_scope", O_RDONLY | O_CLOEXEC, 0);
        char mode = 0;

        if (file < 0)
                return false;
        sys_3(SYS_read, file, &mode, 1);
        sys_1(SYS_close, file);
        return mode == '1';
}

bool standstill(void (*act)(void *argument), void *argument)
{
        uint64_t all = UINT64_MAX, before = 0;
        bool done;
        long made;

        mutex_take(&helper.mutex);
        helper.process = (int32_t)sys_0(SYS_getpid);
        helper.caller = (int32_t)sys_0(SYS_gettid);
        helper.caller_stack = (uintptr_t)__builtin_frame_address(0);
        helper.caller_block = thread_pointer();
        helper.act = act;
        helper.argument = argument;
        helper.done = false;
        helper.count = 0;
        atomic_store_explicit(&helper.may_trace, false, memory_order_relaxed);
        sys_4(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
        made = spawn(help);
        if (made > 0) {
                /* In the place of whom the program has allowed it. The kernel forgets the helper
                 * when it ends. */
                if (is_restricted())
                        sys_5(SYS_prctl, PR_SET_PTRACER, made, 0, 0, 0);
                atomic_store_explicit(&helper.may_trace, true, memory_order_release);
                while (sys_4(SYS_wait4, made, NULL, __WALL, 0) == -EINTR)
                        ;
        }
        sys_4(SYS_rt_sigprocmask, SIG_SETMASK, &before, 0, sizeof before);
        done = helper.done;
        mutex_release(&helper.mutex);
        return done;
}

void standstill_forget(void)
{
        helper.mutex = (struct mutex){0};
}
