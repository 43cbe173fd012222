/* The keys of memory alone: `keys.h` without queue pairs.
 *
 *      keys rules
 *      keys race SECONDS SEED
 *
 * race: some threads use keys while others add and remove them. Nobody touches memory whose key is
 * removed, and no key leads to another region than its own.
 */
#include "../../dataplane/verbs/keys.c"
#include "../dataplane/check.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { REGIONS = 64, USERS = 2, LENGTH = 4096, DOMAIN = 7 };

static struct keys keys;
static time_t end;

/* --- rules */

static unsigned char memory[LENGTH];

static struct key_entry region_with(uint32_t access)
{
        return (struct key_entry){
            .base = 1000, .length = LENGTH, .first = memory, .access = access, .domain = DOMAIN};
}

static enum key_outcome hold(struct key_use use)
{
        unsigned char *first = NULL;
        enum key_outcome outcome = key_hold(&keys, &use, &first);

        CHECK((outcome == KEY_HELD) == (first != NULL));
        if (outcome == KEY_HELD) {
                CHECK(first == memory + (use.address - 1000));
                key_release(&keys, use.key);
        }
        return outcome;
}

static void check_uses(void)
{
        struct key_entry region = region_with(KEY_REMOTE_READ | KEY_REMOTE_WRITE | KEY_LOCAL_WRITE);
        uint32_t key = key_add_region(&keys, &region);
        struct key_use use = {.key = key,
                              .domain = DOMAIN,
                              .queue = 3,
                              .access = KEY_REMOTE_READ,
                              .address = 1000,
                              .length = 1};

#define GIVES(outcome, ...)                                                                                  \
        do {                                                                                                 \
                struct key_use other = use;                                                                  \
                __VA_ARGS__;                                                                                 \
                CHECK(hold(other) == (outcome));                                                             \
        } while (0)

        CHECK(key);
        GIVES(KEY_HELD, );
        GIVES(KEY_HELD, other.length = LENGTH);
        GIVES(KEY_HELD, other.address += LENGTH - 1);
        GIVES(KEY_HELD, other.access = KEY_LOCAL_READ);
        GIVES(KEY_HELD, other.access = KEY_REMOTE_READ | KEY_REMOTE_WRITE);
        GIVES(KEY_UNKNOWN, other.key = 0);
        GIVES(KEY_UNKNOWN, other.key++);
        GIVES(KEY_UNKNOWN, other.key--);
        GIVES(KEY_UNKNOWN, other.key += UINT32_C(1) << KEY_GENERATION_BITS);
        GIVES(KEY_UNKNOWN, other.key = UINT32_MAX);
        GIVES(KEY_FORBIDDEN, other.domain++);
        GIVES(KEY_FORBIDDEN, other.access = KEY_REMOTE_ATOMIC);
        GIVES(KEY_FORBIDDEN, other.access = KEY_REMOTE_ATOMIC | KEY_REMOTE_READ);
        GIVES(KEY_OUTSIDE, other.length = LENGTH + 1);
        GIVES(KEY_OUTSIDE, other.length = UINT64_MAX);
        GIVES(KEY_OUTSIDE, other.address--);
        GIVES(KEY_OUTSIDE, other.address += LENGTH);
        GIVES(KEY_OUTSIDE, (other.address += 8, other.length = UINT64_MAX - 7));
        GIVES(KEY_OUTSIDE, (other.address = UINT64_MAX, other.length = 2));
        GIVES(KEY_OUTSIDE, (other.address = 0, other.length = UINT64_MAX));
        /* The same key for another region. */
        region.access = KEY_REMOTE_READ;
        region.length = 10;
        CHECK(key_change_region(&keys, key, &region) && !key_change_region(&keys, key + 1, &region));
        GIVES(KEY_HELD, other.length = 10);
        GIVES(KEY_OUTSIDE, other.length = 11);
        GIVES(KEY_FORBIDDEN, other.access = KEY_REMOTE_WRITE);
        CHECK(key_remove_region(&keys, key) && !key_remove_region(&keys, key) &&
              !key_remove_region(&keys, 0));
        CHECK(!key_change_region(&keys, key, &region));
        GIVES(KEY_UNKNOWN, );
}

