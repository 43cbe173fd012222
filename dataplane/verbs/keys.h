/* The keys of a process's memory: what a lkey or a rkey allows, and where it leads.
 *
 * A key names a registered memory region, or a window bound to part of one. Its upper bits are a
 * place in a table, its lower bits a generation, so that a key that was given up stays invalid for
 * as long as possible: places are used one after the other. A window keeps its place while it is
 * bound and unbound, and the lowest eight bits of its key are the program's to choose each time
 * (InfiniBand architecture specification, volume 1, 10.6.7.2.2).
 *
 * A key is no secret. It means something only on a queue pair that the router has paired, and only
 * in the protection domain of that queue pair.
 *
 * Whoever is about to touch memory holds its key meanwhile, and checks it by that. Removing and
 * unbinding a key wait until nobody holds it. So when a region is deregistered nothing touches it
 * any more, and nobody needs a lock to check a key. A key is held for one copy, never during a
 * wait.
 */
#ifndef FREEFLOW_KEYS_H
#define FREEFLOW_KEYS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum {
        KEY_PLACE_BITS = 18,
        KEY_GENERATION_BITS = 32 - KEY_PLACE_BITS,
        KEY_PLACES = 1 << KEY_PLACE_BITS,
        KEY_OWN_BITS = 8, /* of a window's key: the program's */
};

/* What a key allows. */
enum key_access {
        KEY_LOCAL_WRITE = 1,
        KEY_REMOTE_WRITE = 2,
        KEY_REMOTE_READ = 4,
        KEY_REMOTE_ATOMIC = 8,
        KEY_BIND = 16,
        KEY_LOCAL_READ = 0, /* always */
};

struct extent;

struct key_entry {
        /* The key, 0 if there is none, and in the lower 32 bits how many hold it. Pairs: adding
         * (release) with holding (acquire), letting go (release) with removing (acquire). */
        _Alignas(64) _Atomic uint64_t state;
        uint64_t base; /* the address that peers use for the first byte */
        uint64_t length;
        unsigned char *first;     /* that byte */
        uint32_t access;          /* enum key_access */
        uint32_t domain;          /* the protection domain's number */
        uint32_t queue;           /* of a window: the only queue pair that may use it; 0: any */
        uint32_t generation;      /* of the last key in this place */
        _Atomic uint32_t windows; /* bound to this region */
        uint32_t region;          /* of a bound window: the region's key */
        struct extent *extent;    /* extents.h; NULL: peers can't map it */
        bool window;              /* the place is a window's, bound or not */
};

struct keys {
        struct key_entry *entries; /* KEY_PLACES, untouched until used */
        uint32_t limit;            /* keys at one time */
        uint32_t count;
        uint32_t next; /* place */
};

/* What somebody wants to do with memory. */
struct key_use {
        uint32_t key;
        uint32_t domain;
        uint32_t queue;
        uint32_t access; /* enum key_access, all of which are necessary */
        uint64_t address;
        uint64_t length; /* not 0: whoever touches nothing needs no key */
};

enum key_outcome {
        KEY_HELD,
        KEY_UNKNOWN,   /* no such key, or no more */
        KEY_FORBIDDEN, /* another domain or queue pair, or an access that it does not allow */
        KEY_OUTSIDE,   /* the range is not inside the key's */
};

/* Make the table, for so many keys at one time. False: no memory. */
bool keys_start(struct keys *keys, uint32_t limit);
void keys_end(struct keys *keys);

/* Check a key and hold it: `first` is where the range begins. If it is held, key_release() follows.
 * May be called by any thread at any time. */
enum key_outcome key_hold(struct keys *keys, const struct key_use *use, unsigned char **first);
void key_release(struct keys *keys, uint32_t key);
/* The same for whatever the key leads to: its entry, which stays as it is until key_release();
 * NULL: there is none that this domain and queue pair may use. */
const struct key_entry *key_hold_entry(struct keys *keys, uint32_t key, uint32_t domain, uint32_t queue);

/* These are called by one thread at a time.
 *
 * Add a region; 0: there are too many keys. */
uint32_t key_add_region(struct keys *keys, const struct key_entry *region);
/* The key means another region from now on; nobody holds it for the one before when this returns.
 * False: there is no such region, or windows are bound to it. */
bool key_change_region(struct keys *keys, uint32_t key, const struct key_entry *region);
/* Remove a region's key, and wait until nobody holds it. False: there is no such region, or windows
 * are bound to it. */
bool key_remove_region(struct keys *keys, uint32_t key);

/* Add a window: its key, which leads nowhere until it is bound. 0: there are too many keys. */
uint32_t key_add_window(struct keys *keys);
/* Bind a window to part of a region. `key` will be the window's key: only its lowest bits may
 * differ from any that it had. `window` has the access, and the domain and queue pair that may use
 * it. `use` is the part, by the region's key and with the access KEY_BIND. False: the window is
 * bound, or the region does not allow that. */
bool key_bind(struct keys *keys, uint32_t key, const struct key_entry *window, const struct key_use *use);
/* Unbind a window, and wait until nobody holds its key. False: it is not bound by this key. */
bool key_unbind(struct keys *keys, uint32_t key);
/* Is a window bound by this key, for this domain and this queue pair alone? */
bool key_is_bound(const struct keys *keys, uint32_t key, uint32_t domain, uint32_t queue);
/* Unbind a window by any key that it had, if it is bound. */
void key_free_window(struct keys *keys, uint32_t key);
/* Remove a window by any key that it had. It is unbound before. */
void key_remove_window(struct keys *keys, uint32_t key);

#endif
