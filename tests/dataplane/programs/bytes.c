/* Calls that move bytes, on a connection whose bytes are in a ring. */
#include "pair.h"

static void send_hello(int fd)
{
        put(fd, "hello world");
        get(fd, "!");
}

static void peek(int fd)
{
        char bytes[64];

        CHECK(ready(fd, POLLIN, 5000) == POLLIN);
        for (int i = 0; i < 2; i++) {
                CHECK(recv(fd, bytes, 5, MSG_PEEK) == 5);
                CHECK(memcmp(bytes, "hello", 5) == 0);
        }
        CHECK(recv(fd, bytes, sizeof bytes, MSG_PEEK | MSG_DONTWAIT) == 11);
        get(fd, "hello world");
        CHECK(recv(fd, bytes, 1, MSG_PEEK | MSG_DONTWAIT) == -1 && errno == EAGAIN);
        put(fd, "!");
}

static void send_in_parts(int fd)
{
        for (int i = 0; i < 10; i++) {
                char part[10000];

                memset(part, 'a' + i, sizeof part);
                put_all(fd, part, sizeof part);
                nap(5);
        }
        put(fd, "rest");
}

static void wait_all(int fd)
{
        static char bytes[100000];

        CHECK(recv(fd, bytes, sizeof bytes, MSG_WAITALL) == sizeof bytes);
        for (size_t i = 0; i < sizeof bytes; i++)
                CHECK(bytes[i] == 'a' + (char)(i / 10000));
        CHECK(recv(fd, bytes, sizeof bytes, MSG_WAITALL) == 4);
}

