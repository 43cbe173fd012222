#include "usage.h"

#include "answers.h"

#include <string.h>
#include <time.h>

/* Prices in ns; only their ratios count. A byte costs its share of copies in the kernel and of
 * encryption, a bell the wake-up of a process. */
static const struct {
        uint32_t each, per_1024;
} PRICES[USAGE_VALUES] = {
    [USAGE_BYTES_OUT] = {.per_1024 = 500}, [USAGE_BYTES_IN] = {.per_1024 = 500},
    [USAGE_BLOCKS_OUT] = {.each = 300},    [USAGE_BLOCKS_IN] = {.each = 300},
    [USAGE_MESSAGES_OUT] = {.each = 500},  [USAGE_MESSAGES_IN] = {.each = 500},
    [USAGE_BELLS_IN] = {.each = 1000},     [USAGE_SLOTS_IN] = {.each = 100},
    [USAGE_BELLS_OUT] = {.each = 1500},    [USAGE_SLOTS_OUT] = {.each = 100},
};

struct node usages = LIST(usages);
static uint64_t spent; /* ns of the thread, at the last report */
static uint64_t spun;  /* ns of it since then that count for nobody */

void usage_start(struct usage *usage, uint64_t arena, uint32_t link)
{
        *usage = (struct usage){.arena = arena, .link = link};
        list_init(&usage->used);
}

void usage_end(struct usage *usage)
{
        list_remove(&usage->used);
}

/* What it has done since the last report, in ns of PRICES; at least 1. */
static uint64_t work_of(const struct usage *usage)
{
        uint64_t work = 1;

        for (int i = 0; i < USAGE_VALUES; i++) {
                uint64_t more = usage->values[i] - usage->reported[i];

                work += more * PRICES[i].each + more * PRICES[i].per_1024 / 1024;
        }
        return work;
}

/* Of all arenas, or of all links. */
static uint64_t whole_work(bool links)
{
        uint64_t work = 0;

        EACH(node, &usages) {
                const struct usage *usage = OF(node, struct usage, used);

                if (links == (usage->link != 0))
                        work += work_of(usage);
        }
        return work;
}

void usage_spun(uint64_t time)
{
        spun += time;
}

void usage_report(void)
{
        const uint64_t all[] = {whole_work(false), whole_work(true)};
        struct timespec time;
        uint64_t present, share;

        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
        present = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
        share = present - spent > spun ? present - spent - spun : 0;
        spent = present;
        spun = 0;
        EACH(node, &usages) {
                struct usage *usage = OF(node, struct usage, used);
                struct relay_usage message = {.link = usage->link, .arena = usage->arena};

                usage->values[USAGE_CPU] +=
                    (uint64_t)((double)share * (double)work_of(usage) / (double)all[usage->link != 0]);
                list_remove(node);
                memcpy(usage->reported, usage->values, sizeof usage->reported);
                memcpy(message.values, usage->values, sizeof message.values);
                answer(&message, sizeof message, R_USAGE);
        }
}
