/*
 * freeflow-runc: an OCI runtime that gives containers on FreeFlow networks the library.
 *
 * The engine calls it with the arguments of runc. It may change what runc is about to read, and
 * then becomes runc (or what the engine used before) with the same arguments. Read bundle.c next.
 *
 * A container must start whatever happens here. So the work is done in a child process: if that
 * crashes, or takes too long, the container starts as it is. Files are replaced by renaming, so
 * they are complete at any moment.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "arguments.h"
#include "bundle.h"
#include "host.h"
#include "real_runtime.h"

enum { REFUSED = 'r', DONE = 'd', NO_RUNTIME = 127 };

static const char REFUSAL[] = "freeflow-runc: a container with FreeFlow's library can't be checkpointed: "
                              "its connections are in shared memory; start it with "
                              "--label freeflow.accelerate=off";

static char work(const struct arguments *arguments)
{
        if (arguments->command == COMMAND_CREATE)
                prepare_container(arguments);
        else if (arguments->command == COMMAND_EXEC)
                prepare_program(arguments);
        else if (is_prepared(arguments))
                return REFUSED;
        return DONE;
}

/* Waits for the child's result, at most WORK_MILLISECONDS. Returns it, or 0. */
static char await_result(int pipe)
{
        struct pollfd readable = {.fd = pipe, .events = POLLIN};
        struct timespec start, now;
        const long most = patience(WORK_MILLISECONDS);
        long left = most;
        char result = 0;

        clock_gettime(CLOCK_MONOTONIC, &start);
        while (left > 0) {
                int ready = poll(&readable, 1, (int)left);

                if (ready == 1)
                        return read(pipe, &result, 1) == 1 ? result : 0;
                if (ready == 0 || errno != EINTR)
                        return 0;
                clock_gettime(CLOCK_MONOTONIC, &now);
                left = most - ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000);
        }
        return 0;
}

/* Does the work in a child process. Returns its result, or 0. */
static char work_aside(const struct arguments *arguments)
{
        int ends[2];
        char result;
        pid_t child;

        if (pipe2(ends, O_CLOEXEC) != 0)
                return 0;
        child = fork();
        if (child == 0) {
                result = work(arguments);
                _exit(write(ends[1], &result, 1) == 1 ? 0 : 1);
        }
        close(ends[1]);
        result = child > 0 ? await_result(ends[0]) : 0;
        close(ends[0]);
        if (child > 0) {
                /* A child that the kernel can't end now is left behind. */
                if (result == 0)
                        kill(child, SIGKILL);
                waitpid(child, NULL, result == 0 ? WNOHANG : 0);
        }
        return result;
}

/*
 * Reports an error as runc does: on stderr, and in the log from which the engine takes its
 * message.
 */
static void report(const struct arguments *arguments, const char *message)
{
        int log;

        dprintf(STDERR_FILENO, "%s\n", message);
        if (arguments->log == NULL)
                return;
        log = open(arguments->log, O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0644);
        if (log < 0)
                return;
        if (arguments->log_json)
                dprintf(log, "{\"level\":\"error\",\"msg\":\"%s\"}\n", message);
        else
                dprintf(log, "level=error msg=\"%s\"\n", message);
        close(log);
}

int main(int count, char **words)
{
        struct arguments arguments = parse_arguments(count, words);
        struct settings settings = read_settings();

        if (count == 0)
                return NO_RUNTIME;
        if (arguments.command != COMMAND_OTHER && !settings.off && work_aside(&arguments) == REFUSED) {
                report(&arguments, REFUSAL);
                return 1;
        }
        become_real(&settings, words);
        report(&arguments, "freeflow-runc: there is no runc: neither where " SETTINGS
                           " says (written by: freeflow runtime install) nor in PATH");
        return NO_RUNTIME;
}
