#include "guest.h"

#include "own.h"
#include "sys.h"

#include <string.h>
#include <sys/socket.h>

struct replaced {
        uint64_t key;
        uint32_t number; /* of the end */
        uint32_t unused;
};

union control {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
};

/* 1 + descriptor: the host's socket, and the guest's. */
static _Atomic int32_t sockets[2];

static bool has_attached(void)
{
        struct end *end;
        uint64_t key;

        for (int fd = -1; (fd = end_next(fd, &end, &key)) >= 0;)
                if (load_relaxed(&end->stage) == STAGE_ATTACHED)
                        return true;
        return false;
}

void guest_prepare(void)
{
        int32_t nothing = 0;
        int pair[2];

        for (int i = 0; i < 2; i++)
                if (atomic_load(&sockets[i]) && !is_own_descriptor(atomic_load(&sockets[i]) - 1))
                        atomic_store(&sockets[i], 0);

        if (!has_attached() || atomic_load(&sockets[1]) || !in_this_process())
                return;
        if (sys_4(SYS_socketpair, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
                return;
        pair[0] = own_descriptor(pair[0]);
        pair[1] = own_descriptor(pair[1]);
        if (pair[0] >= 0 && pair[1] >= 0 &&
            atomic_compare_exchange_strong(&sockets[0], &nothing, pair[0] + 1)) {
                atomic_store(&sockets[1], pair[1] + 1);
                return;
        }
        for (int i = 0; i < 2; i++)
                if (pair[i] >= 0)
                        close_own(pair[i]);
}

void guest_send(struct end *end, uint64_t key, int program)
{
        struct replaced replaced = {.key = key, .number = end_number(end)};
        union control control;
        struct iovec vec = {.iov_base = &replaced, .iov_len = sizeof replaced};
        struct msghdr message = {
            .msg_iov = &vec, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};
        int32_t fd = atomic_load(&sockets[1]);

        if (!fd)
                return;
        memset(&control, 0, sizeof control);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof program);
        memcpy(CMSG_DATA(&control.header), &program, sizeof program);
        sys_3(SYS_sendmsg, fd - 1, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

bool guest_receive(struct end **end, uint64_t *key, int *program)
{
        struct replaced replaced;
        union control control;
        struct iovec vec = {.iov_base = &replaced, .iov_len = sizeof replaced};
        struct msghdr message = {
            .msg_iov = &vec, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};
        int32_t from = atomic_load(&sockets[0]);
        struct cmsghdr *part;
        long got;

        if (!from || !in_this_process())
                return false;
        got = sys_3(SYS_recvmsg, from - 1, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        part = got == (long)sizeof replaced ? CMSG_FIRSTHDR(&message) : NULL;
        if (!part)
                return false;
        memcpy(program, CMSG_DATA(part), sizeof *program);
        *end = &family->ends[replaced.number % ENDS];
        *key = replaced.key;
        return true;
}
