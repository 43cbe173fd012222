/* Calls, flags, options and signals have the kernel's semantics on a ring too. */
#include "pair.h"

#include <aio.h>
#include <stdarg.h>

#ifndef SO_PEEK_OFF
#define SO_PEEK_OFF 42
#endif
#ifndef SO_MAX_PACING_RATE
#define SO_MAX_PACING_RATE 47
#endif
#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

enum { OPTION_INQ = 36, PINGS = 100 };

static void wait_unread(int fd, int wanted)
{
        int unread = 0;

        for (int i = 0; i < 20000 && unread < wanted; i++, nap(1))
                CHECK(ioctl(fd, FIONREAD, &unread) == 0);
        CHECK(unread >= wanted);
}

/* Enough round trips for a connection to move, if it can. */
static void ping(int fd)
{
        for (int i = 0; i < PINGS; i++, nap(2)) {
                put(fd, "p");
                get(fd, "p");
        }
}

static void put_six(int fd)
{
        put(fd, "abcdef");
        get(fd, "k");
}

/* --- the C library's own writes and reads --- */

static int print_list(int fd, const char *format, ...)
{
        va_list list;
        int length;

        va_start(list, format);
        length = vdprintf(fd, format, list);
        va_end(list);
        return length;
}

static void print(int fd)
{
        static char wide[100001];

        memset(wide, 'w', sizeof wide - 1);
        put(fd, "<");
        CHECK(dprintf(fd, "HTTP/1.%d %s\r\n", 1, "200 OK") == 17);
        CHECK(print_list(fd, "%05d %s", 42, "x") == 7);
        put(fd, "|");
        CHECK(dprintf(fd, "%s!", wide) == 100001);
        put(fd, ">");
        get(fd, "k");
        CHECK(dprintf(fd, "%s", "") == 0);
        put(fd, "z");
        get_end(fd);
}

static void get_printed(int fd)
{
        static char wide[100000];

        get(fd, "<HTTP/1.1 200 OK\r\n00042 x|");
        get_all(fd, wide, sizeof wide);
        for (size_t i = 0; i < sizeof wide; i++)
                CHECK(wide[i] == 'w');
        get(fd, "!>");
        put(fd, "k");
        get(fd, "z");
}

static ssize_t await_block(struct aiocb *block)
{
        const struct aiocb *list[] = {block};

        while (aio_error(block) == EINPROGRESS)
                aio_suspend(list, 1, NULL);
        CHECK(aio_error(block) == 0);
        return aio_return(block);
}

static void write_by_others(int fd)
{
        struct aiocb one = {.aio_fildes = fd, .aio_buf = "two", .aio_nbytes = 3};
        struct aiocb other = {
            .aio_fildes = fd, .aio_buf = "three", .aio_nbytes = 5, .aio_lio_opcode = LIO_WRITE};
        struct aiocb *const list[] = {NULL, &other};

        put(fd, "one");
        CHECK(aio_write(&one) == 0);
        CHECK(await_block(&one) == 3);
        CHECK(lio_listio(LIO_WAIT, list, 2, NULL) == 0);
        CHECK(aio_return(&other) == 5);
        put(fd, "four");
        get(fd, "k");
}

static void get_numbers(int fd)
{
        get(fd, "onetwothreefour");
        put(fd, "k");
}

static void read_by_others(int fd)
{
        char bytes[8] = "";
        struct aiocb one = {.aio_fildes = fd, .aio_buf = bytes, .aio_nbytes = 6};

        wait_unread(fd, 6);
        CHECK(aio_read(&one) == 0);
        CHECK(await_block(&one) == 6);
        CHECK(strcmp(bytes, "abcdef") == 0);
        CHECK(aio_read(&one) == 0);
        put(fd, "g");
        CHECK(await_block(&one) == 3);
        CHECK(memcmp(bytes, "ghi", 3) == 0);
        put(fd, "k");
}

static void put_nine(int fd)
{
        put(fd, "abcdef");
        get(fd, "g");
        put(fd, "ghi");
        get(fd, "k");
}

#ifdef __GLIBC__
extern ssize_t preadv64v2(int, const struct iovec *, int, off64_t, int);
extern ssize_t pwritev64v2(int, const struct iovec *, int, off64_t, int);

