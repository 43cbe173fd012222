/* Calls that make processes and end this one. */
#include "calls.h"

#include "closing.h"
#include "guest.h"
#include "inherit.h"
#include "settings.h"

#include <errno.h>
#include <sched.h>
#include <stdarg.h>

/* --- the end --- */

static void leave_all(void (*leave)(int fd, struct end *end, uint64_t key))
{
        struct end *end;
        uint64_t key;

        if (!process.on || process.gone || !in_this_process() || !atomic_load(&process.high))
                return;
        for (int fd = -1; (fd = end_next(fd, &end, &key)) >= 0;)
                leave(fd, end, key);
        family_exit();
}

/* The destructors of other libraries may still send after this one. */
__attribute__((destructor)) static void leaving(void)
{
        leave_all(close_at_exit);
        settings.off = true;
        settings.enabled = 0;
}

/* As close() of all descriptors. */
CALL __attribute__((noreturn)) void _exit(int status)
{
        leave_all(close_ring);
        real()->_exit(status);
        __builtin_unreachable();
}

ALSO(_exit) __attribute__((noreturn)) void _Exit(int);

/* --- children with memory of their own --- */

/* The C library calls our handler first, but doesn't tell it when there is no child after all. */
CALL pid_t fork(void)
{
        pid_t child = real()->fork();

        if (child < 0)
                family_fork_done(false);
        return child;
}

ALSO(fork) pid_t __fork(void);

/* The fork() without handlers. */
CALL pid_t _Fork(void)
{
        static pid_t (*next)(void);
        pid_t child;

        next = next ? next : real_named("_Fork");
        if (!next)
                return (pid_t)result(-ENOSYS);
        family_fork();
        child = next();
        if (child)
                family_fork_done(child > 0);
        return child;
}

CALL TAKES_MORE int clone(int (*function)(void *), void *stack, int flags, void *argument, ...)
{
        int (*next)(int (*)(void *), void *, int, void *, ...) = real_named("clone");
        va_list list;
        pid_t *parent, *child;
        void *storage;
        int made;

        va_start(list, argument);
        parent = va_arg(list, pid_t *);
        storage = va_arg(list, void *);
        child = va_arg(list, pid_t *);
        va_end(list);
        if (flags & CLONE_THREAD)
                return next(function, stack, flags, argument, parent, storage, child);
        if (flags & CLONE_VM)
                guest_prepare();
        else
                family_fork();
        made = next(function, stack, flags, argument, parent, storage, child);
        if (flags & CLONE_VM)
                inherit_from_guest();
        else
                family_fork_done(made >= 0);
        return made;
}

ALSO(clone) int __clone(int (*)(void *), void *, int, void *, ...);

/* --- children in this memory --- */

__attribute__((used)) void *vfork_begins(void);
__attribute__((used)) long vfork_returned(long child);

/* Before 2.25 glibc caches the process ID, which its own vfork() handles: then that one is used. */
static bool is_old(const char *version)
{
        int minor = 0;

        for (version += 2; *version >= '0' && *version <= '9'; version++)
                minor = minor * 10 + (*version - '0');
        return minor < 25;
}

void *vfork_begins(void)
{
        static _Atomic int known; /* 1: another C library or a new one, 2: an old one */

        if (!known) {
                const char *(*version)(void) = real_named("gnu_get_libc_version");

                known = version && is_old(version()) ? 2 : 1;
        }
        if (known == 2)
                return real_named("vfork");
        guest_prepare();
        return NULL;
}

/* In the parent, when the child has become another program or has gone. */
long vfork_returned(long child)
{
        inherit_from_guest();
        return result(child);
}

/* The child returns from here first, and goes on on the same stack. So the return address is in a
 * register meanwhile, which the kernel restores for the parent. */
#if defined(__x86_64__)
__asm__(".text\n"
        ".globl vfork, __vfork\n"
        ".type vfork, @function\n"
        ".type __vfork, @function\n"
        "vfork:\n"
        "__vfork:\n"
        "    sub $8, %rsp\n"
        "    call vfork_begins\n"
        "    add $8, %rsp\n"
        "    test %rax, %rax\n"
        "    jz 1f\n"
        "    jmp *%rax\n"
        "1:  pop %rdi\n"
        "    mov $58, %eax\n" /* SYS_vfork */
        "    syscall\n"
        "    push %rdi\n"
        "    test %rax, %rax\n"
        "    jz 2f\n"
        "    mov %rax, %rdi\n"
        "    sub $8, %rsp\n"
        "    call vfork_returned\n"
        "    add $8, %rsp\n"
        "2:  ret\n"
        ".size vfork, . - vfork\n"
        ".size __vfork, . - vfork\n");
#elif defined(__aarch64__)
__asm__(".text\n"
        ".globl vfork, __vfork\n"
        ".type vfork, %function\n"
        ".type __vfork, %function\n"
        "vfork:\n"
        "__vfork:\n"
        "    stp x29, x30, [sp, #-16]!\n"
        "    bl vfork_begins\n"
        "    ldp x29, x30, [sp], #16\n"
        "    cbz x0, 1f\n"
        "    br x0\n"
        "1:  mov x0, #0x4111\n" /* CLONE_VFORK, CLONE_VM, SIGCHLD */
        "    mov x1, #0\n"
        "    mov x2, #0\n"
        "    mov x3, #0\n"
        "    mov x4, #0\n"
        "    mov x8, #220\n" /* SYS_clone */
        "    svc #0\n"
        "    cbz x0, 2f\n"
        "    stp x29, x30, [sp, #-16]!\n"
        "    bl vfork_returned\n"
        "    ldp x29, x30, [sp], #16\n"
        "2:  ret\n"
        ".size vfork, . - vfork\n"
        ".size __vfork, . - vfork\n");
#endif
