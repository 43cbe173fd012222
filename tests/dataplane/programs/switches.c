/* What changes a whole process, with a connection on a ring or before there is one: seccomp
 * filters, libraries whose calls bypass ours, an io_uring. */
#include "pair.h"

#include <dlfcn.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

#ifndef __GLIBC__
/* musl has neither. */
#define RTLD_DEEPBIND 0
#define LM_ID_NEWLM 0
#define dlmopen(space, file, mode) dlopen(file, mode)
#endif

static void echo(int fd)
{
        char bytes[4096];
        ssize_t got;

        while ((got = read(fd, bytes, sizeof bytes)) > 0)
                put_all(fd, bytes, (size_t)got);
        CHECK(got == 0);
}

static void ask(int fd)
{
        for (int i = 0; i < 50; i++) {
                put(fd, "abc");
                get(fd, "abc");
        }
        put_pattern(fd, 100000);
        get_pattern(fd, 100000);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        get_end(fd);
}

/* --- filters --- */

enum install { BY_PRCTL, BY_SECCOMP, BY_NUMBER };

/* Permit only these system calls; any other ends the process, or fails. */
static void confine(const int *calls, size_t count, uint32_t otherwise, enum install install)
{
        struct sock_filter filter[64];
        struct sock_fprog program = {.filter = filter};
        unsigned short size = 0;

        filter[size++] =
            (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
        for (size_t i = 0; i < count; i++) {
                filter[size++] =
                    (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)calls[i], 0, 1);
                filter[size++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        }
        filter[size++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, otherwise);
        program.len = size;
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        if (install == BY_PRCTL)
                CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
        if (install == BY_SECCOMP)
                CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0);
        if (install == BY_NUMBER)
                CHECK(syscall(SYS_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0);
}

static const int just_bytes[] = {SYS_read, SYS_write, SYS_exit_group};

static void confined(int fd, uint32_t otherwise, enum install install)
{
        char bytes[512];
        ssize_t got;

        confine(just_bytes, 3, otherwise, install);
        while ((got = read(fd, bytes, sizeof bytes)) > 0)
                put_all(fd, bytes, (size_t)got);
        _exit(got != 0);
}

static void killed(int fd)
{
        confined(fd, SECCOMP_RET_KILL_PROCESS, BY_PRCTL);
}

static void killed_by_seccomp(int fd)
{
        confined(fd, SECCOMP_RET_KILL_PROCESS, BY_SECCOMP);
}

static void refused(int fd)
{
        confined(fd, SECCOMP_RET_ERRNO | EPERM, BY_NUMBER);
}

/* The ring has bytes when the filter is installed. */
static void killed_with_bytes(int fd)
{
        nap(200);
        killed(fd);
}

static void ask_early(int fd)
{
        put(fd, "early");
        get(fd, "early");
        ask(fd);
}

static void strict(int fd)
{
        char bytes[512];
        ssize_t got;

        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) == 0);
        while ((got = syscall(SYS_read, fd, bytes, sizeof bytes)) > 0)
                put_all(fd, bytes, (size_t)got);
        syscall(SYS_exit, got != 0);
}

/* A child confines itself, as children of servers do. */
static void child(int fd)
{
        pid_t made = fork();
        int status;

        CHECK(made >= 0);
        if (!made)
                killed(fd);
        close(fd);
        CHECK(waitpid(made, &status, 0) == made && status == 0);
}

static const int serving[] = {SYS_read,       SYS_write,     SYS_accept,     SYS_exit_group,
                              SYS_epoll_wait, SYS_epoll_ctl, SYS_epoll_pwait};

/* Before there is a connection; the filter permits accept, but not accept4. */
static void before(int listener)
{
        int fd;

        confine(serving, sizeof serving / sizeof *serving, SECCOMP_RET_KILL_PROCESS, BY_PRCTL);
        fd = accept(listener, NULL, NULL);
        if (fd < 0)
                _exit(1);
        for (;;) {
                char bytes[512];
                ssize_t got = read(fd, bytes, sizeof bytes);

                if (got <= 0)
                        _exit(got != 0);
                put_all(fd, bytes, (size_t)got);
        }
}