static void vectors_64(int fd)
{
        char bytes[8] = "";
        struct iovec part = {bytes, 3}, out = {"k", 1}, negative[2] = {{bytes, 1}, {bytes, (size_t)-1}};

        wait_unread(fd, 6);
        CHECK(preadv64v2(fd, &part, 1, -1, 0) == 3 && memcmp(bytes, "abc", 3) == 0);
        CHECK(preadv2(fd, &part, 1, -1, RWF_NOWAIT) == 3 && memcmp(bytes, "def", 3) == 0);
        CHECK(preadv2(fd, &part, 1, -1, RWF_NOWAIT) == -1 && errno == EAGAIN);
        CHECK(preadv2(fd, &part, 1, 0, RWF_NOWAIT) == -1 && errno == ESPIPE);
        CHECK(preadv2(fd, &part, 1, -1, 0x40000000) == -1 && errno == EOPNOTSUPP);
        CHECK(preadv2(fd, negative, 2, -1, RWF_NOWAIT) == -1 && errno == EINVAL);
        CHECK(pwritev64v2(fd, &out, 1, -1, 0) == 1);
        CHECK(pwritev2(fd, &out, 1, -1, RWF_NOWAIT) == 1);
}

static void put_six_get_two(int fd)
{
        put(fd, "abcdef");
        get(fd, "kk");
}
#endif

/* --- sizes and flags --- */

static void *room(size_t size)
{
        void *place =
            mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        CHECK(place != MAP_FAILED);
        return place;
}

static void receive_huge(int fd)
{
        size_t size = (size_t)3 << 30;
        char *place = room(size);
        volatile size_t too_much = (size_t)-2;
        struct iovec parts[2] = {{place, size}, {place, size}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

        CHECK(recv(fd, place, size, 0) == 6 && memcmp(place, "abcdef", 6) == 0);
        put(fd, "1");
        CHECK(readv(fd, parts, 2) == 6 && memcmp(place, "abcdef", 6) == 0);
        put(fd, "2");
        CHECK(recvmsg(fd, &message, 0) == 6 && memcmp(place, "abcdef", 6) == 0);
        put(fd, "3");
        wait_unread(fd, 6);
        CHECK(read(fd, place, too_much) == -1 && (errno == EINVAL || errno == EFAULT));
        put(fd, "4");
}

static void put_sixes(int fd)
{
        for (int i = 0; i < 4; i++) {
                char answer[2] = {(char)('1' + i), 0};

                put(fd, "abcdef");
                get(fd, answer);
        }
}

/* The call takes as much as there is room for; the bytes that follow tell how much that was. */
static void send_huge(int fd)
{
        size_t size = (size_t)3 << 30;
        char *place = room(size);
        struct iovec parts[2] = {{place, size}, {place, size}};
        ssize_t sent = send(fd, place, size, MSG_DONTWAIT);

        CHECK(sent > 0);
        dprintf(fd, "%zd!", sent);
        get(fd, "k");
        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        sent = writev(fd, parts, 2);
        CHECK(sent > 0);
        CHECK(fcntl(fd, F_SETFL, 0) == 0);
        dprintf(fd, "%zd!", sent);
        get(fd, "k");
}

static void get_huge(int fd)
{
        for (int i = 0; i < 2; i++) {
                unsigned long zeros = 0, said = 0;
                char byte;

                for (get_all(fd, &byte, 1); !byte; get_all(fd, &byte, 1))
                        zeros++;
                for (; byte != '!'; get_all(fd, &byte, 1))
                        said = said * 10 + (unsigned long)(byte - '0');
                CHECK(zeros == said);
                put(fd, "k");
        }
}

static void send_oddly(int fd)
{
        union {
                char room[CMSG_SPACE(sizeof(int))];
                struct cmsghdr header;
        } control = {
            .header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = 0x7654}};
        struct iovec part = {"x", 1};
        struct msghdr message = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control};
        struct iovec negative[2] = {{"x", 1}, {"x", (size_t)-1}};
        volatile int too_few = -1, too_many = 5000;

        put(fd, "a");
        CHECK(send(fd, "b", 1, 0x800000) == 1);
        put(fd, "c");
        CHECK(sendmsg(fd, &message, 0) == -1 && errno == EINVAL);
        control.header.cmsg_type = SCM_RIGHTS;
        CHECK(sendmsg(fd, &message, 0) == 1);
        CHECK(writev(fd, negative, 2) == -1 && errno == EINVAL);
        CHECK(writev(fd, negative, too_few) == -1 && errno == EINVAL);
        CHECK(writev(fd, negative, too_many) == -1 && errno == EINVAL);
        message.msg_iovlen = 5000;
        CHECK(sendmsg(fd, &message, 0) == -1 && errno == EMSGSIZE);
        put(fd, "d");
        get(fd, "k");
}

static void receive_oddly(int fd)
{
        char bytes[8] = "";

        CHECK(recv(fd, bytes, 1, 0x4000000) == 1 && bytes[0] == 'a');
        get(fd, "bcxd");
        put(fd, "k");
}

