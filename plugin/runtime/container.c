/*
 * Which networks a container gets, from Docker's own files.
 *
 * When the runtime is called, Docker may not have told the network driver of the container yet:
 * engines from 28.1 on join networks when the runtime has created the namespaces. But dockerd has
 * written containers/ID/config.v2.json when the container was created (container/container.go,
 * toDisk), with the names of its networks, and it mounts files of that folder at /etc/hosts,
 * /etc/hostname and /etc/resolv.conf. IDs are there for tasks of Swarm and from the second start
 * on.
 *
 * A container that shares the network of another (`--network container:…`) gets the other's
 * files, so they lead to the right networks; the label is always its own.
 */
#include "container.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "document.h"
#include "host.h"
#include "plain_file.h"

enum { ID_LENGTH = 64 };

static int is_id(const char *text, size_t length)
{
        return length == ID_LENGTH && strspn(text, "0123456789abcdef") >= ID_LENGTH;
}

/*
 * If `source` is DATA_ROOT/containers/ID/NAME, copies DATA_ROOT/containers into `folder`, ID into
 * `id`, and returns 1.
 */
static int split_source(const char *source, const char *name, char folder[PATH_MAX], char id[ID_LENGTH + 1])
{
        const char *last = strrchr(source, '/'), *before = last;
        size_t length;

        if (source[0] != '/' || strcmp(last + 1, name) != 0)
                return 0;
        while (before > source && before[-1] != '/')
                before--;
        if (!is_id(before, (size_t)(last - before)))
                return 0;
        length = (size_t)(before - source) - 1;
        if (length >= PATH_MAX || length < strlen("/containers") ||
            strncmp(source + length - strlen("/containers"), "/containers", strlen("/containers")) != 0)
                return 0;
        memcpy(folder, source, length);
        folder[length] = '\0';
        memcpy(id, before, ID_LENGTH);
        id[ID_LENGTH] = '\0';
        return 1;
}

/* Finds the folder of all containers, and the ID of the one whose network this one uses. */
static int find_files(struct json_object *config, char folder[PATH_MAX], char id[ID_LENGTH + 1])
{
        static const char *const names[] = {"hosts", "hostname", "resolv.conf"};
        struct json_object *mounts = member(config, "mounts", json_type_array);
        size_t count = mounts != NULL ? json_object_array_length(mounts) : 0;

        for (size_t at = 0; at < count; at++) {
                struct json_object *each = json_object_array_get_idx(mounts, at);
                const char *source = string_of(member(each, "source", json_type_string));
                const char *target = string_of(member(each, "destination", json_type_string));

                if (source == NULL || target == NULL || strncmp(target, "/etc/", 5) != 0)
                        continue;
                for (size_t name = 0; name < sizeof(names) / sizeof(*names); name++) {
                        if (strcmp(target + 5, names[name]) == 0 &&
                            split_source(source, names[name], folder, id))
                                return 1;
                }
        }
        return 0;
}

/* What dockerd has written of a container, or NULL. Only root may be able to write it. */
static struct json_object *described(const char *containers, const char *id)
{
        struct json_object *value = NULL;
        char folder[PATH_MAX];
        struct text text;
        int descriptor;

        if (snprintf(folder, sizeof(folder), "%s/%s", containers, id) >= (int)sizeof(folder))
                return NULL;
        descriptor = open(folder, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (descriptor < 0)
                return NULL;
        text = read_text(descriptor, "config.v2.json", 1);
        close(descriptor);
        if (text.bytes != NULL)
                value = parse_json(text.bytes, text.length);
        free(text.bytes);
        return value;
}

static int opted_out(struct json_object *container)
{
        struct json_object *config = member(container, "Config", json_type_object);
        struct json_object *labels = member(config, "Labels", json_type_object);
        const char *label = string_of(member(labels, "freeflow.accelerate", json_type_string));

        /* Readers of YAML make false of an off without quotes. */
        return label != NULL && (strcasecmp(label, "off") == 0 || strcasecmp(label, "false") == 0);
}

static struct json_object *list_networks(struct json_object *container)
{
        struct json_object *settings = member(container, "NetworkSettings", json_type_object);
        struct json_object *networks = member(settings, "Networks", json_type_object);
        struct json_object *list;

        if (networks == NULL || json_object_object_length(networks) > MOST_NETWORKS ||
            (list = json_object_new_array()) == NULL)
                return NULL;
        json_object_object_foreach(networks, name, value)
        {
                const char *id = string_of(member(value, "NetworkID", json_type_string));
                struct json_object *each = json_object_new_object();

                json_object_object_add(each, "name", json_object_new_string(name));
                json_object_object_add(each, "id", json_object_new_string(id != NULL ? id : ""));
                json_object_array_add(list, each);
        }
        return list;
}

struct json_object *networks_of(struct json_object *config, const char *id)
{
        char containers[PATH_MAX], owner[ID_LENGTH + 1];
        struct json_object *container, *networks = NULL;

        if (!is_id(id, strlen(id)) || !find_files(config, containers, owner))
                return NULL;
        container = described(containers, id);
        if (container == NULL || opted_out(container)) {
                json_object_put(container);
                return NULL;
        }
        if (strcmp(owner, id) != 0) {
                json_object_put(container);
                container = described(containers, owner);
        }
        if (container != NULL)
                networks = list_networks(container);
        json_object_put(container);
        return networks;
}
