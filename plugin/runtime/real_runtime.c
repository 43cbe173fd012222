/*
 * Finds and starts the real runtime. Its path is in a file of the host with lines NAME=VALUE; if
 * that leads nowhere, or back to this program, runc is looked for in PATH.
 */
#include "real_runtime.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host.h"
#include "plain_file.h"

static const char NAME[] = "runc";
/*
 * In the environment of what this program starts. A runtime that leads back here, as a script can,
 * would do so for ever: one of the settings is called once, one in PATH once more.
 */
static const char CALLED[] = "FREEFLOW_RUNC";
static const char PLACES[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

struct settings read_settings(void)
{
        struct settings settings = {.runtime = ""};
        struct text text = read_text(AT_FDCWD, host_path(SETTINGS), 1);
        char *state = NULL;

        if (text.bytes == NULL)
                return settings;
        for (char *line = strtok_r(text.bytes, "\n", &state); line != NULL;
             line = strtok_r(NULL, "\n", &state)) {
                if (strncmp(line, "runtime=/", 9) == 0 && strlen(line + 8) < sizeof(settings.runtime))
                        strcpy(settings.runtime, line + 8);
                else if (strcmp(line, "accelerate=off") == 0)
                        settings.off = 1;
        }
        free(text.bytes);
        return settings;
}

/* Whether a path leads to this very program, which would call itself for ever. */
static int is_self(const char *path)
{
        struct stat own, other;

        return stat("/proc/self/exe", &own) == 0 && stat(path, &other) == 0 && own.st_dev == other.st_dev &&
               own.st_ino == other.st_ino;
}

/* The name of the program is its own: some runtimes read their mode from it. */
static void try_runtime(char *path, char **words)
{
        char *before = words[0];

        if (is_self(path))
                return;
        words[0] = path;
        execv(path, words);
        words[0] = before;
}

void become_real(struct settings *settings, char **words)
{
        const char *places = getenv("PATH"), *called = getenv(CALLED);
        char path[PATH_MAX];

        if (called == NULL && settings->runtime[0] != '\0') {
                setenv(CALLED, "settings", 1);
                try_runtime(settings->runtime, words);
        }
        if (called != NULL && strcmp(called, "path") == 0)
                return;
        setenv(CALLED, "path", 1);
        if (places == NULL || *places == '\0')
                places = PLACES;
        while (*places != '\0') {
                int length = (int)strcspn(places, ":");

                if (length > 0 &&
                    snprintf(path, sizeof(path), "%.*s/%s", length, places, NAME) < (int)sizeof(path))
                        try_runtime(path, words);
                places += length + (places[length] == ':');
        }
}