static void check_windows(void)
{
        struct key_entry region = region_with(KEY_REMOTE_READ | KEY_LOCAL_WRITE | KEY_BIND);
        uint32_t parent = key_add_region(&keys, &region), key, first;
        struct key_entry window = {.base = 1100,
                                   .access = KEY_REMOTE_WRITE | KEY_BIND | KEY_LOCAL_WRITE,
                                   .domain = DOMAIN,
                                   .queue = 3};
        struct key_use part = {
            .key = parent, .domain = DOMAIN, .access = KEY_BIND, .address = 1100, .length = 50};
        struct key_use use;

        first = key_add_window(&keys);
        CHECK(first && !(first & 255));
        use = (struct key_use){.key = first,
                               .domain = DOMAIN,
                               .queue = 3,
                               .access = KEY_REMOTE_WRITE,
                               .address = 1100,
                               .length = 50};
        GIVES(KEY_UNKNOWN, );
        CHECK(!key_unbind(&keys, first) && !key_remove_region(&keys, first));
        use.key = key = first | 0x5a;
        /* The bits above the program's are not its to choose, nor is the place. */
        CHECK(!key_bind(&keys, key + 256, &window, &part) && !key_bind(&keys, parent, &window, &part));
        CHECK(!key_bind(&keys, key + (1 << KEY_GENERATION_BITS), &window, &part));
        CHECK(!key_bind(&keys, 0, &window, &part));
        CHECK(key_bind(&keys, key, &window, &part));
        GIVES(KEY_HELD, );
        GIVES(KEY_UNKNOWN, other.key = first);
        GIVES(KEY_FORBIDDEN, other.queue = 4);
        GIVES(KEY_FORBIDDEN, other.access = KEY_REMOTE_READ);
        GIVES(KEY_FORBIDDEN, other.access = KEY_BIND);
        GIVES(KEY_FORBIDDEN, other.access = KEY_LOCAL_WRITE);
        GIVES(KEY_OUTSIDE, other.address--);
        GIVES(KEY_OUTSIDE, other.length++);
        CHECK(key_is_bound(&keys, key, DOMAIN, 3) && !key_is_bound(&keys, key, DOMAIN, 4));
        CHECK(!key_is_bound(&keys, key, DOMAIN + 1, 3) && !key_is_bound(&keys, parent, DOMAIN, 3));
        /* It is bound once, there is no window in a window, and a region with windows stays. */
        CHECK(!key_bind(&keys, first | 1, &window, &part));
        CHECK(!key_bind(&keys, key_add_window(&keys), &window,
                        &(struct key_use){.key = key,
                                          .domain = DOMAIN,
                                          .queue = 3,
                                          .access = KEY_REMOTE_WRITE,
                                          .address = 1100,
                                          .length = 10}));
        key_remove_window(&keys, ((key >> KEY_GENERATION_BITS) + 1) << KEY_GENERATION_BITS);
        CHECK(!key_remove_region(&keys, parent) && !key_remove_region(&keys, key));
        CHECK(!key_change_region(&keys, parent, &region) && !key_change_region(&keys, key, &region));
        CHECK(!key_unbind(&keys, first) && !key_unbind(&keys, parent) && key_unbind(&keys, key));
        GIVES(KEY_UNKNOWN, );
        CHECK(key_remove_region(&keys, parent));
        /* An address of its own: from 0 on. */
        part.key = parent = key_add_region(&keys, &region);
        window.base = 0;
        CHECK(key_bind(&keys, use.key = first | 7, &window, &part));
        use.address = 0;
        CHECK(key_hold(&keys, &use, &region.first) == KEY_HELD && region.first == memory + 100);
        key_release(&keys, use.key);
        /* A bound window is removed; a region in its place gets none of its keys. */
        key_remove_window(&keys, first);
        CHECK(key_hold(&keys, &use, &region.first) == KEY_UNKNOWN);
        keys.next = first >> KEY_GENERATION_BITS;
        key = key_add_region(&keys, &region);
        CHECK(key >> KEY_GENERATION_BITS == first >> KEY_GENERATION_BITS && key >> 8 != first >> 8);
        CHECK(key_remove_region(&keys, key) && key_remove_region(&keys, parent));
}

/* What a region allows a window. */
static void check_window_access(void)
{
        static const struct {
                uint32_t region, use, window;
                bool bound;
        } cases[] = {
            {KEY_REMOTE_READ | KEY_BIND, KEY_BIND, KEY_REMOTE_WRITE, false},
            {KEY_REMOTE_READ | KEY_BIND, KEY_BIND, KEY_REMOTE_ATOMIC, false},
            {KEY_REMOTE_READ | KEY_BIND, KEY_BIND, KEY_REMOTE_READ, true},
            {KEY_BIND, KEY_BIND, KEY_REMOTE_READ, true},
            {KEY_BIND | KEY_LOCAL_WRITE, KEY_BIND, KEY_REMOTE_WRITE, true},
            {KEY_LOCAL_WRITE | KEY_REMOTE_READ, KEY_BIND, KEY_REMOTE_READ, false},
            {KEY_LOCAL_WRITE | KEY_REMOTE_READ, KEY_REMOTE_READ, KEY_REMOTE_READ, false},
        };

        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
                struct key_entry region = region_with(cases[i].region);
                uint32_t parent = key_add_region(&keys, &region), key = key_add_window(&keys);
                struct key_entry window = {.base = 1100, .access = cases[i].window, .domain = DOMAIN};
                struct key_use part = {
                    .key = parent, .domain = DOMAIN, .access = cases[i].use, .address = 1100, .length = 50};

                CHECK(key_bind(&keys, key, &window, &part) == cases[i].bound);
                key_remove_window(&keys, key);
                CHECK(key_remove_region(&keys, parent));
        }
}

