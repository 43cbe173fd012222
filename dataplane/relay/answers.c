#include "answers.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

struct waiting {
        struct waiting *next;
        size_t size;
        void *data;
};

static struct watch router = {.fd = RELAY_SOCKET};
static bool closed;
static struct waiting *first, **last = &first;

void answers_start(void (*readable)(struct watch *watch, uint32_t events))
{
        router.call = readable;
        if (!watch_add(&router, EPOLLIN))
                relay_die("descriptor 3, the router's socket", errno);
}

void answers_close(void)
{
        watch_remove(&router);
        closed = true;
}

bool router_is_connected(void)
{
        return !closed;
}

bool answers_have_room(void)
{
        return !first;
}

/* False: the socket is full. */
static bool send_now(const void *data, size_t size)
{
        ssize_t sent = send(router.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);

        count(COUNT_CALLS, 1);
        /* Any other error means that the router is gone; the next read reports that. */
        return sent >= 0 || (errno != EAGAIN && errno != EINTR && errno != ENOBUFS);
}

/* It may contain a link's key. */
static void wipe(void *data, size_t size)
{
        explicit_bzero(data, size);
        free(data);
}

void answers_flush(void)
{
        while (first && send_now(first->data, first->size)) {
                struct waiting *done = first;

                first = done->next;
                wipe(done->data, done->size);
                free(done);
        }
        if (first)
                return;
        last = &first;
        watch_add(&router, EPOLLIN);
}

/* Frees `data` once it is written. */
static void send_or_wait(void *data, size_t size)
{
        struct waiting *waiting;

        if (!first && send_now(data, size)) {
                wipe(data, size);
                return;
        }
        waiting = relay_memory(sizeof *waiting, "memory for an answer");
        *waiting = (struct waiting){.size = size, .data = data};
        if (!first)
                watch_add(&router, EPOLLIN | EPOLLOUT);
        *last = waiting;
        last = &waiting->next;
}

void answer(const void *message, size_t size, enum relay_kind kind)
{
        struct relay_message *copy = relay_memory(size, "memory for an answer");

        memcpy(copy, message, size);
        copy->kind = (uint16_t)kind;
        copy->size = (uint16_t)size;
        send_or_wait(copy, size);
}

void answer_number(enum relay_kind kind, uint32_t number, uint32_t state)
{
        const struct relay_number message = {.number = number, .state = state};

        answer(&message, sizeof message, kind);
}

void answer_outcome(enum relay_kind kind, uint32_t number, int error, const char *text)
{
        struct relay_outcome message = {.number = number, .error = error};

        snprintf(message.text, RELAY_TEXT, "%s", text);
        answer(&message, sizeof message, kind);
}

void answer_frame(struct relay_frame *frame, uint32_t size)
{
        frame->message.kind = R_FRAME;
        frame->message.size = (uint16_t)(sizeof *frame + size);
        count(COUNT_FRAMES_OUT, 1);
        send_or_wait(frame, sizeof *frame + size);
}
