/* Measures the cost of a new process in a program with one TCP connection.
 *
 *   processes KIND ADDRESS PORT SECONDS
 *
 * KIND is the way to make the child, whose end the parent waits for:
 *   fork   fork(); the child ends at once
 *   exec   fork(); the child executes this program, without LD_PRELOAD
 *   start  posix_spawn() of this program, with the same environment
 * CPU time is that of parent and children together.
 */
#include "common.h"

#include <spawn.h>
#include <sys/wait.h>

extern char **environ;

static char *bare[1];
static char self[] = "/proc/self/exe", nothing[] = "nothing";
static char *const arguments[] = {self, nothing, NULL};

static _Noreturn void usage(void)
{
        fputs("usage: processes fork|exec|start ADDRESS PORT SECONDS\n", stderr);
        exit(2);
}

static double used_us(void)
{
        struct rusage usage;

        if (getrusage(RUSAGE_CHILDREN, &usage) < 0)
                fail("getrusage");
        return cpu_us() + (double)usage.ru_utime.tv_sec * 1e6 + (double)usage.ru_utime.tv_usec +
               (double)usage.ru_stime.tv_sec * 1e6 + (double)usage.ru_stime.tv_usec;
}

static pid_t begin(char kind)
{
        pid_t child;

        if (kind == 's') {
                errno = posix_spawn(&child, self, NULL, NULL, arguments, environ);
                if (errno)
                        fail("posix_spawn");
                return child;
        }
        child = fork();
        if (child < 0)
                fail("fork");
        if (child == 0) {
                if (kind == 'e')
                        execve(self, arguments, bare);
                _exit(kind == 'e');
        }
        return child;
}

int main(int count, char **words)
{
        uint64_t start, end, turns = 0;
        struct endpoint where;
        double before;
        int fd;

        if (count == 2 && strcmp(words[1], nothing) == 0)
                return 0;
        if (count != 5 || !strchr("fes", words[1][0]))
                usage();
        where = resolve(words[2], words[3]);
        fd = connect_to(&where);
        before = used_us();
        start = now();
        end = start + (uint64_t)(atof(words[4]) * 1e9);
        do {
                pid_t child = begin(words[1][0]);
                int status;

                if (waitpid(child, &status, 0) != child || status != 0)
                        fail("waitpid");
                turns++;
        } while (now() < end);
        end = now();
        printf("{\"count\": %llu, \"seconds\": %.6f, \"cpu_us\": %.1f}\n", (unsigned long long)turns,
               (double)(end - start) / 1e9, used_us() - before);
        close(fd);
        return 0;
}
