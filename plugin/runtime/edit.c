/*
 * Changes of a container's configuration. Each step either succeeds or leads to an unchanged
 * start: whatever could make the runtime fail is found out before.
 */
#include "edit.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "document.h"
#include "host.h"
#include "rootfs.h"

static const char PRELOAD[] = "LD_PRELOAD=";

/*
 * The only variable of this name: its index, -1 if there is none, -2 if there are several, or
 * something that isn't text.
 */
static long variable(struct json_object *env, const char *name)
{
        long found = -1;

        for (size_t at = 0; at < json_object_array_length(env); at++) {
                const char *text = string_of(json_object_array_get_idx(env, at));

                if (text == NULL)
                        return -2;
                if (strncmp(text, name, strlen(name)) != 0)
                        continue;
                if (found >= 0)
                        return -2;
                found = (long)at;
        }
        return found;
}

static const char *value_at(struct json_object *env, long at)
{
        return strchr(string_of(json_object_array_get_idx(env, (size_t)at)), '=') + 1;
}

/* Whether the list of libraries names ours. The loader takes blanks as well as colons. */
static int names_library(const char *list)
{
        size_t length = strlen(LIBRARY);

        while (*list != '\0') {
                size_t word = strcspn(list, ": ");

                if (word == length && strncmp(list, LIBRARY, length) == 0)
                        return 1;
                list += word + (list[word] != '\0');
        }
        return 0;
}

int preloads_library(struct json_object *process)
{
        struct json_object *env = member(process, "env", json_type_array);
        long at = env != NULL ? variable(env, PRELOAD) : -1;

        return at >= 0 && names_library(value_at(env, at));
}

/* What a list takes of the room for a new program's arguments and variables (execve(2)). */
static size_t room(struct json_object *list)
{
        size_t sum = 0;

        for (size_t at = 0; list != NULL && at < json_object_array_length(list); at++)
                sum += json_object_get_string_len(json_object_array_get_idx(list, at)) + 1 + sizeof(char *);
        return sum;
}

/* Whether a program with this `process` starts with a longer list of variables, too. */
static int has_room(struct json_object *process)
{
        return room(member(process, "args", json_type_array)) +
                   room(member(process, "env", json_type_array)) <=
               MOST_ARGUMENTS;
}

static int turned_off(struct json_object *env)
{
        for (size_t at = 0; at < json_object_array_length(env); at++) {
                const char *text = string_of(json_object_array_get_idx(env, at));

                if (text != NULL && strcmp(text, "FREEFLOW=off") == 0)
                        return 1;
        }
        return 0;
}

static int same_path(const char *one, const char *two)
{
        size_t length = strlen(one);

        while (length > 1 && one[length - 1] == '/')
                length--;
        return strlen(two) == length && strncmp(one, two, length) == 0;
}

static int has_option(struct json_object *mount, const char *name)
{
        struct json_object *options = member(mount, "options", json_type_array);

        for (size_t at = 0; options != NULL && at < json_object_array_length(options); at++) {
                const char *text = string_of(json_object_array_get_idx(options, at));

                if (text != NULL && strcmp(text, name) == 0)
                        return 1;
        }
        return 0;
}

/*
 * Whether a mount of the user's is in the way. The runtime makes the directory for a mount: in a
 * folder of the user's, or in one that can't be written to, that does harm or fails.
 */
static int in_the_way(struct json_object *mount)
{
        static const char *const above[] = {"/", "/run", "/var", "/var/run"};
        const char *target = string_of(member(mount, "destination", json_type_string));
        const char *type = string_of(member(mount, "type", json_type_string));

        if (target == NULL || target[0] != '/' || strstr(target, "..") != NULL ||
            strstr(target, "//") != NULL)
                return 1;
        if (strncmp(target, FOLDER, strlen(FOLDER)) == 0 ||
            strncmp(target, "/var" FOLDER, strlen("/var" FOLDER)) == 0)
                return 1;
        for (size_t at = 0; at < sizeof(above) / sizeof(*above); at++) {
                if (same_path(target, above[at]))
                        return type == NULL || strcmp(type, "tmpfs") != 0 || has_option(mount, "ro");
        }
        return 0;
}