static void dial_and_ask(int unused)
{
        int fd = dial();

        (void)unused;
        for (int i = 0; i < 50; i++) {
                nap(1);
                put(fd, "x");
                get(fd, "x");
        }
        ask(fd);
}

/* In an event loop, level- or edge-triggered: registrations stay valid. */
static void in_epoll(int fd, uint32_t how, bool late)
{
        struct epoll_event event = {.events = EPOLLIN | how, .data.u64 = 4711}, got;
        int epfd = epoll_create1(0);

        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        CHECK(epfd >= 0 && epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
        if (!how)
                CHECK(epoll_wait(epfd, &got, 1, 100) >= 0);
        if (late)
                nap(200);
        confine(serving, sizeof serving / sizeof *serving, SECCOMP_RET_KILL_PROCESS, BY_PRCTL);
        for (;;) {
                char bytes[512];
                ssize_t size;

                if (epoll_wait(epfd, &got, 1, -1) != 1 || got.data.u64 != 4711)
                        _exit(2);
                while ((size = read(fd, bytes, sizeof bytes)) > 0)
                        for (ssize_t done = 0; done < size;) {
                                ssize_t put = write(fd, bytes + done, (size_t)(size - done));

                                if (put < 0 && errno != EAGAIN)
                                        _exit(3);
                                done += put > 0 ? put : 0;
                        }
                if (!size)
                        _exit(0);
        }
}

static void level(int fd)
{
        in_epoll(fd, 0, false);
}

static void edge(int fd)
{
        in_epoll(fd, EPOLLET, false);
}

static void level_with_bytes(int fd)
{
        in_epoll(fd, 0, true);
}

static char **given;

/* A confined process executes a program, which is confined too: it may not create unix sockets. */
static void heir(int unused)
{
        struct sock_filter filter[] = {
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 0, 3),
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_UNIX, 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};

        (void)unused;
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
        execl("/proc/self/exe", given[0], given[1], given[2], given[3], "heir_talks", (char *)NULL);
        _exit(1);
}

static void echo_one(int listener)
{
        int fd = accept(listener, NULL, NULL);

        CHECK(fd >= 0);
        echo(fd);
}

/* --- libraries whose calls bypass ours --- */

static void deep(int fd, bool space)
{
        void *handle = space ? dlmopen(LM_ID_NEWLM, getenv("DEEP_LIBRARY"), RTLD_NOW)
                             : dlopen(getenv("DEEP_LIBRARY"), RTLD_NOW | RTLD_DEEPBIND);
        void (*echoes)(int) = handle ? (void (*)(int))dlsym(handle, "library_echo") : NULL;

        CHECK(echoes);
        echoes(fd);
}

static void deep_bind(int fd)
{
        deep(fd, false);
}

static void own_space(int fd)
{
        deep(fd, true);
}

/* A library's destructor sends the last bytes. */
static void last_words(int fd)
{
        void *handle = dlopen(getenv("DEEP_LIBRARY"), RTLD_NOW);
        void (*set)(int) = handle ? (void (*)(int))dlsym(handle, "library_says_bye") : NULL;

        CHECK(set);
        set(fd);
        get(fd, "abc");
        exit(0);
}

static void hear_bye(int fd)
{
        put(fd, "abc");
        get(fd, "bye");
        get_end(fd);
}

static void hear_end(int fd)
{
        put(fd, "abc");
        get(fd, "abc");
        get_end(fd);
}

static void exits_quickly(int fd)
{
        get(fd, "abc");
        put(fd, "abc");
        quick_exit(0);
}

static void exits_at_once(int fd)
{
        get(fd, "abc");
        put(fd, "abc");
        _exit(0);
}

