/* Calls that start another program, here or in a child that the C library makes. */
#include "calls.h"

#include "inherit.h"

#include <errno.h>
#include <stdarg.h>
#include <wordexp.h>

extern char **environ __attribute__((weak));

/* Before exec, and after an exec that failed. */
static void leaving_for(void)
{
        inherit_all();
        if (in_this_process())
                family_exec();
}

static int came_back(int outcome)
{
        int saved = *__errno_location();

        if (in_this_process())
                family_unexec();
        *__errno_location() = saved;
        return outcome;
}

CALL int execve(const char *path, char *const *arguments, char *const *variables)
{
        leaving_for();
        return came_back(real()->execve(path, arguments, variables));
}

CALL int execv(const char *path, char *const *arguments)
{
        leaving_for();
        return came_back(real()->execv(path, arguments));
}

CALL int execvp(const char *file, char *const *arguments)
{
        leaving_for();
        return came_back(real()->execvp(file, arguments));
}

CALL int execvpe(const char *file, char *const *arguments, char *const *variables)
{
        leaving_for();
        return came_back(real()->execvpe(file, arguments, variables));
}

CALL int fexecve(int fd, char *const *arguments, char *const *variables)
{
        leaving_for();
        return came_back(real()->fexecve(fd, arguments, variables));
}

CALL int execveat(int directory, const char *path, char *const *arguments, char *const *variables, int flags)
{
        leaving_for();
        return came_back(real()->execveat(directory, path, arguments, variables, flags));
}

/* The calls with a list of arguments copy it to the stack, as the C library's do: they may be
 * called in a signal handler. */
#define TAKE_LIST(list, first, vector)                                                                       \
        size_t count = 0;                                                                                    \
        va_list list;                                                                                        \
                                                                                                             \
        va_start(list, first);                                                                               \
        for (bool more = is_given(first); more; more = va_arg(list, char *) != NULL)                         \
                count++;                                                                                     \
        va_end(list);                                                                                        \
                                                                                                             \
        char *vector[count + 1];                                                                             \
                                                                                                             \
        va_start(list, first);                                                                               \
        vector[0] = (char *)(uintptr_t)(first);                                                              \
        for (size_t i = 1; i <= count; i++)                                                                  \
                vector[i] = va_arg(list, char *);

/* Programs may pass NULL, whatever the declaration says. */
static bool is_given(const char *first)
{
        return first != NULL;
}

CALL int execl(const char *path, const char *first, ...)
{
        TAKE_LIST(list, first, arguments)
        va_end(list);
        return execv(path, arguments);
}

CALL int execlp(const char *file, const char *first, ...)
{
        TAKE_LIST(list, first, arguments)
        va_end(list);
        return execvp(file, arguments);
}

CALL int execle(const char *path, const char *first, ...)
{
        TAKE_LIST(list, first, arguments)
        char *const *variables = va_arg(list, char *const *);

        va_end(list);
        return execve(path, arguments, variables);
}

CALL int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                     const posix_spawnattr_t *attributes, char *const *arguments, char *const *variables)
{
        inherit_spawned(actions);
        return real()->posix_spawn(pid, path, actions, attributes, arguments, variables);
}

CALL int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                      const posix_spawnattr_t *attributes, char *const *arguments, char *const *variables)
{
        inherit_spawned(actions);
        return real()->posix_spawnp(pid, file, actions, attributes, arguments, variables);
}

/* The child will have the connection under a number that stays open. */
CALL int posix_spawn_file_actions_adddup2(posix_spawn_file_actions_t *actions, int old, int new)
{
        if (process.on)
                spawned_duplicates(actions, old);
        return real()->posix_spawn_file_actions_adddup2(actions, old, new);
}

CALL int posix_spawn_file_actions_destroy(posix_spawn_file_actions_t *actions)
{
        static int (*next)(posix_spawn_file_actions_t *);

        if (process.on)
                spawned_forgets(actions);
        next = next ? next : real_named("posix_spawn_file_actions_destroy");
        return next(actions);
}

/* glibc 2.39 and later. Functions that aren't called often are looked up when they are. */
#define SPAWN_BY_PIDFD(name)                                                                                 \
        CALL int name(int *pidfd, const char *path, const posix_spawn_file_actions_t *actions,               \
                      const posix_spawnattr_t *attributes, char *const *arguments, char *const *variables)   \
        {                                                                                                    \
                int (*next)(int *, const char *, const posix_spawn_file_actions_t *,                         \
                            const posix_spawnattr_t *, char *const *, char *const *) = real_named(#name);    \
                                                                                                             \
                inherit_spawned(actions);                                                                    \
                return next ? next(pidfd, path, actions, attributes, arguments, variables) : ENOSYS;         \
        }

SPAWN_BY_PIDFD(pidfd_spawn)
SPAWN_BY_PIDFD(pidfd_spawnp)

/* Calls in which the C library itself makes a child. daemon() and forkpty() make theirs as fork()
 * does. */
CALL int system(const char *command)
{
        int (*next)(const char *) = real_named("system");

        if (command)
                inherit_all();
        return next(command);
}

CALL FILE *popen(const char *command, const char *mode)
{
        FILE *(*next)(const char *, const char *) = real_named("popen");

        inherit_all();
        return next(command, mode);
}

ALSO(popen) __attribute__((malloc)) FILE *_IO_popen(const char *, const char *);

CALL int wordexp(const char *words, wordexp_t *result_of, int flags)
{
        int (*next)(const char *, wordexp_t *, int) = real_named("wordexp");
        const char *at = words;

        while (*at && *at != '$' && *at != '`')
                at++;
        /* The words have a command; musl lets a shell expand all words. */
        if ((*at && !(flags & WRDE_NOCMD)) || !real_named("gnu_get_libc_version"))
                inherit_all();
        return next(words, result_of, flags);
}