int mounts_library(struct json_object *config)
{
        struct json_object *mounts = member(config, "mounts", json_type_array);

        for (size_t at = 0; mounts != NULL && at < json_object_array_length(mounts); at++) {
                const char *target =
                    string_of(member(json_object_array_get_idx(mounts, at), "destination", json_type_string));

                if (target != NULL && same_path(target, FOLDER))
                        return 1;
        }
        return 0;
}

int accepts_library(struct json_object *config)
{
        struct json_object *mounts = member(config, "mounts", json_type_array);
        struct json_object *process = member(config, "process", json_type_object);
        struct json_object *env = member(process, "env", json_type_array);

        if (mounts == NULL || env == NULL || turned_off(env) || variable(env, PRELOAD) == -2 ||
            !has_room(process))
                return 0;
        for (size_t at = 0; at < json_object_array_length(mounts); at++) {
                if (in_the_way(json_object_array_get_idx(mounts, at)))
                        return 0;
        }
        return 1;
}

static int add_mount(struct json_object *config)
{
        /* The flags of the host's own mount, which a user namespace may not drop. */
        static const char *const names[] = {"rbind", "rprivate", "ro", "nosuid", "nodev"};
        struct json_object *mount = json_object_new_object(), *options = json_object_new_array();

        for (size_t at = 0; at < sizeof(names) / sizeof(*names); at++)
                json_object_array_add(options, json_object_new_string(names[at]));
        json_object_object_add(mount, "destination", json_object_new_string(FOLDER));
        json_object_object_add(mount, "type", json_object_new_string("bind"));
        json_object_object_add(mount, "source", json_object_new_string(host_path(FOLDER)));
        json_object_object_add(mount, "options", options);
        return json_object_array_add(member(config, "mounts", json_type_array), mount);
}

/*
 * Puts the library behind what is preloaded, which may wrap the same calls: it sees those of the
 * program, as ever, and none of the library's own. Returns 0 or -1.
 */
static int preload(struct json_object *env, long at)
{
        const char *before = at >= 0 ? value_at(env, at) : "";
        struct json_object *text;
        char *joined;

        if (names_library(before))
                return 0;
        if (asprintf(&joined, "%s%s%s%s", PRELOAD, before, *before != '\0' ? ":" : "", LIBRARY) < 0)
                return -1;
        text = json_object_new_string(joined);
        free(joined);
        if (text == NULL)
                return -1;
        return at >= 0 ? json_object_array_put_idx(env, (size_t)at, text) : json_object_array_add(env, text);
}

static int add_preload(struct json_object *config)
{
        struct json_object *env = member(member(config, "process", json_type_object), "env", json_type_array);

        return preload(env, variable(env, PRELOAD));
}

/*
 * What a container gets, in this order. A launcher in front of its program would be a further
 * step, which changes `process.args`.
 */
static int (*const steps[])(struct json_object *config) = {add_mount, add_preload};

int add_library(struct json_object *config, int bundle)
{
        struct json_object *root = member(config, "root", json_type_object);
        const char *path = string_of(member(root, "path", json_type_string));

        if (path == NULL || !prepare_rootfs(bundle, path))
                return -1;
        for (size_t at = 0; at < sizeof(steps) / sizeof(*steps); at++) {
                if (steps[at](config) != 0)
                        return -1;
        }
        return 0;
}

int add_variable(struct json_object *process)
{
        struct json_object *env = member(process, "env", json_type_array);
        long at;

        if (env == NULL || turned_off(env) || (at = variable(env, PRELOAD)) == -2 || !has_room(process))
                return 0;
        /* An empty value is a user's `docker exec --env LD_PRELOAD=`. */
        if (at >= 0 && (*value_at(env, at) == '\0' || names_library(value_at(env, at))))
                return 0;
        return preload(env, at) == 0;
}
