/* What happens when the library is loaded into a program, and when the program ends. */
#include "arena.h"
#include "family.h"
#include "hooks.h"
#include "poller.h"
#include "requests.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"
#include "verbs_client.h"

#include <string.h>

static void forked(void)
{
        arena_forked();
        poller_forked();
        router_forked();
        verbs_forked();
}

static void descriptors_lost(void)
{
        bells_lost();
        verbs_descriptors_lost();
}

static void received(const void *message, size_t size, int *descriptors, int count)
{
        if (verbs_is_kind(message))
                verbs_received(message, size, descriptors, count);
        else
                request_received(message, size, descriptors, count);
        for (int i = 0; i < count; i++)
                if (descriptors[i] >= 0)
                        bell_discard(descriptors[i]);
}

const struct hooks hooks = {.forks = verbs_fork,
                            .fork_done = verbs_fork_done,
                            .forked = forked,
                            .descriptors_lost = descriptors_lost,
                            .received = received};

__attribute__((constructor)) static void start(void)
{
        const char *off = environment("FREEFLOW");
        const char *loopback = environment("FREEFLOW_LOOPBACK");
        const char *restless = environment("FREEFLOW_RESTLESS");
        char *place;

        if (off && strcmp(off, "off") == 0)
                return;
        process.restless = restless && strcmp(restless, "1") == 0;
        process.loopback = loopback && strcmp(loopback, "1") == 0;
        place = family_reserve(poller_memory());
        if (!place)
                return;
        poller_start_ends(&place);
        family_start(&place);
        poller_start(&place);
        process.on = true;
}

__attribute__((destructor)) static void end(void)
{
        if (process.on)
                statistics_report();
}