static void receive_nothing(int fd)
{
        struct iovec part = {NULL, 0};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        char byte;

        CHECK(recv(fd, &byte, 0, MSG_DONTWAIT) == -1 && errno == EAGAIN);
        CHECK(recvmsg(fd, &message, MSG_DONTWAIT) == -1 && errno == EAGAIN);
        CHECK(recv(fd, &byte, 0, MSG_DONTWAIT | MSG_PEEK) == -1 && errno == EAGAIN);
        CHECK(read(fd, &byte, 0) == 0);
        CHECK(readv(fd, &part, 1) == 0);
        put(fd, "g");
        CHECK(recv(fd, &byte, 0, 0) == 0);
        CHECK(recv(fd, &byte, 1, MSG_DONTWAIT) == 1 && byte == 'a');
        put(fd, "k");
        CHECK(recv(fd, &byte, 0, 0) == 0);
}

static void put_late(int fd)
{
        get(fd, "g");
        nap(200);
        put(fd, "a");
        get(fd, "k");
}

static void peek_all(int fd)
{
        char bytes[9] = "";

        wait_unread(fd, 2);
        CHECK(recv(fd, bytes, 4, MSG_PEEK | MSG_WAITALL | MSG_DONTWAIT) == 2);
        CHECK(recv(fd, bytes, 4, MSG_PEEK | MSG_WAITALL) == 4 && memcmp(bytes, "abcd", 4) == 0);
        CHECK(recv(fd, bytes, 4, MSG_PEEK) == 4 && memcmp(bytes, "abcd", 4) == 0);
        put(fd, "g");
        /* Bytes over TCP after those of the ring, and then the FIN. */
        CHECK(recv(fd, bytes, 6, MSG_PEEK | MSG_WAITALL) == 6 && memcmp(bytes, "abcdef", 6) == 0);
        CHECK(recv(fd, bytes, 8, MSG_PEEK | MSG_WAITALL) == 6);
        get(fd, "abcdef");
        CHECK(recv(fd, bytes, 8, MSG_PEEK | MSG_WAITALL) == 0);
        get_end(fd);
}

static void put_parts(int fd)
{
        int one = 1;

        put(fd, "ab");
        nap(300);
        put(fd, "cd");
        get(fd, "g");
        CHECK(setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof one) == 0);
        put(fd, "ef");
        nap(300);
}

static void *wait_and_put(void *fd)
{
        nap(300);
        put(*(int *)fd, "z");
        return NULL;
}

/* A signal ends the call with the bytes that it has. */
static void on_alarm(int number)
{
        (void)number;
}

static void peek_interrupted(int fd)
{
        struct sigaction action = {.sa_handler = on_alarm};
        struct timeval time = {.tv_usec = 200000};
        char bytes[8];

        CHECK(sigaction(SIGALRM, &action, NULL) == 0);
        wait_unread(fd, 6);
        alarm(1);
        CHECK(recv(fd, bytes, 8, MSG_PEEK | MSG_WAITALL) == 6);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time) == 0);
        CHECK(recv(fd, bytes, 8, MSG_PEEK | MSG_WAITALL) == 6);
        get(fd, "abcdef");
        CHECK(recv(fd, bytes, 8, MSG_PEEK | MSG_WAITALL) == -1 && errno == EAGAIN);
        put(fd, "k");
}

/* --- files and pipes as sources and destinations --- */

static void send_from(int fd, int in, off_t *offset, int error)
{
        ssize_t sent = sendfile(fd, in, offset, 10);

        if (sent != -1 || errno != error)
                fprintf(stderr, "sendfile() gave %zd, %s\n", sent, strerror(errno));
        CHECK(sent == -1 && errno == error);
}

static void refused_sources(int fd)
{
        int pair[2], ends[2], folder = open("/", O_RDONLY), file = memfd_create("file", 0);
        int tty = open("/dev/ptmx", O_RDWR | O_NOCTTY), only = open("/dev/null", O_WRONLY);
        off_t offset = 0;
        pthread_t thread;

        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && pipe(ends) == 0);
        CHECK(folder >= 0 && file >= 0 && only >= 0);
        CHECK(pthread_create(&thread, NULL, wait_and_put, &fd) == 0);
        send_from(fd, pair[0], NULL, EINVAL);
        send_from(fd, ends[0], NULL, EINVAL);
        send_from(fd, ends[0], &offset, ESPIPE);
        put_all(ends[1], "inside", 6);
        send_from(fd, ends[0], NULL, EINVAL);
        if (tty >= 0)
                send_from(fd, tty, NULL, EINVAL);
        send_from(fd, folder, NULL, EINVAL);
        send_from(fd, only, NULL, EBADF);
        send_from(fd, 12345, NULL, EBADF);
        offset = -1;
        send_from(fd, file, &offset, EINVAL);
        CHECK(splice(pair[0], NULL, fd, NULL, 5, 0) == -1 && errno == EINVAL);
        CHECK(splice(fd, NULL, file, NULL, 5, 0) == -1 && errno == EINVAL);
        CHECK(splice(fd, NULL, fd, NULL, 5, 0) == -1 && errno == EINVAL);
        CHECK(splice(ends[0], NULL, fd, NULL, 5, 0x100) == -1 && errno == EINVAL);
        CHECK(splice(ends[0], NULL, fd, NULL, 6, 0) == 6);
        CHECK(pthread_join(thread, NULL) == 0);
        get(fd, "k");
}

