/* Another program takes over: what it inherits of our connections has to be plain TCP. */
#include "calls.h"

#include "protocol.h"
#include "sys.h"
#include "upgrade.h"

#include <fcntl.h>
#include <spawn.h>

/* Descriptors that stay open over exec. */
static void leave_inherited(void)
{
        uint32_t high = process.on ? atomic_load(&process.high) : 0;
        int saved = *__errno_location();

        for (int pass = 0; pass < 2; pass++)
                for (uint32_t fd = 0; fd < high; fd++) {
                        uint64_t key;
                        struct end *end = end_of((int)fd, &key);
                        bool attached = end && atomic_load(&end->stage) == STAGE_ATTACHED;
                        long flags = attached ? sys_2(SYS_fcntl, fd, F_GETFD) : -1;

                        if (flags < 0 || flags & FD_CLOEXEC)
                                continue;
                        /* Peers on other hosts take a while: all of them at the same time. */
                        if (pass == 0)
                                upgrade_announce(end);
                        else
                                upgrade_hand_over((int)fd, end, key, REASON_PASSED);
                }
        *__errno_location() = saved;
}

/* As close() of all descriptors. */
static void leave_the_world(void)
{
        uint32_t high = process.on && call_is_ours() ? atomic_load(&process.high) : 0;

        for (uint32_t fd = 0; fd < high; fd++) {
                uint64_t key;
                struct end *end = end_of((int)fd, &key);

                if (end)
                        upgrade_close((int)fd, end, key);
        }
}

__attribute__((destructor)) static void leaving(void)
{
        leave_the_world();
}

CALL __attribute__((noreturn)) void _exit(int status)
{
        leave_the_world();
        real()->_exit(status);
        __builtin_unreachable();
}

ALSO(_exit) __attribute__((noreturn)) void _Exit(int);

CALL int execve(const char *path, char *const *arguments, char *const *variables)
{
        leave_inherited();
        return real()->execve(path, arguments, variables);
}

CALL int execv(const char *path, char *const *arguments)
{
        leave_inherited();
        return real()->execv(path, arguments);
}

CALL int execvp(const char *file, char *const *arguments)
{
        leave_inherited();
        return real()->execvp(file, arguments);
}

CALL int execvpe(const char *file, char *const *arguments, char *const *variables)
{
        leave_inherited();
        return real()->execvpe(file, arguments, variables);
}

CALL int fexecve(int fd, char *const *arguments, char *const *variables)
{
        leave_inherited();
        return real()->fexecve(fd, arguments, variables);
}

CALL int execveat(int directory, const char *path, char *const *arguments, char *const *variables, int flags)
{
        leave_inherited();
        return real()->execveat(directory, path, arguments, variables, flags);
}

CALL int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                     const posix_spawnattr_t *attributes, char *const *arguments, char *const *variables)
{
        leave_inherited();
        return real()->posix_spawn(pid, path, actions, attributes, arguments, variables);
}

CALL int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                      const posix_spawnattr_t *attributes, char *const *arguments, char *const *variables)
{
        leave_inherited();
        return real()->posix_spawnp(pid, file, actions, attributes, arguments, variables);
}

/* The child will have the connection under a number that stays open. */
CALL int posix_spawn_file_actions_adddup2(posix_spawn_file_actions_t *actions, int old, int new)
{
        uint64_t key;
        struct end *end = end_of(old, &key);

        if (end)
                upgrade_hand_over(old, end, key, REASON_PASSED);
        return real()->posix_spawn_file_actions_adddup2(actions, old, new);
}