/* At the limit there is no key; a place is used again with another one, and never 0. */
static void check_places(void)
{
        struct key_entry region = region_with(0);
        uint32_t made[REGIONS], key;

        for (int i = 0; i < REGIONS; i++)
                CHECK((made[i] = key_add_region(&keys, &region)));
        CHECK(!key_add_region(&keys, &region));
        for (int i = 0; i < REGIONS; i++)
                CHECK(key_remove_region(&keys, made[i]));
        CHECK(!keys.count);
        for (uint32_t i = 0; i < 3 * (UINT32_C(1) << KEY_GENERATION_BITS); i++) {
                keys.next = 0;
                key = key_add_region(&keys, &region);
                CHECK(key && key != made[0] && key >> KEY_GENERATION_BITS == 0);
                made[0] = key;
                CHECK(key_remove_region(&keys, key));
        }
        for (uint32_t i = 0; i < 300; i++) {
                keys.next = KEY_PLACES - 1;
                key = key_add_region(&keys, &region);
                CHECK(key && key_remove_region(&keys, key));
        }
}

/* --- race */

/* Regions, whose memory holds their numbers. */
static struct {
        _Atomic uint32_t key;
        uint64_t memory[8]; /* not atomic: a sanitizer sees who touches it too late */
} regions[REGIONS];

static _Atomic uint32_t users; /* that have used a key */

static void *use_keys(void *argument)
{
        uint64_t random = seed + (uintptr_t)argument, used = 0;

        while (time(NULL) < end || !used)
                for (int i = 0; i < 1000; i++) {
                        uint64_t number = any(&random, REGIONS);
                        struct key_use use = {.key = atomic_load(&regions[number].key),
                                              .domain = (uint32_t)number,
                                              .access = KEY_REMOTE_READ,
                                              .address = number * 1000,
                                              .length = sizeof regions->memory};
                        unsigned char *first;
                        enum key_outcome outcome = key_hold(&keys, &use, &first);

                        if (outcome == KEY_UNKNOWN)
                                continue;
                        CHECK(outcome == KEY_HELD);
                        for (int j = 0; j < 8; j++) {
                                if (!any(&random, 500))
                                        sched_yield();
                                CHECK(((uint64_t *)(void *)first)[j] == number + 1);
                        }
                        if (!used++)
                                atomic_fetch_add(&users, 1);
                        key_release(&keys, use.key);
                }
        return NULL;
}

static void change_keys(void)
{
        uint64_t random = ~seed;

        while (time(NULL) < end || atomic_load(&users) < USERS)
                for (int i = 0; i < 1000; i++) {
                        uint64_t number = any(&random, REGIONS);
                        uint32_t key = atomic_load(&regions[number].key);
                        struct key_entry region = {.base = number * 1000,
                                                   .length = sizeof regions->memory,
                                                   .first = (unsigned char *)regions[number].memory,
                                                   .access = KEY_REMOTE_READ,
                                                   .domain = (uint32_t)number};

                        if (key) {
                                CHECK(key_remove_region(&keys, key));
                                memset(regions[number].memory, 0, sizeof regions->memory);
                        }
                        for (int j = 0; j < 8; j++)
                                regions[number].memory[j] = number + 1;
                        /* Few places: they are used again at once. */
                        keys.next %= 2 * REGIONS;
                        key = key_add_region(&keys, &region);
                        CHECK(key);
                        atomic_store(&regions[number].key, key);
                }
}

static void race(void)
{
        pthread_t threads[USERS];

        for (uintptr_t i = 0; i < USERS; i++)
                CHECK(pthread_create(&threads[i], NULL, use_keys, (void *)i) == 0);
        change_keys();
        for (int i = 0; i < REGIONS; i++)
                if (atomic_load(&regions[i].key))
                        CHECK(key_remove_region(&keys, atomic_load(&regions[i].key)));
        for (int i = 0; i < USERS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
}

int main(int count, char **arguments)
{
        CHECK(keys_start(&keys, REGIONS));
        if (count == 2 && strcmp(arguments[1], "rules") == 0) {
                check_uses();
                check_windows();
                check_window_access();
                check_places();
        } else if (count == 4) {
                end = time(NULL) + atoi(arguments[2]);
                seed = strtoull(arguments[3], NULL, 0);
                race();
        } else {
                return 2;
        }
        CHECK(!keys.count);
        keys_end(&keys);
        return 0;
}