static void get_inside(int fd)
{
        char bytes[7];

        get_all(fd, bytes, 7);
        CHECK(memcmp(bytes, "insidez", 7) == 0 || memcmp(bytes, "zinside", 7) == 0);
        put(fd, "k");
}

static void send_whole(int fd, int file, size_t size)
{
        for (size_t done = 0; done < size;) {
                ssize_t sent = sendfile(fd, file, NULL, size - done);

                CHECK(sent > 0);
                done += (size_t)sent;
                CHECK(lseek(file, 0, SEEK_CUR) == (off_t)done);
        }
        CHECK(sendfile(fd, file, NULL, 100) == 0);
}

/* Files whose pages are not in memory, on file systems that can tell so and on others. */
static void slow_files(int fd)
{
        char name[] = "/var/tmp/semantics.XXXXXX", text[4096];
        int file = mkstemp(name), zero = open("/dev/zero", O_RDONLY),
            kernel = open("/proc/filesystems", O_RDONLY);
        uint32_t length = 0;
        ssize_t got;

        CHECK(file >= 0 && unlink(name) == 0 && zero >= 0 && kernel >= 0);
        put_pattern(file, 3 << 20);
        CHECK(fdatasync(file) == 0 && lseek(file, 0, SEEK_SET) == 0);
        posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
        send_whole(fd, file, 3 << 20);
        CHECK(sendfile(fd, zero, NULL, 5) == 5);
        while ((got = read(kernel, text + length, sizeof text - length)) > 0)
                length += (uint32_t)got;
        CHECK(length > 0 && length < sizeof text && lseek(kernel, 0, SEEK_SET) == 0);
        put_all(fd, &length, sizeof length);
        send_whole(fd, kernel, length);
        put_all(fd, text, length);
        get(fd, "k");
}

static void get_slow_files(int fd)
{
        char first[4096], second[4096];
        uint32_t length;

        get_pattern(fd, 3 << 20);
        get_all(fd, first, 5);
        CHECK(memcmp(first, "\0\0\0\0\0", 5) == 0);
        get_all(fd, &length, sizeof length);
        get_all(fd, first, length);
        get_all(fd, second, length);
        CHECK(memcmp(first, second, length) == 0);
        put(fd, "k");
}

static void splice_waits(int fd)
{
        struct sigaction action = {.sa_handler = on_alarm};
        int ends[2];

        CHECK(pipe(ends) == 0);
        CHECK(sigaction(SIGALRM, &action, NULL) == 0);
        CHECK(splice(ends[0], NULL, fd, NULL, 10, SPLICE_F_NONBLOCK) == -1 && errno == EAGAIN);
        /* splice() waits for the pipe even if the socket is non-blocking. */
        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        CHECK(splice(fd, NULL, ends[1], NULL, 10, 0) == -1 && errno == EAGAIN);
        alarm(1);
        CHECK(splice(ends[0], NULL, fd, NULL, 10, 0) == -1 && errno == EINTR);
        CHECK(fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0);
        CHECK(splice(ends[0], NULL, fd, NULL, 10, 0) == -1 && errno == EAGAIN);
        /* And for the socket even with SPLICE_F_NONBLOCK, which concerns the pipe. */
        CHECK(fcntl(fd, F_SETFL, 0) == 0);
        alarm(1);
        CHECK(splice(fd, NULL, ends[1], NULL, 10, SPLICE_F_NONBLOCK) == -1 && errno == EINTR);
        put(fd, "g");
        CHECK(splice(fd, NULL, ends[1], NULL, 10, 0) == 6);
        get(ends[0], "abcdef");
        put(fd, "k");
}

static void put_when_told(int fd)
{
        get(fd, "g");
        nap(100);
        put_six(fd);
}

/* --- signals --- */

static volatile sig_atomic_t signalled;

static void on_signal(int number)
{
        (void)number;
        signalled++;
}

static void await_signal(int fd)
{
        signalled = 0;
        put(fd, "g");
        for (int i = 0; i < 2000 && !signalled; i++)
                nap(10);
        CHECK(signalled);
}

