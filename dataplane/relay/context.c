#include "context.h"

#include "../library/settings.h"

#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>

enum {
        EVENTS = 64,
        DRAIN = 2000, /* ms for all connections to fall back to TCP when the relay stops */
};

struct relay relay = {.epoll = -1};
struct settings settings;

/* Events of the last epoll_wait() that have not been handled yet. */
static struct epoll_event pending[EVENTS];
static int pending_count;

void relay_die(const char *what, int error)
{
        fprintf(stderr, "freeflow-relay: %s: %s\n", what, strerror(error));
        exit(1);
}

void *relay_memory(size_t size, const char *what)
{
        void *memory = calloc(1, size);

        if (!memory)
                relay_die(what, ENOMEM);
        return memory;
}

int relay_refuse(char *text, int error, const char *format, ...)
{
        va_list list;

        va_start(list, format);
        vsnprintf(text, RELAY_TEXT, format, list);
        va_end(list);
        return error;
}

uint64_t relay_random(void)
{
        uint64_t number;

        while (getrandom(&number, sizeof number, 0) != (ssize_t)sizeof number)
                ;
        return number;
}

void context_start(void)
{
        relay.epoll = epoll_create1(EPOLL_CLOEXEC);
        if (relay.epoll < 0)
                relay_die("epoll", errno);
}

bool watch_add(struct watch *watch, uint32_t events)
{
        struct epoll_event event = {.events = events, .data.ptr = watch};

        count(COUNT_CALLS, 1);
        return epoll_ctl(relay.epoll, EPOLL_CTL_ADD, watch->fd, &event) == 0 ||
               (errno == EEXIST && epoll_ctl(relay.epoll, EPOLL_CTL_MOD, watch->fd, &event) == 0);
}

void watch_remove(struct watch *watch)
{
        for (int i = 0; i < pending_count; i++)
                if (pending[i].data.ptr == watch)
                        pending[i].data.ptr = NULL;
        if (watch->fd >= 0)
                epoll_ctl(relay.epoll, EPOLL_CTL_DEL, watch->fd, NULL);
}

bool watches_poll(int timeout)
{
        int got = epoll_wait(relay.epoll, pending, EVENTS, timeout);

        count(COUNT_CALLS, 1);
        pending_count = got > 0 ? got : 0;
        for (int i = 0; i < pending_count; i++) {
                struct watch *watch = pending[i].data.ptr;

                /* NULL: removed by the handler of an earlier event. */
                if (watch)
                        watch->call(watch, pending[i].events);
        }
        pending_count = 0;
        return got > 0;
}

/* Spinning on the only core would keep it from the processes that the relay waits for. */
static bool has_cores(void)
{
        cpu_set_t set;

        return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 1;
}

void relay_set_spin(uint32_t time, bool yields)
{
        relay.yields = yields;
        settings.spin = has_cores() ? time : 0;
}

void relay_stop(void)
{
        if (!relay.stop_at)
                relay.stop_at = now() + DRAIN * UINT64_C(1000000);
}
