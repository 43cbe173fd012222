#include "inherit.h"

#include "arena.h"
#include "calls.h"
#include "protocol.h"
#include "sys.h"
#include "upgrade.h"

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>

enum { SPAWNED = 64 };

/* Numbers that file actions duplicate. The actions themselves are the C library's secret. */
static struct {
        struct lock lock;
        bool full; /* some aren't known: any number may be one */
        unsigned count;
        struct {
                const void *actions;
                int fd;
        } pairs[SPAWNED];
} spawned;

/* A pair of sockets, 1 + descriptor, in which a guest tells its host. */
static _Atomic int32_t told[2];

void inherit(int fd, struct end *end, uint64_t key)
{
        if (!end_is(end, key))
                return;
        if (atomic_load(&end->stage) != STAGE_ATTACHED)
                stage_refuse(end, key, REASON_PASSED);
        if (atomic_load(&end->stage) == STAGE_ATTACHED && end_is_behind(fd, end))
                hand_over(fd, end, key, REASON_PASSED);
}

static void inherit_some(bool (*does)(int fd))
{
        uint32_t high = process.on ? atomic_load(&process.high) : 0;
        int saved = *__errno_location();

        for (int pass = 0; pass < 2; pass++)
                for (uint32_t fd = 0; fd < high; fd++) {
                        uint64_t key;
                        struct end *end = end_of((int)fd, &key);

                        if (!end || atomic_load(&end->stage) == STAGE_CLOSED)
                                continue;
                        /* Peers on other hosts take a while: all of them at the same time. */
                        if (pass == 0 && (atomic_load(&end->stage) != STAGE_ATTACHED || !end_is_remote(end)))
                                continue;
                        if (!does((int)fd))
                                continue;
                        if (pass == 0)
                                fallback_announce(end);
                        else
                                inherit((int)fd, end, key);
                }
        *__errno_location() = saved;
}

static bool stays_open(int fd)
{
        long flags = sys_2(SYS_fcntl, fd, F_GETFD);

        return flags >= 0 && !(flags & FD_CLOEXEC);
}

void inherit_all(void)
{
        inherit_some(stays_open);
}

static bool is_duplicated(int fd)
{
        for (unsigned i = 0; i < spawned.count; i++)
                if (spawned.pairs[i].fd == fd)
                        return true;
        return spawned.full || stays_open(fd);
}

void inherit_spawned(const posix_spawn_file_actions_t *actions)
{
        /* Which of the actions were copied from others isn't known: all that are known count. */
        inherit_some(actions ? is_duplicated : stays_open);
}

void spawned_duplicates(const posix_spawn_file_actions_t *actions, int fd)
{
        enum taken taken = lock_take(&spawned.lock, self());
        unsigned i = 0;

        while (i < spawned.count && (spawned.pairs[i].actions != actions || spawned.pairs[i].fd != fd))
                i++;
        if (i == SPAWNED || taken == LOCK_NESTED) {
                spawned.full = true;
        } else if (i == spawned.count) {
                spawned.pairs[i].actions = actions;
                spawned.pairs[i].fd = fd;
                spawned.count++;
        }
        lock_release(&spawned.lock, taken);
}

void spawned_forgets(const posix_spawn_file_actions_t *actions)
{
        enum taken taken = lock_take(&spawned.lock, self());

        for (unsigned i = 0; i < spawned.count && taken == LOCK_TAKEN;)
                if (spawned.pairs[i].actions == actions)
                        spawned.pairs[i] = spawned.pairs[--spawned.count];
                else
                        i++;
        lock_release(&spawned.lock, taken);
}

/* --- guests --- */

struct news {
        uint64_t key;
        uint32_t number;
        uint32_t unused;
};

static bool has_attached(void)
{
        uint32_t high = process.on ? atomic_load(&process.high) : 0;

        for (uint32_t fd = 0; fd < high; fd++) {
                uint64_t key;
                struct end *end = end_of((int)fd, &key);

                if (end && atomic_load_explicit(&end->stage, memory_order_relaxed) == STAGE_ATTACHED)
                        return true;
        }
        return false;
}

void guest_comes(void)
{
        int32_t nothing = 0;
        int pair[2];

        for (int i = 0; i < 2; i++)
                if (atomic_load(&told[i]) && !is_own_descriptor(atomic_load(&told[i]) - 1))
                        atomic_store(&told[i], 0);

        if (!has_attached() || atomic_load(&told[1]) || !in_this_process())
                return;
        if (sys_4(SYS_socketpair, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
                return;
        pair[0] = own_descriptor(pair[0]);
        pair[1] = own_descriptor(pair[1]);
        if (pair[0] >= 0 && pair[1] >= 0 && atomic_compare_exchange_strong(&told[0], &nothing, pair[0] + 1)) {
                atomic_store(&told[1], pair[1] + 1);
                return;
        }
        for (int i = 0; i < 2; i++)
                if (pair[i] >= 0)
                        close_own(pair[i]);
}

void guest_tell(struct end *end, uint64_t key, int program)
{
        struct news news = {.key = key, .number = end_number(end)};
        union {
                struct cmsghdr header;
                char room[CMSG_SPACE(sizeof(int))];
        } control;
        struct iovec vec = {.iov_base = &news, .iov_len = sizeof news};
        struct msghdr message = {
            .msg_iov = &vec, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};
        int32_t fd = atomic_load(&told[1]);

        if (!fd)
                return;
        memset(&control, 0, sizeof control);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof program);
        memcpy(CMSG_DATA(&control.header), &program, sizeof program);
        sys_3(SYS_sendmsg, fd - 1, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void guest_left(void)
{
        int32_t from = atomic_load(&told[0]);
        int saved = *__errno_location();

        while (from && in_this_process()) {
                struct news news;
                union {
                        struct cmsghdr header;
                        char room[CMSG_SPACE(sizeof(int))];
                } control;
                struct iovec vec = {.iov_base = &news, .iov_len = sizeof news};
                struct msghdr message = {.msg_iov = &vec,
                                         .msg_iovlen = 1,
                                         .msg_control = &control,
                                         .msg_controllen = sizeof control.room};
                long got = sys_3(SYS_recvmsg, from - 1, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
                struct cmsghdr *part = got == (long)sizeof news ? CMSG_FIRSTHDR(&message) : NULL;
                struct end *end;
                int program, fd;

                if (!part)
                        break;
                memcpy(&program, CMSG_DATA(part), sizeof program);
                end = &family->ends[news.number % ENDS];
                fd = end_next_descriptor(end, -1);
                if (fd >= 0 && end_is(end, news.key))
                        hand_over_to(fd, end, news.key, program, REASON_PASSED);
                else
                        sys_1(SYS_close, program);
        }
        *__errno_location() = saved;
}