static void signal_of_input(int fd)
{
        int one = 1, none = 0, me = getpid();

        CHECK(signal(SIGIO, on_signal) != SIG_ERR && signal(SIGRTMIN, on_signal) != SIG_ERR);
        CHECK(fcntl(fd, F_SETOWN, me) == 0);
        CHECK(fcntl(fd, F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
        await_signal(fd);
        CHECK(fcntl(fd, F_SETFL, 0) == 0);
        get(fd, "abcdef");
        put(fd, "k");
        CHECK(ioctl(fd, FIOASYNC, &one) == 0 && fcntl(fd, F_SETSIG, SIGRTMIN) == 0);
        await_signal(fd);
        CHECK(ioctl(fd, FIOASYNC, &none) == 0);
        get(fd, "abcdef");
        put(fd, "k");
}

/* With bytes that arrived before the call. */
static void signal_by_ioctl(int fd)
{
        int one = 1, me = getpid();

        CHECK(signal(SIGIO, on_signal) != SIG_ERR);
        wait_unread(fd, 6);
        CHECK(ioctl(fd, FIOSETOWN, &me) == 0 && ioctl(fd, FIOASYNC, &one) == 0);
        get(fd, "abc");
        await_signal(fd);
        get(fd, "defghi");
        put(fd, "k");
}

static void put_twice_when_told(int fd)
{
        put_when_told(fd);
        put_when_told(fd);
}

/* O_ASYNC is set before the connection moves: then it never moves. */
static void signal_before(int listener)
{
        int fd = accept(listener, NULL, NULL);
        char byte;

        CHECK(fd >= 0 && signal(SIGIO, on_signal) != SIG_ERR);
        CHECK(fcntl(fd, F_SETOWN, getpid()) == 0 && fcntl(fd, F_SETFL, O_ASYNC) == 0);
        for (int i = 0; i < PINGS; i++) {
                get_all(fd, &byte, 1);
                put_all(fd, &byte, 1);
        }
        await_signal(fd);
        get(fd, "abcdef");
        put(fd, "k");
}

static void ping_before(int listener)
{
        int fd = dial();

        (void)listener;
        ping(fd);
        put_when_told(fd);
}

enum { UNREAD = 300 };

/* Bytes arrive over TCP and then through a ring, and none is read. */
static void peek_while_moving(int listener)
{
        int fd = accept(listener, NULL, NULL), unread = 0;
        char bytes[UNREAD + 1];

        CHECK(fd >= 0);
        for (ssize_t got = 0; got < UNREAD; nap(1)) {
                got = recv(fd, bytes, sizeof bytes, MSG_PEEK | MSG_DONTWAIT);
                CHECK(got > 0 || errno == EAGAIN);
                CHECK(ioctl(fd, FIONREAD, &unread) == 0);
                CHECK(unread >= got);
                put_all(fd, "k", 1);
        }
        put_all(fd, "x", 1);
        get_pattern(fd, UNREAD);
}

static void put_while_moving(int listener)
{
        int fd = dial();
        char byte = 0;

        (void)listener;
        for (int i = 0; i < UNREAD; i++) {
                byte = (char)pattern((uint64_t)i);
                put_all(fd, &byte, 1);
                nap(1);
        }
        while (byte != 'x')
                get_all(fd, &byte, 1);
}

struct raw_action {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        unsigned long mask;
};

/* By syscall(), so that the library does not see it; the signal's restorer is the C library's. */
static void set_by_number(int number, void (*handler)(int), bool restart)
{
        struct sigaction action = {.sa_handler = handler};
        struct raw_action raw;

        CHECK(sigaction(SIGUSR2, &action, NULL) == 0);
        CHECK(syscall(SYS_rt_sigaction, SIGUSR2, NULL, &raw, 8L) == 0);
        if (restart)
                raw.flags |= SA_RESTART;
        else
                raw.flags &= ~(unsigned long)SA_RESTART;
        action.sa_handler = SIG_DFL;
        CHECK(sigaction(SIGUSR2, &action, NULL) == 0);
        CHECK(syscall(SYS_rt_sigaction, number, &raw, NULL, 8L) == 0);
}

static void interrupted(int fd)
{
        char byte;
        double begin = clock_now();

        signalled = 0;
        alarm(1);
        CHECK(read(fd, &byte, 1) == -1 && errno == EINTR);
        CHECK(signalled && clock_now() - begin < 20);
}

static void wait_once(int fd)
{
        put(fd, "w");
        get(fd, "x");
}

#ifdef __GLIBC__
extern sighandler_t __sysv_signal(int, sighandler_t);

static void other_names(int fd)
{
        /* The library reads the handlers at this wait. */
        wait_once(fd);
        CHECK(__sysv_signal(SIGALRM, on_signal) != SIG_ERR);
        interrupted(fd);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
        CHECK(sigset(SIGALRM, SIG_IGN) != SIG_ERR);
        wait_once(fd);
        CHECK(siginterrupt(SIGALRM, 1) == 0);
        CHECK(signal(SIGALRM, on_signal) != SIG_ERR);
#pragma GCC diagnostic pop
        interrupted(fd);
        put(fd, ".");
}
#endif

static void raw_handlers(int fd)
{
        char byte;

        wait_once(fd);
        set_by_number(SIGALRM, on_signal, false);
        interrupted(fd);
        wait_once(fd);
        set_by_number(SIGALRM, on_signal, true);
        signalled = 0;
        alarm(1);
        put(fd, "?");
        CHECK(read(fd, &byte, 1) == 1 && byte == '!' && signalled);
        put(fd, ".");
}

static void answer_signals(int fd)
{
        char byte;

        for (get_all(fd, &byte, 1); byte != '.'; get_all(fd, &byte, 1)) {
                nap(byte == '?' ? 2000 : 300);
                put(fd, byte == '?' ? "!" : "x");
        }
}

/* --- the urgent mark --- */

static void send_mark(int fd)
{
        put(fd, "abc");
        CHECK(send(fd, "!", 1, MSG_OOB) == 1);
        put(fd, "de");
        get(fd, "k");
}

static void at_mark(int fd)
{
        char bytes[8] = "";
        int mark = 1;

        CHECK(ready(fd, POLLPRI, 20000) & POLLPRI);
        wait_unread(fd, 3);
        nap(100);
        CHECK(ioctl(fd, SIOCATMARK, &mark) == 0 && mark == 0);
        for (int i = 0; sockatmark(fd) == 0; i++)
                CHECK(i < 3 && read(fd, bytes + i, 1) == 1);
        CHECK(memcmp(bytes, "abc", 3) == 0);
        get(fd, "de");
        put(fd, "k");
}

/* No call reads past the mark. */
static void up_to_mark(int fd)
{
        char bytes[8] = "";

        CHECK(ready(fd, POLLPRI, 20000) & POLLPRI);
        wait_unread(fd, 3);
        nap(100);
        CHECK(recv(fd, bytes, 5, MSG_WAITALL) == 3 && memcmp(bytes, "abc", 3) == 0);
        CHECK(sockatmark(fd) == 1);
        get(fd, "de");
        put(fd, "k");
}

/* --- a call of many buffers --- */

enum { PARTS = 200, PART = 65536 };

static void many_parts(int fd)
{
        struct iovec parts[PARTS];
        char *bytes = malloc((size_t)PARTS * PART);

        for (size_t i = 0; i < (size_t)PARTS * PART; i++)
                bytes[i] = (char)pattern(i);
        for (int i = 0; i < PARTS; i++)
                parts[i] = (struct iovec){bytes + (size_t)i * PART, PART};
        CHECK(writev(fd, parts, PARTS) == PARTS * PART);
        get(fd, "k");
        free(bytes);
}

static void leave_in_between(int fd)
{
        int one = 1;

        nap(300);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof one) == 0);
        get_pattern(fd, PARTS * PART);
        put(fd, "k");
}