/* --- an io_uring --- */

struct queue {
        int fd;
        unsigned *tail, *mask, *array, *head, *done, *done_mask;
        struct io_uring_sqe *entries;
        struct io_uring_cqe *outcomes;
};

/* With the C library's syscall(), or with the system call instruction in the program itself. */
static int setup(struct io_uring_params *parameters, bool inlined)
{
#ifdef __x86_64__
        long got;

        if (inlined) {
                __asm__ volatile("syscall"
                                 : "=a"(got)
                                 : "a"(SYS_io_uring_setup), "D"(8), "S"(parameters)
                                 : "rcx", "r11", "memory");
                return (int)got;
        }
#endif
        (void)inlined;
        return (int)syscall(SYS_io_uring_setup, 8, parameters);
}

static void make_queue(struct queue *queue, bool inlined)
{
        struct io_uring_params p = {0};
        char *submitted, *completed;

        queue->fd = setup(&p, inlined);
        if (queue->fd == -1 || queue->fd == -EPERM || queue->fd == -ENOSYS) {
                fprintf(stderr, "missing: the right to make an io_uring\n");
                _exit(77);
        }
        CHECK(queue->fd >= 0);
        submitted = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED,
                         queue->fd, IORING_OFF_SQ_RING);
        completed = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof *queue->outcomes, PROT_READ | PROT_WRITE,
                         MAP_SHARED, queue->fd, IORING_OFF_CQ_RING);
        queue->entries = mmap(NULL, p.sq_entries * sizeof *queue->entries, PROT_READ | PROT_WRITE, MAP_SHARED,
                              queue->fd, IORING_OFF_SQES);
        CHECK(submitted != MAP_FAILED && completed != MAP_FAILED && queue->entries != MAP_FAILED);
        queue->tail = (unsigned *)(void *)(submitted + p.sq_off.tail);
        queue->mask = (unsigned *)(void *)(submitted + p.sq_off.ring_mask);
        queue->array = (unsigned *)(void *)(submitted + p.sq_off.array);
        queue->head = (unsigned *)(void *)(completed + p.cq_off.head);
        queue->done = (unsigned *)(void *)(completed + p.cq_off.tail);
        queue->done_mask = (unsigned *)(void *)(completed + p.cq_off.ring_mask);
        queue->outcomes = (struct io_uring_cqe *)(void *)(completed + p.cq_off.cqes);
}

static int submit(struct queue *queue, struct io_uring_sqe one)
{
        unsigned at = *queue->tail & *queue->mask;

        queue->entries[at] = one;
        queue->array[at] = at;
        __atomic_store_n(queue->tail, *queue->tail + 1, __ATOMIC_RELEASE);
        CHECK(syscall(SYS_io_uring_enter, queue->fd, 1, 0, 0, NULL, 0) == 1);
        for (int i = 0; i < 1000; i++) {
                if (__atomic_load_n(queue->done, __ATOMIC_ACQUIRE) != *queue->head) {
                        int outcome = queue->outcomes[*queue->head & *queue->done_mask].res;

                        ++*queue->head;
                        return outcome;
                }
                nap(10);
        }
        return -ETIME;
}

/* A round trip through the io_uring. */
static void ask_by_queue(struct queue *queue, int fd)
{
        char byte = 0;

        put(fd, "y");
        CHECK(submit(queue, (struct io_uring_sqe){
                                .opcode = IORING_OP_POLL_ADD, .fd = fd, .poll32_events = POLLIN}) > 0);
        get(fd, "y");
        CHECK(submit(queue, (struct io_uring_sqe){
                                .opcode = IORING_OP_SEND, .fd = fd, .addr = (uintptr_t) "z", .len = 1}) == 1);
        CHECK(
            submit(queue, (struct io_uring_sqe){
                              .opcode = IORING_OP_RECV, .fd = fd, .addr = (uintptr_t)&byte, .len = 1}) == 1);
        CHECK(byte == 'z');
}

