#include "keys.h"

#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>

#define GENERATIONS (UINT32_C(1) << KEY_GENERATION_BITS)
/* So there are no windows in windows. */
#define WINDOW_ACCESS (KEY_REMOTE_WRITE | KEY_REMOTE_READ | KEY_REMOTE_ATOMIC)

static struct key_entry *entry_of(const struct keys *keys, uint32_t key)
{
        return &keys->entries[key >> KEY_GENERATION_BITS];
}

static uint32_t key_in(uint64_t state)
{
        return (uint32_t)(state >> 32);
}

bool keys_start(struct keys *keys, uint32_t limit)
{
        void *place = mmap(NULL, KEY_PLACES * sizeof *keys->entries, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        *keys = (struct keys){.limit = limit < KEY_PLACES ? limit : KEY_PLACES};
        if (place == MAP_FAILED)
                return false;
        keys->entries = place;
        return true;
}

void keys_end(struct keys *keys)
{
        munmap(keys->entries, KEY_PLACES * sizeof *keys->entries);
        keys->entries = NULL;
}

/* --- using keys */

static enum key_outcome check(const struct key_entry *entry, const struct key_use *use, unsigned char **first)
{
        uint64_t offset = use->address - entry->base; /* below it: more than any length */

        if (entry->domain != use->domain || (entry->queue && entry->queue != use->queue) ||
            use->access & ~entry->access)
                return KEY_FORBIDDEN;
        if (offset > entry->length || use->length > entry->length - offset)
                return KEY_OUTSIDE;
        *first = entry->first + offset;
        return KEY_HELD;
}

enum key_outcome key_hold(struct keys *keys, const struct key_use *use, unsigned char **first)
{
        struct key_entry *entry = entry_of(keys, use->key);
        uint64_t state = atomic_load_explicit(&entry->state, memory_order_relaxed);
        enum key_outcome outcome;

        do {
                if (!use->key || key_in(state) != use->key)
                        return KEY_UNKNOWN;
        } while (!atomic_compare_exchange_weak_explicit(&entry->state, &state, state + 1,
                                                        memory_order_acquire, memory_order_relaxed));
        /* The entry stays as it is from here on. */
        outcome = check(entry, use, first);
        if (outcome != KEY_HELD)
                key_release(keys, use->key);
        return outcome;
}

void key_release(struct keys *keys, uint32_t key)
{
        atomic_fetch_sub_explicit(&entry_of(keys, key)->state, 1, memory_order_release);
}

/* --- adding and removing them */

/* A place without a key, and its next key; NULL: too many. */
static struct key_entry *take_place(struct keys *keys, uint32_t *key)
{
        if (keys->count >= keys->limit)
                return NULL;
        for (uint32_t tries = 0; tries < KEY_PLACES; tries++) {
                uint32_t place = keys->next++ % KEY_PLACES;
                struct key_entry *entry = &keys->entries[place];

                if (atomic_load_explicit(&entry->state, memory_order_relaxed))
                        continue;
                entry->generation = (entry->generation + 1) % GENERATIONS;
                /* A key is never 0. */
                if (!place && !entry->generation)
                        entry->generation = 1;
                *key = place << KEY_GENERATION_BITS | entry->generation;
                keys->count++;
                return entry;
        }
        return NULL;
}

static void fill(struct key_entry *entry, const struct key_entry *from, uint32_t key)
{
        entry->base = from->base;
        entry->length = from->length;
        entry->first = from->first;
        entry->access = from->access;
        entry->domain = from->domain;
        entry->queue = from->queue;
        entry->region = from->region;
        atomic_store_explicit(&entry->windows, 0, memory_order_relaxed);
        atomic_store_explicit(&entry->state, (uint64_t)key << 32, memory_order_release);
}

uint32_t key_add_region(struct keys *keys, const struct key_entry *region)
{
        struct key_entry from = {.base = region->base,
                                 .length = region->length,
                                 .first = region->first,
                                 .access = region->access,
                                 .domain = region->domain};
        uint32_t key;
        struct key_entry *entry = take_place(keys, &key);

        if (!entry)
                return 0;
        fill(entry, &from, key);
        return key;
}

/* The program chooses the lowest bits, so the others must differ from those of the last key. */
static uint32_t with_own_bits(struct key_entry *entry, uint32_t key, uint8_t own)
{
        const uint32_t step = UINT32_C(1) << KEY_OWN_BITS;
        uint32_t generation = (entry->generation / step * step + step) % GENERATIONS | own;

        key -= entry->generation;
        /* A key is never 0. */
        if (!key && !generation)
                generation = step;
        entry->generation = generation;
        return key | generation;
}

uint32_t key_add_window(struct keys *keys, const struct key_entry *window, const struct key_use *use,
                        uint8_t own)
{
        struct key_entry from = {.base = use->address,
                                 .length = use->length,
                                 .access = window->access & WINDOW_ACCESS,
                                 .domain = window->domain,
                                 .queue = window->queue,
                                 .region = use->key};
        struct key_entry *entry, *region = entry_of(keys, use->key);
        uint32_t key;

        if (key_hold(keys, use, &from.first) != KEY_HELD)
                return 0;
        /* A window writes for others where the region's owner may write itself. */
        if (!(use->access & KEY_BIND) ||
            (from.access & (KEY_REMOTE_WRITE | KEY_REMOTE_ATOMIC) && !(region->access & KEY_LOCAL_WRITE)) ||
            !(entry = take_place(keys, &key))) {
                key_release(keys, use->key);
                return 0;
        }
        key = with_own_bits(entry, key, own);
        atomic_fetch_add_explicit(&region->windows, 1, memory_order_relaxed);
        fill(entry, &from, key);
        key_release(keys, use->key);
        return key;
}

bool key_remove(struct keys *keys, uint32_t key)
{
        struct key_entry *entry = entry_of(keys, key);
        uint64_t state = atomic_load_explicit(&entry->state, memory_order_relaxed);

        if (!key || key_in(state) != key || atomic_load_explicit(&entry->windows, memory_order_relaxed))
                return false;
        /* Nobody can hold it anew from now on. */
        while (!atomic_compare_exchange_weak_explicit(&entry->state, &state, state & UINT32_MAX,
                                                      memory_order_acquire, memory_order_relaxed))
                ;
        /* Each holder only copies. Pairs with key_release(). */
        while (atomic_load_explicit(&entry->state, memory_order_acquire))
                sched_yield();
        if (entry->region)
                atomic_fetch_sub_explicit(&entry_of(keys, entry->region)->windows, 1, memory_order_relaxed);
        keys->count--;
        return true;
}