/* --- options --- */

static void low_water(int fd, bool by_epoll)
{
        struct epoll_event event = {.events = EPOLLIN};
        int ten = 10, one = 1, epoll = epoll_create1(0), found = 0;
        socklen_t size = sizeof found;
        char bytes[16];

        CHECK(epoll >= 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0);
        wait_unread(fd, 6);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &ten, sizeof ten) == 0);
        CHECK(getsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &found, &size) == 0 && found == 10);
        CHECK(by_epoll ? epoll_wait(epoll, &event, 1, 200) == 0 : ready(fd, POLLIN, 200) == 0);
        CHECK(recv(fd, bytes, 1, MSG_PEEK) == 1);
        put(fd, "g");
        CHECK(by_epoll ? epoll_wait(epoll, &event, 1, 20000) == 1 : ready(fd, POLLIN, 20000) == POLLIN);
        CHECK(recv(fd, bytes, sizeof bytes, 0) >= 6);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof one) == 0);
        CHECK(recv(fd, bytes, sizeof bytes, MSG_DONTWAIT) <= 4);
        put(fd, "k");
}

static void low_water_poll(int fd)
{
        low_water(fd, false);
}

static void low_water_epoll(int fd)
{
        low_water(fd, true);
}

static void put_ten(int fd)
{
        put(fd, "abcdef");
        get(fd, "g");
        nap(200);
        put(fd, "ghij");
        get(fd, "k");
}

