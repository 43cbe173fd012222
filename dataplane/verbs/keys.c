#include "keys.h"

#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>

#define GENERATIONS (UINT32_C(1) << KEY_GENERATION_BITS)
#define OWN_BITS ((UINT32_C(1) << KEY_OWN_BITS) - 1)
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

/* The entry of a key, which stays as it is from here on; NULL: there is none. */
static struct key_entry *hold_entry(struct keys *keys, uint32_t key)
{
        struct key_entry *entry = entry_of(keys, key);
        uint64_t state = atomic_load_explicit(&entry->state, memory_order_relaxed);

        do {
                if (!key || key_in(state) != key)
                        return NULL;
        } while (!atomic_compare_exchange_weak_explicit(&entry->state, &state, state + 1,
                                                        memory_order_acquire, memory_order_relaxed));
        return entry;
}

const struct key_entry *key_hold_entry(struct keys *keys, uint32_t key, uint32_t domain, uint32_t queue)
{
        struct key_entry *entry = hold_entry(keys, key);

        if (!entry || (entry->domain == domain && (!entry->queue || entry->queue == queue)))
                return entry;
        key_release(keys, key);
        return NULL;
}

enum key_outcome key_hold(struct keys *keys, const struct key_use *use, unsigned char **first)
{
        const struct key_entry *entry = hold_entry(keys, use->key);
        enum key_outcome outcome;

        if (!entry)
                return KEY_UNKNOWN;
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

/* A place without a key; NULL: too many. */
static struct key_entry *take_place(struct keys *keys)
{
        if (keys->count >= keys->limit)
                return NULL;
        for (uint32_t tries = 0; tries < KEY_PLACES; tries++) {
                struct key_entry *entry = &keys->entries[keys->next++ % KEY_PLACES];

                if (!atomic_load_explicit(&entry->state, memory_order_relaxed) && !entry->window) {
                        keys->count++;
                        return entry;
                }
        }
        return NULL;
}

/* The key of a place with a generation `step` after the last one. A key is never 0. */
static uint32_t next_key(const struct keys *keys, struct key_entry *entry, uint32_t step)
{
        uint32_t place = (uint32_t)(entry - keys->entries);

        entry->generation = (entry->generation / step * step + step) % GENERATIONS;
        if (!place && !entry->generation)
                entry->generation = step;
        return place << KEY_GENERATION_BITS | entry->generation;
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
        entry->extent = from->extent;
        atomic_store_explicit(&entry->windows, 0, memory_order_relaxed);
        atomic_store_explicit(&entry->state, (uint64_t)key << 32, memory_order_release);
}

/* Nobody can hold the key anew from now on. Wait for those who do. */
static void empty(struct key_entry *entry)
{
        uint64_t state = atomic_load_explicit(&entry->state, memory_order_relaxed);

        while (!atomic_compare_exchange_weak_explicit(&entry->state, &state, state & UINT32_MAX,
                                                      memory_order_acquire, memory_order_relaxed))
                ;
        /* Each holder only copies. Pairs with key_release(). */
        while (atomic_load_explicit(&entry->state, memory_order_acquire))
                sched_yield();
}

/* Is there something in the place of this key, by this key? */
static bool leads(const struct keys *keys, uint32_t key, bool window)
{
        struct key_entry *entry = entry_of(keys, key);

        return key && entry->window == window &&
               key_in(atomic_load_explicit(&entry->state, memory_order_relaxed)) == key;
}

/* What a region's entry has. */
static struct key_entry region_from(const struct key_entry *region)
{
        return (struct key_entry){.base = region->base,
                                  .length = region->length,
                                  .first = region->first,
                                  .access = region->access,
                                  .domain = region->domain,
                                  .extent = region->extent};
}

uint32_t key_add_region(struct keys *keys, const struct key_entry *region)
{
        struct key_entry from = region_from(region), *entry = take_place(keys);
        uint32_t key;

        if (!entry)
                return 0;
        key = next_key(keys, entry, 1);
        fill(entry, &from, key);
        return key;
}

bool key_change_region(struct keys *keys, uint32_t key, const struct key_entry *region)
{
        struct key_entry from = region_from(region), *entry = entry_of(keys, key);

        if (!leads(keys, key, false) || atomic_load_explicit(&entry->windows, memory_order_relaxed))
                return false;
        empty(entry);
        fill(entry, &from, key);
        return true;
}

bool key_remove_region(struct keys *keys, uint32_t key)
{
        struct key_entry *entry = entry_of(keys, key);

        if (!leads(keys, key, false) || atomic_load_explicit(&entry->windows, memory_order_relaxed))
                return false;
        empty(entry);
        keys->count--;
        return true;
}

uint32_t key_add_window(struct keys *keys)
{
        struct key_entry *entry = take_place(keys);

        if (!entry)
                return 0;
        entry->window = true;
        return next_key(keys, entry, OWN_BITS + 1);
}

bool key_bind(struct keys *keys, uint32_t key, const struct key_entry *window, const struct key_use *use)
{
        struct key_entry from = {.base = window->base,
                                 .length = use->length,
                                 .access = window->access & WINDOW_ACCESS,
                                 .domain = window->domain,
                                 .queue = window->queue,
                                 .region = use->key};
        struct key_entry *entry = entry_of(keys, key), *region = entry_of(keys, use->key);

        if (!key || !entry->window || atomic_load_explicit(&entry->state, memory_order_relaxed) ||
            (key & (GENERATIONS - 1) & ~OWN_BITS) != (entry->generation & ~OWN_BITS) ||
            key_hold(keys, use, &from.first) != KEY_HELD)
                return false;
        /* A window writes for others where the region's owner may write itself. */
        if (!(use->access & KEY_BIND) ||
            (from.access & (KEY_REMOTE_WRITE | KEY_REMOTE_ATOMIC) && !(region->access & KEY_LOCAL_WRITE))) {
                key_release(keys, use->key);
                return false;
        }
        atomic_fetch_add_explicit(&region->windows, 1, memory_order_relaxed);
        fill(entry, &from, key);
        key_release(keys, use->key);
        return true;
}

bool key_unbind(struct keys *keys, uint32_t key)
{
        struct key_entry *entry = entry_of(keys, key);

        if (!leads(keys, key, true))
                return false;
        empty(entry);
        atomic_fetch_sub_explicit(&entry_of(keys, entry->region)->windows, 1, memory_order_relaxed);
        return true;
}

bool key_is_bound(const struct keys *keys, uint32_t key, uint32_t domain, uint32_t queue)
{
        const struct key_entry *entry = entry_of(keys, key);

        return leads(keys, key, true) && entry->domain == domain && entry->queue == queue;
}

void key_free_window(struct keys *keys, uint32_t key)
{
        key_unbind(keys, key_in(atomic_load_explicit(&entry_of(keys, key)->state, memory_order_relaxed)));
}

void key_remove_window(struct keys *keys, uint32_t key)
{
        struct key_entry *entry = entry_of(keys, key);

        key_free_window(keys, key);
        entry->window = false;
        /* No later region gets a key that the window has had. */
        entry->generation |= OWN_BITS;
        keys->count--;
}
