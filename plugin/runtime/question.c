/*
 * Which networks are FreeFlow's.
 *
 * The plugin keeps a list of its networks in a file, which answers most starts without any other
 * process, also while the plugin is busy or restarts. A network that is not in it may be known by
 * another name, or be new to this host: that is asked on the plugin's admin socket, and without
 * an answer in time the container starts as it is. Only root can open either.
 */
#include "question.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "document.h"
#include "host.h"
#include "plain_file.h"

static const char *field(struct json_object *networks, size_t at, const char *name)
{
        const char *text = string_of(member(json_object_array_get_idx(networks, at), name, json_type_string));

        return text != NULL ? text : "";
}

/* Whether the plugin's list has one of the networks, by ID or by name. */
static int listed(struct json_object *networks)
{
        struct text text = read_text(AT_FDCWD, host_path(NETWORKS), 1);
        struct json_object *list = text.bytes != NULL ? parse_json(text.bytes, text.length) : NULL;
        struct json_object *known = member(list, "networks", json_type_object);
        int found = 0;

        for (size_t at = 0; known != NULL && !found && at < json_object_array_length(networks); at++) {
                const char *id = field(networks, at, "id"), *name = field(networks, at, "name");

                found = json_object_object_get_ex(known, id, NULL) ||
                        json_object_object_get_ex(known, name, NULL);
                json_object_object_foreach(known, unused, value)
                {
                        (void)unused;
                        found = found || (name[0] != '\0' && string_of(value) != NULL &&
                                          strcmp(string_of(value), name) == 0);
                }
        }
        json_object_put(list);
        free(text.bytes);
        return found;
}

/* Networks that every engine has. */
static int built_in(const char *name)
{
        static const char *const names[] = {"bridge", "default", "docker_gwbridge",
                                            "host",   "ingress", "none"};

        for (size_t at = 0; at < sizeof(names) / sizeof(*names); at++) {
                if (strcmp(name, names[at]) == 0)
                        return 1;
        }
        return 0;
}

static int worth_asking(struct json_object *networks)
{
        for (size_t at = 0; at < json_object_array_length(networks); at++) {
                if (!built_in(field(networks, at, "name")))
                        return 1;
        }
        return 0;
}

static long now_milliseconds(void)
{
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Waits until the socket has an event, at most until `deadline`. */
static int await(int descriptor, short event, long deadline)
{
        struct pollfd wanted = {.fd = descriptor, .events = event};
        long left = deadline - now_milliseconds();

        return left > 0 && poll(&wanted, 1, (int)left) == 1;
}

/* Sends the request, and reads the answer up to its end. Returns its length, or 0. */
static size_t exchange(int descriptor, const char *request, size_t length, char answer[MOST_ANSWER])
{
        long deadline = now_milliseconds() + patience(QUESTION_MILLISECONDS);
        size_t got = 0;

        while (length > 0) {
                ssize_t sent = send(descriptor, request, length, MSG_NOSIGNAL);

                if (sent < 0 && (errno != EAGAIN || !await(descriptor, POLLOUT, deadline)))
                        return 0;
                if (sent > 0) {
                        request += sent;
                        length -= (size_t)sent;
                }
        }
        while (got < MOST_ANSWER - 1) {
                ssize_t more = recv(descriptor, answer + got, MOST_ANSWER - 1 - got, 0);

                if (more == 0)
                        return got;
                if (more < 0 && (errno != EAGAIN || !await(descriptor, POLLIN, deadline)))
                        return 0;
                if (more > 0)
                        got += (size_t)more;
        }
        return 0;
}

static int connect_plugin(void)
{
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        const char *path = host_path(ADMIN_SOCKET);
        int descriptor;

        if (strlen(path) >= sizeof(address.sun_path))
                return -1;
        strcpy(address.sun_path, path);
        descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (descriptor >= 0 && connect(descriptor, (struct sockaddr *)&address, sizeof(address)) != 0) {
                close(descriptor);
                return -1;
        }
        return descriptor;
}

/* Whether an HTTP answer is 200 with {"accelerated": true}. */
static int positive(const char *answer, size_t length)
{
        const char *body = memmem(answer, length, "\r\n\r\n", 4);
        struct json_object *value, *found = NULL;
        int accelerated;

        if (body == NULL || length < 12 || memcmp(answer, "HTTP/1.", 7) != 0 ||
            memcmp(answer + 8, " 200", 4) != 0)
                return 0;
        body += 4;
        value = parse_json(body, length - (size_t)(body - answer));
        found = member(value, "accelerated", json_type_boolean);
        accelerated = found != NULL && json_object_get_boolean(found);
        json_object_put(value);
        return accelerated;
}

/* Asks the plugin (plugin/admin.py, POST /admin/runtime). */
static int asked(struct json_object *networks)
{
        char request[MOST_ANSWER + 256], answer[MOST_ANSWER];
        size_t length;
        const char *body = json_text(networks, &length);
        int descriptor, head;

        if (body == NULL || length + strlen("{\"networks\":}") > MOST_ANSWER)
                return 0;
        head = snprintf(request, sizeof(request),
                        "POST /admin/runtime HTTP/1.0\r\nContent-Type: application/json\r\n"
                        "Content-Length: %zu\r\n\r\n{\"networks\":%s}",
                        length + strlen("{\"networks\":}"), body);
        if (head < 0 || head >= (int)sizeof(request) || (descriptor = connect_plugin()) < 0)
                return 0;
        length = exchange(descriptor, request, (size_t)head, answer);
        close(descriptor);
        return length > 0 && positive(answer, length);
}

int is_accelerated(struct json_object *networks)
{
        return listed(networks) || (worth_asking(networks) && asked(networks));
}