static void dont_wait(int fd)
{
        char byte;

        CHECK(recv(fd, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
        put(fd, "?");
        get(fd, "x");
        CHECK(recv(fd, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
}

static void answer_once(int fd)
{
        get(fd, "?");
        put(fd, "x");
        get_end(fd);
}

static void truncate_bytes(int fd)
{
        char bytes[16];

        CHECK(ready(fd, POLLIN, 5000) == POLLIN);
        CHECK(recv(fd, bytes, 6, MSG_TRUNC) == 6);
        get(fd, "world");
        put(fd, "!");
}

static void send_urgent(int fd)
{
        put(fd, "ab");
        CHECK(send(fd, "!", 1, MSG_OOB) == 1);
        put(fd, "cd");
        get(fd, "k");
}

static void urgent(int fd)
{
        char byte = 0;

        CHECK(ready(fd, POLLPRI, 5000) & POLLPRI);
        CHECK(recv(fd, &byte, 1, MSG_OOB) == 1);
        CHECK(byte == '!');
        get(fd, "abcd");
        put(fd, "k");
}

static void send_vectors(int fd)
{
        struct iovec parts[4] = {{"one", 3}, {"", 0}, {"two", 3}, {"three", 5}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 4};
        struct mmsghdr several[2] = {{.msg_hdr = message}, {.msg_hdr = message}};

        CHECK(writev(fd, parts, 4) == 11);
        CHECK(sendmsg(fd, &message, 0) == 11);
        CHECK(sendmmsg(fd, several, 2, 0) == 2);
        CHECK(several[0].msg_len == 11 && several[1].msg_len == 11);
        get(fd, "k");
}

static void vectors(int fd)
{
        char first[4] = "", second[8] = "", name[64], control[64];
        struct iovec parts[2] = {{first, 3}, {second, 8}};
        struct msghdr message = {
            .msg_name = name,
            .msg_namelen = sizeof name,
            .msg_control = control,
            .msg_controllen = sizeof control,
            .msg_iov = parts,
            .msg_iovlen = 2,
            .msg_flags = -1,
        };
        struct mmsghdr several = {.msg_hdr = {.msg_iov = parts, .msg_iovlen = 2}};
        int unread = 0;

        while (unread < 44)
                CHECK(ioctl(fd, FIONREAD, &unread) == 0);
        CHECK(readv(fd, parts, 2) == 11);
        CHECK(memcmp(first, "one", 3) == 0 && memcmp(second, "twothree", 8) == 0);
        CHECK(recvmsg(fd, &message, 0) == 11);
        CHECK(memcmp(first, "one", 3) == 0 && memcmp(second, "twothree", 8) == 0);
        CHECK(message.msg_namelen == 0 && message.msg_controllen == 0 && message.msg_flags == 0);
        for (int i = 0; i < 2; i++) {
                memset(second, 0, sizeof second);
                CHECK(recvmmsg(fd, &several, 1, 0, NULL) == 1);
                CHECK(several.msg_len == 11 && memcmp(second, "twothree", 8) == 0);
        }
        put(fd, "k");
}

static void send_thousand(int fd)
{
        put_pattern(fd, 1000);
        get(fd, "k");
}

static void count_unread(int fd)
{
        int unread = 0, unsent = -1;
        char bytes[400];

        for (int i = 0; unread < 1000 && i < 5000; i++, nap(1))
                CHECK(ioctl(fd, FIONREAD, &unread) == 0);
        CHECK(unread == 1000);
        get_all(fd, bytes, sizeof bytes);
        CHECK(ioctl(fd, FIONREAD, &unread) == 0);
        CHECK(unread == 600);
        get_all(fd, bytes, 400);
        get_all(fd, bytes, 200);
        CHECK(ioctl(fd, FIONREAD, &unread) == 0);
        CHECK(unread == 0);
        put(fd, "k");
        for (int i = 0; unsent && i < 5000; i++, nap(1))
                CHECK(ioctl(fd, TIOCOUTQ, &unsent) == 0);
        CHECK(unsent == 0);
}

enum { FILE_SIZE = 3 << 20 };

static int a_file(void)
{
        int file = memfd_create("file", MFD_CLOEXEC);

        CHECK(file >= 0);
        put_pattern(file, FILE_SIZE);
        CHECK(lseek(file, 0, SEEK_SET) == 0);
        return file;
}

/* Once with an explicit offset, once with the file's own. */
static void send_files(int fd)
{
        int file = a_file();
        off_t offset = 0;

        while (offset < FILE_SIZE)
                CHECK(sendfile(fd, file, &offset, (size_t)(FILE_SIZE - offset)) > 0);
        CHECK(lseek(file, 0, SEEK_CUR) == 0);
        CHECK(sendfile(fd, file, &offset, 100) == 0);
        for (size_t done = 0; done < FILE_SIZE;) {
                ssize_t sent = sendfile(fd, file, NULL, FILE_SIZE - done);

                CHECK(sent > 0);
                done += (size_t)sent;
                CHECK(lseek(file, 0, SEEK_CUR) == (off_t)done);
        }
        get(fd, "k");
}

static void get_files(int fd)
{
        get_pattern(fd, FILE_SIZE);
        get_pattern(fd, FILE_SIZE);
        put(fd, "k");
}

static void splice_out(int fd)
{
        int file = a_file(), ends[2];

        CHECK(pipe(ends) == 0);
        for (size_t done = 0; done < FILE_SIZE;) {
                ssize_t filled = splice(file, NULL, ends[1], NULL, 65536, 0);

                CHECK(filled > 0);
                done += (size_t)filled;
                while (filled) {
                        ssize_t sent = splice(ends[0], NULL, fd, NULL, (size_t)filled, SPLICE_F_MORE);

                        CHECK(sent > 0);
                        filled -= sent;
                }
        }
        get(fd, "k");
}

static void get_file(int fd)
{
        get_pattern(fd, FILE_SIZE);
        put(fd, "k");
}

static void put_file(int fd)
{
        put_pattern(fd, FILE_SIZE);
        get(fd, "k");
        get_end(fd);
}

static void splice_in(int fd)
{
        int file = memfd_create("file", 0), ends[2];

        CHECK(file >= 0);
        CHECK(pipe(ends) == 0);
        for (size_t done = 0; done < FILE_SIZE;) {
                ssize_t got = splice(fd, NULL, ends[1], NULL, 65536, SPLICE_F_MOVE);

                CHECK(got > 0);
                done += (size_t)got;
                while (got) {
                        ssize_t kept = splice(ends[0], NULL, file, NULL, (size_t)got, 0);

                        CHECK(kept > 0);
                        got -= kept;
                }
        }
        CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        CHECK(splice(fd, NULL, ends[1], NULL, 65536, 0) == -1 && errno == EAGAIN);
        CHECK(lseek(file, 0, SEEK_SET) == 0);
        get_pattern(file, FILE_SIZE);
        put(fd, "k");
}

static void nothing(int fd)
{
        char byte;

        CHECK(write(fd, "", 0) == 0);
        CHECK(send(fd, "", 0, 0) == 0);
        CHECK(read(fd, &byte, 0) == 0);
        put(fd, "?");
        get(fd, "x");
}

static void echo_lines(int fd)
{
        FILE *in = fdopen(fd, "r"), *out = fdopen(dup(fd), "w");
        char line[256];

        CHECK(in && out);
        while (fgets(line, sizeof line, in)) {
                fprintf(out, "you said %s", line);
                fflush(out);
        }
        CHECK(feof(in));
}

static void lines(int fd)
{
        for (int i = 0; i < 1000; i++) {
                char line[64];

                snprintf(line, sizeof line, "line %d\n", i);
                put(fd, line);
                get(fd, "you said ");
                get(fd, line);
        }
}

enum { MUCH = 8 << 20 };

static void *put_much(void *fd)
{
        put_pattern(*(int *)fd, MUCH);
        return NULL;
}

static void both_ways(int fd)
{
        pthread_t thread;

        CHECK(pthread_create(&thread, NULL, put_much, &fd) == 0);
        get_pattern(fd, MUCH);
        CHECK(pthread_join(thread, NULL) == 0);
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"peek", send_hello, peek, false},
            {"wait_all", send_in_parts, wait_all, false},
            {"dont_wait", answer_once, dont_wait, false},
            {"truncate", send_hello, truncate_bytes, false},
            {"urgent", send_urgent, urgent, false},
            {"vectors", send_vectors, vectors, false},
            {"count_unread", send_thousand, count_unread, false},
            {"sendfile", send_files, get_files, false},
            {"splice_out", splice_out, get_file, false},
            {"splice_in", put_file, splice_in, false},
            {"nothing", answer_once, nothing, false},
            {"stdio", echo_lines, lines, false},
            {"both_ways", both_ways, both_ways, false},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