static void get_counted(int fd)
{
        char control[64], two[2];
        struct iovec part = {two, 2};

        wait_unread(fd, 6);
        for (int left = 4; left >= 0; left -= 2) {
                struct msghdr message = {.msg_iov = &part,
                                         .msg_iovlen = 1,
                                         .msg_control = control,
                                         .msg_controllen = sizeof control};
                struct cmsghdr *header;

                CHECK(recvmsg(fd, &message, 0) == 2);
                header = CMSG_FIRSTHDR(&message);
                CHECK(header && header->cmsg_level == IPPROTO_TCP && header->cmsg_type == OPTION_INQ);
                CHECK(*(int *)(void *)CMSG_DATA(header) == left);
        }
        put(fd, "k");
}

static void bytes_behind(int fd)
{
        int one = 1;

        wait_unread(fd, 6);
        CHECK(setsockopt(fd, IPPROTO_TCP, OPTION_INQ, &one, sizeof one) == 0);
        get_counted(fd);
}

static void peek_on(int fd)
{
        int zero = 0, off = -1;
        char bytes[8];

        wait_unread(fd, 6);
        if (setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof zero) < 0 && errno == EOPNOTSUPP) {
                printf("Linux before 6.9 has no SO_PEEK_OFF for TCP");
                exit(77);
        }
        CHECK(recv(fd, bytes, 2, MSG_PEEK) == 2 && memcmp(bytes, "ab", 2) == 0);
        CHECK(recv(fd, bytes, 2, MSG_PEEK) == 2 && memcmp(bytes, "cd", 2) == 0);
        get(fd, "a");
        CHECK(recv(fd, bytes, 2, MSG_PEEK) == 2 && memcmp(bytes, "ef", 2) == 0);
        put(fd, "g");
        CHECK(recv(fd, bytes, 4, MSG_PEEK) == 4 && memcmp(bytes, "ghij", 4) == 0);
        get(fd, "bcdefg");
        CHECK(setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off) == 0);
        CHECK(recv(fd, bytes, 2, MSG_PEEK) == 2 && memcmp(bytes, "hi", 2) == 0);
        get(fd, "hij");
        put(fd, "k");
}

static void put_two_when_told(int fd)
{
        put(fd, "abcdef");
        get(fd, "g");
        put(fd, "ghij");
        get(fd, "k");
}

static void timeouts(int fd)
{
        struct timeval past = {.tv_sec = -1}, none = {0}, short_one = {.tv_usec = 1};
        struct timeval longest = {.tv_sec = INT64_MAX};
        char byte;

        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &longest, sizeof longest) == 0);
        wait_once(fd);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &short_one, sizeof short_one) == 0);
        CHECK(read(fd, &byte, 1) == -1 && errno == EAGAIN);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none) == 0);
        wait_once(fd);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &past, sizeof past) == 0);
        CHECK(read(fd, &byte, 1) == -1 && errno == EAGAIN);
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none) == 0);
        wait_once(fd);
        put(fd, ".");
}

static bool goes_by_kernel(int fd)
{
        uint64_t before = kernel_bytes(fd);

        put(fd, "w");
        get(fd, "x");
        return kernel_bytes(fd) != before;
}

/* Options that do not change reads or writes: the connection stays on its path. */
static void harmless_options(int fd)
{
        static const struct {
                int level, name, value;
        } options[] = {
            {IPPROTO_TCP, TCP_NODELAY, 1},
            {IPPROTO_TCP, TCP_CORK, 0},
            {IPPROTO_TCP, TCP_QUICKACK, 1},
            {IPPROTO_TCP, TCP_KEEPIDLE, 60},
            {IPPROTO_TCP, TCP_USER_TIMEOUT, 0},
            {IPPROTO_TCP, 25, 16384},
            {SOL_SOCKET, SO_KEEPALIVE, 1},
            {SOL_SOCKET, SO_SNDBUF, 65536},
            {SOL_SOCKET, SO_RCVBUF, 65536},
            {SOL_SOCKET, SO_PRIORITY, 1},
            {SOL_SOCKET, SO_REUSEADDR, 1},
            {SOL_SOCKET, SO_RCVLOWAT, 1},
            {SOL_SOCKET, SO_PEEK_OFF, -1},
            {SOL_SOCKET, SO_TIMESTAMP, 0},
            {SOL_SOCKET, 46, 0},
            {IPPROTO_IP, IP_TOS, 16},
            {IPPROTO_IP, 11 /* IP_RECVERR */, 1},
        };
        bool accelerated = getenv("FREEFLOW_EXPECTED") != NULL;

        for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
                int value = options[i].value;

                if (setsockopt(fd, options[i].level, options[i].name, &value, sizeof value) < 0)
                        CHECK(options[i].name == SO_PEEK_OFF);
        }
        /* An option that the kernel refuses changes nothing. */
        CHECK(setsockopt(fd, 12345, 1, options, sizeof(int)) == -1);
        CHECK(setsockopt(fd, SOL_SOCKET, 9999, options, sizeof(int)) == -1);
        CHECK(goes_by_kernel(fd) == !accelerated);
        put(fd, ".");
}

