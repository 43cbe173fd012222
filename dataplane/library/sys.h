/* System calls without the C library: they don't touch errno, are no cancellation points, and can't
 * be interposed. Returns are the kernel's: -errno on failure. Used for what the library does for
 * itself; what the program asked for goes through the C library's own functions (real.h), which are
 * cancellation points.
 */
#ifndef FREEFLOW_SYS_H
#define FREEFLOW_SYS_H

#include <poll.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#if defined(__x86_64__)
static inline long sys6(long number, long a, long b, long c, long d, long e, long f)
{
        long result;
        register long r10 __asm__("r10") = d;
        register long r8 __asm__("r8") = e;
        register long r9 __asm__("r9") = f;

        __asm__ volatile("syscall"
                         : "=a"(result)
                         : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                         : "rcx", "r11", "memory");
        return result;
}
static inline void relax(void)
{
        __asm__ volatile("pause" ::: "memory");
}
#elif defined(__aarch64__)
static inline long sys6(long number, long a, long b, long c, long d, long e, long f)
{
        register long x8 __asm__("x8") = number;
        register long x0 __asm__("x0") = a;
        register long x1 __asm__("x1") = b;
        register long x2 __asm__("x2") = c;
        register long x3 __asm__("x3") = d;
        register long x4 __asm__("x4") = e;
        register long x5 __asm__("x5") = f;

        __asm__ volatile("svc 0"
                         : "+r"(x0)
                         : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                         : "memory");
        return x0;
}
static inline void relax(void)
{
        __asm__ volatile("yield" ::: "memory");
}
#else
#error "FreeFlow's library knows x86-64 and aarch64"
#endif

#define SYS_ARGUMENT(x) ((long)(x))
#define sys_6(n, a, b, c, d, e, f)                                                                           \
        sys6((n), SYS_ARGUMENT(a), SYS_ARGUMENT(b), SYS_ARGUMENT(c), SYS_ARGUMENT(d), SYS_ARGUMENT(e),       \
             SYS_ARGUMENT(f))
#define sys_5(n, a, b, c, d, e) sys_6(n, a, b, c, d, e, 0)
#define sys_4(n, a, b, c, d) sys_6(n, a, b, c, d, 0, 0)
#define sys_3(n, a, b, c) sys_6(n, a, b, c, 0, 0, 0)
#define sys_2(n, a, b) sys_6(n, a, b, 0, 0, 0, 0)
#define sys_1(n, a) sys_6(n, a, 0, 0, 0, 0, 0)
#define sys_0(n) sys_6(n, 0, 0, 0, 0, 0, 0)

/* Is this the error of a call that returns an address or a size? */
static inline int sys_failed(long status)
{
        return status < 0 && status > -4096;
}

/* What poll() says of a descriptor now; 0 also if it fails. */
static inline uint16_t sys_poll(int fd, short events)
{
        struct pollfd polled = {.fd = fd, .events = events};
        struct timespec at_once = {0};

        sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0);
        return (uint16_t)polled.revents;
}

/* The number that an ioctl() gives, such as SIOCINQ; 0 also if it fails. */
static inline int sys_number(int fd, unsigned long request)
{
        int number = 0;

        sys_3(SYS_ioctl, fd, request, &number);
        return number;
}

/* The number that a socket option has; -1 if there is no answer. */
static inline int sys_option(int fd, int level, int name)
{
        uint32_t size = sizeof(int);
        int value = -1;

        return sys_5(SYS_getsockopt, fd, level, name, &value, &size) < 0 ? -1 : value;
}

static inline void sys_set_option(int fd, int level, int name, int value)
{
        sys_5(SYS_setsockopt, fd, level, name, &value, sizeof value);
}

static inline void sys_sleep(long ns)
{
        struct timespec time = {.tv_nsec = ns};

        sys_2(SYS_nanosleep, &time, 0);
}

#endif
