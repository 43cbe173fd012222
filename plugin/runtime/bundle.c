/*
 * Reads and replaces the files that the runtime gets: config.json in a container's bundle, and
 * the description of a further program. Whatever is not as expected stays as it is.
 */
#include "bundle.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "container.h"
#include "document.h"
#include "edit.h"
#include "host.h"
#include "plain_file.h"
#include "question.h"

static const char CONFIG[] = "config.json";

static int library_exists(void)
{
        struct stat status;

        return stat(host_path(LIBRARY), &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0;
}

/* Whether the container is to have the library. */
static int wanted(struct json_object *config, const char *id)
{
        struct json_object *networks;
        int answer;

        if (!accepts_library(config) || (networks = networks_of(config, id)) == NULL)
                return 0;
        answer = is_accelerated(networks);
        json_object_put(networks);
        return answer;
}

static void replace_json(int folder, const char *name, struct json_object *value, const struct stat *before)
{
        size_t length;
        const char *text = json_text(value, &length);

        if (text != NULL && length <= MOST_BYTES)
                replace_text(folder, name, text, length, before);
}

void prepare_container(const struct arguments *arguments)
{
        int bundle = open(arguments->bundle, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        struct text text;
        struct json_object *config;

        if (bundle < 0)
                return;
        if (library_exists()) {
                text = read_text(bundle, CONFIG, 0);
                config = text.bytes != NULL ? parse_exactly(text.bytes, text.length) : NULL;
                if (config != NULL && wanted(config, arguments->id) && add_library(config, bundle) == 0)
                        replace_json(bundle, CONFIG, config, &text.status);
                json_object_put(config);
                free(text.bytes);
        }
        close(bundle);
}

/* Whether the bundle in this folder is the container's, and its configuration has the library. */
static int prepared_in(const char *folder, const char *id)
{
        char path[PATH_MAX];
        struct json_object *config;
        struct text text;
        int descriptor, answer;

        if (realpath(folder, path) == NULL || strcmp(strrchr(path, '/') + 1, id) != 0)
                return 0;
        descriptor = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (descriptor < 0)
                return 0;
        text = read_text(descriptor, CONFIG, 0);
        close(descriptor);
        config = text.bytes != NULL ? parse_json(text.bytes, text.length) : NULL;
        answer = mounts_library(config) && preloads_library(member(config, "process", json_type_object));
        json_object_put(config);
        free(text.bytes);
        return answer;
}

int is_prepared(const struct arguments *arguments)
{
        char folder[PATH_MAX];
        const char *end;

        /*
         * containerd's shim works in the bundle, and has the log in it. The bundle's name is the
         * ID.
         */
        if (prepared_in(".", arguments->id))
                return 1;
        if (arguments->log == NULL || (end = strrchr(arguments->log, '/')) == NULL ||
            (size_t)(end - arguments->log) >= sizeof(folder))
                return 0;
        memcpy(folder, arguments->log, (size_t)(end - arguments->log));
        folder[end - arguments->log] = '\0';
        return prepared_in(folder, arguments->id);
}

void prepare_program(const struct arguments *arguments)
{
        struct json_object *process;
        struct text text;

        if (arguments->process == NULL || !library_exists() || !is_prepared(arguments))
                return;
        text = read_text(AT_FDCWD, arguments->process, 1);
        process = text.bytes != NULL ? parse_exactly(text.bytes, text.length) : NULL;
        if (process != NULL && add_variable(process))
                replace_json(AT_FDCWD, arguments->process, process, &text.status);
        json_object_put(process);
        free(text.bytes);
}