struct instruction {
        uint16_t code;
        uint8_t jt, jf;
        uint32_t k;
};

/* An option that a ring can't honour: from then on the bytes go over TCP. */
static void unfit_option(int fd, const char *which)
{
        struct instruction pass = {6, 0, 0, 0xffffffff};
        struct {
                unsigned short length;
                struct instruction *first;
        } filter = {1, &pass};
        int one = 1, rate = 1 << 30;

        if (strcmp(which, "filter") == 0)
                CHECK(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter) == 0);
        if (strcmp(which, "pacing") == 0)
                CHECK(setsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof rate) == 0);
        if (strcmp(which, "timestamp") == 0)
                CHECK(setsockopt(fd, SOL_SOCKET, SO_TIMESTAMP, &one, sizeof one) == 0);
        if (strcmp(which, "inq") == 0)
                CHECK(setsockopt(fd, IPPROTO_TCP, OPTION_INQ, &one, sizeof one) == 0);
        /* SO_TIMESTAMP_NEW, which 32-bit programs with 64-bit times use. */
        if (strcmp(which, "timestamp_new") == 0)
                CHECK(setsockopt(fd, SOL_SOCKET, 63, &one, sizeof one) == 0);
        CHECK(goes_by_kernel(fd));
        CHECK(goes_by_kernel(fd));
        put(fd, ".");
}

#define UNFIT(which)                                                                                         \
        static void unfit_##which(int fd)                                                                    \
        {                                                                                                    \
                unfit_option(fd, #which);                                                                    \
        }
UNFIT(filter)
UNFIT(pacing)
UNFIT(timestamp)
UNFIT(timestamp_new)
UNFIT(inq)

/* An accepted connection inherits its listener's options, without a call of its own. */
static void inherited_options(int listener)
{
        int one = 1, fd;
        char byte;

        CHECK(setsockopt(listener, IPPROTO_TCP, OPTION_INQ, &one, sizeof one) == 0);
        /* The kernel may have made the first connection before the option was set. */
        fd = accept(listener, NULL, NULL);
        CHECK(fd >= 0 && close(fd) == 0);
        fd = accept(listener, NULL, NULL);
        CHECK(fd >= 0);
        for (int i = 0; i < PINGS; i++) {
                get_all(fd, &byte, 1);
                put_all(fd, &byte, 1);
        }
        get_counted(fd);
}

static void ping_and_put(int listener)
{
        int fd = dial();

        (void)listener;
        get_end(fd);
        fd = dial();
        ping(fd);
        put_six(fd);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"print", get_printed, print, false},
            {"print_answer", print, get_printed, false},
            {"write_by_others", write_by_others, get_numbers, false},
            {"read_by_others", read_by_others, put_nine, false},
#ifdef __GLIBC__
            {"vectors_64", vectors_64, put_six_get_two, false},
            {"other_names", other_names, answer_signals, false},
#endif
            {"receive_huge", receive_huge, put_sixes, false},
            {"send_huge", send_huge, get_huge, false},
            {"send_oddly", receive_oddly, send_oddly, false},
            {"receive_nothing", receive_nothing, put_late, false},
            {"peek_all", peek_all, put_parts, false},
            {"peek_while_moving", peek_while_moving, put_while_moving, true},
            {"peek_interrupted", peek_interrupted, put_six, false},
            {"refused_sources", refused_sources, get_inside, false},
            {"slow_files", slow_files, get_slow_files, false},
            {"splice_waits", splice_waits, put_when_told, false},
            {"signal_of_input", signal_of_input, put_twice_when_told, false},
            {"signal_by_ioctl", signal_by_ioctl, put_nine, false},
            {"signal_before", signal_before, ping_before, true},
            {"raw_handlers", raw_handlers, answer_signals, false},
            {"at_mark", at_mark, send_mark, false},
            {"up_to_mark", up_to_mark, send_mark, false},
            {"many_parts", leave_in_between, many_parts, false},
            {"low_water_poll", low_water_poll, put_ten, false},
            {"low_water_epoll", low_water_epoll, put_ten, false},
            {"bytes_behind", bytes_behind, put_six, false},
            {"peek_on", peek_on, put_two_when_told, false},
            {"timeouts", timeouts, answer_signals, false},
            {"harmless_options", harmless_options, answer_signals, false},
            {"unfit_filter", unfit_filter, answer_signals, false},
            {"unfit_pacing", unfit_pacing, answer_signals, false},
            {"unfit_timestamp", unfit_timestamp, answer_signals, false},
            {"unfit_timestamp_new", unfit_timestamp_new, answer_signals, false},
            {"unfit_inq", unfit_inq, answer_signals, false},
            {"inherited_options", inherited_options, ping_and_put, true},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