/* The connection has moved before the io_uring was created. */
static void uring_later(int fd)
{
        struct queue queue;

        make_queue(&queue, false);
        ask_by_queue(&queue, fd);
        ask(fd);
}

/* A second connection, made after the io_uring, to the peer of one that has moved. */
static void uring_second(int unused)
{
        struct queue queue;
        int one = dial(), two;

        (void)unused;
        warm_up(one);
        make_queue(&queue, false);
        two = dial();
        put(two, "d");
        get(two, "d");
        for (int i = 0; i < 50; i++) {
                nap(1);
                put(two, "x");
                get(two, "x");
        }
        ask_by_queue(&queue, two);
        ask(two);
        ask(one);
}

/* The same with a system call that the library does not see. */
static void uring_inlined(int unused)
{
        struct queue queue;
        int one = dial(), two;

        (void)unused;
        warm_up(one);
        make_queue(&queue, true);
        nap(50);
        two = dial();
        put(two, "d");
        get(two, "d");
        for (int i = 0; i < 50; i++) {
                nap(1);
                put(two, "x");
                get(two, "x");
        }
        ask_by_queue(&queue, two);
        ask(two);
        ask(one);
}

static void *echo_thread(void *fd)
{
        warm_up_server((int)(intptr_t)fd);
        echo((int)(intptr_t)fd);
        close((int)(intptr_t)fd);
        return NULL;
}

static void echo_two(int listener)
{
        pthread_t threads[2];

        for (int i = 0; i < 2; i++) {
                int fd = accept(listener, NULL, NULL);

                CHECK(fd >= 0);
                CHECK(pthread_create(&threads[i], NULL, echo_thread, (void *)(intptr_t)fd) == 0);
        }
        for (int i = 0; i < 2; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
}

/* --- a peer that falls back to TCP and sends nothing --- */

static void silent(int fd)
{
        CHECK(system("true") == 0);
        nap(1000);
        put(fd, "abc");
        get(fd, "abc");
}

/* No waiter may be told of bytes that are not there. */
static void not_told(int fd)
{
        struct epoll_event event = {.events = EPOLLIN}, got;
        struct timeval time = {.tv_usec = 300000};
        int epfd = epoll_create1(0);
        fd_set in;

        CHECK(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
        CHECK(epoll_wait(epfd, &got, 1, 300) == 0);
        CHECK(!ready(fd, POLLIN, 100));
        FD_ZERO(&in);
        FD_SET(fd, &in);
        CHECK(select(fd + 1, &in, NULL, NULL, &time) == 0);
        CHECK(epoll_wait(epfd, &got, 1, -1) == 1);
        CHECK(ready(fd, POLLIN, -1) == POLLIN);
        get(fd, "abc");
        put(fd, "abc");
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"killed", killed, ask, false},
            {"killed_by_seccomp", killed_by_seccomp, ask, false},
            {"refused", refused, ask, false},
            {"killed_with_bytes", killed_with_bytes, ask_early, false},
            {"strict", strict, ask, false},
            {"child", child, ask, false},
            {"before", before, dial_and_ask, true},
            {"level", level, ask, false},
            {"edge", edge, ask, false},
            {"level_with_bytes", level_with_bytes, ask_early, false},
            {"heir", echo_one, heir, true},
            {"heir_talks", echo_one, dial_and_ask, true},
            {"deep_bind", deep_bind, ask, false},
            {"own_space", own_space, ask, false},
            {"last_words", last_words, hear_bye, false},
            {"exits_quickly", exits_quickly, hear_end, false},
            {"exits_at_once", exits_at_once, hear_end, false},
            {"uring_later", echo, uring_later, false},
            {"uring_second", echo_two, uring_second, true},
            {"uring_inlined", echo_two, uring_inlined, true},
            {"silent", not_told, silent, false},
            {0},
        };

        given = arguments;
        return run_scenario(count, arguments, scenarios);
}
