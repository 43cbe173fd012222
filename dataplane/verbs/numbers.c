#include "numbers.h"

#include "mutex.h"

#include <stdlib.h>

struct range {
        uint32_t first, count;
        uint32_t next;
        uint32_t used; /* none behind these has ever been given */
        void **owners;
};

static struct mutex mutex;
static struct range ranges[NUMBER_RANGES];

static struct range *range_of(uint32_t number)
{
        for (int i = 0; i < NUMBER_RANGES; i++)
                if (number - ranges[i].first < ranges[i].count)
                        return &ranges[i];
        return NULL;
}

bool numbers_add(uint32_t first, uint32_t count)
{
        bool added = false;

        if (!first || !count || count > NUMBERS)
                return false;
        mutex_take(&mutex);
        for (int i = 0; i < NUMBER_RANGES && !added; i++) {
                struct range *range = &ranges[i];

                if (range->count && range->first == first) {
                        added = true;
                } else if (!range->count) {
                        range->owners = calloc(count, sizeof *range->owners);
                        range->first = first;
                        range->count = range->owners ? count : 0;
                        added = range->count;
                        break;
                }
        }
        mutex_release(&mutex);
        return added;
}

static uint32_t take_from(struct range *range, void *owner)
{
        for (uint32_t tries = 0; tries < range->count; tries++) {
                uint32_t place = range->next++ % range->count;

                if (range->owners[place])
                        continue;
                range->owners[place] = owner;
                range->used = place < range->used ? range->used : place + 1;
                return range->first + place;
        }
        return 0;
}

uint32_t number_take(void *owner)
{
        uint32_t number = 0;

        mutex_take(&mutex);
        for (int i = 0; i < NUMBER_RANGES && !number; i++)
                number = take_from(&ranges[i], owner);
        mutex_release(&mutex);
        return number;
}

void number_return(uint32_t number)
{
        struct range *range;

        mutex_take(&mutex);
        range = range_of(number);
        if (range)
                range->owners[number - range->first] = NULL;
        mutex_release(&mutex);
}

void numbers_forget(void)
{
        mutex = (struct mutex){0};
        for (int i = 0; i < NUMBER_RANGES; i++)
                ranges[i] = (struct range){0};
}

bool number_use(uint32_t number, void (*use)(void *owner, void *argument), void *argument)
{
        struct range *range;
        void *owner = NULL;

        mutex_take(&mutex);
        range = range_of(number);
        if (range)
                owner = range->owners[number - range->first];
        if (owner)
                use(owner, argument);
        mutex_release(&mutex);
        return owner;
}

void numbers_each(void (*use)(void *owner, void *argument), void *argument)
{
        mutex_take(&mutex);
        for (int i = 0; i < NUMBER_RANGES; i++)
                for (uint32_t j = 0; j < ranges[i].used; j++)
                        if (ranges[i].owners[j])
                                use(ranges[i].owners[j], argument);
        mutex_release(&mutex);
}
