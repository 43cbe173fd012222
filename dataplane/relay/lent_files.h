/* Files for registered memory of this host's processes, which the router lends to the relay for
 * moves (moves.h).
 *
 * A file is mapped and registered with the device when it is first used, and stays so until the
 * router gives it up and no move and no peer's relay uses it. Its process can write anything there
 * at any time, but not make it shorter.
 */
#ifndef FREEFLOW_RELAY_LENT_FILES_H
#define FREEFLOW_RELAY_LENT_FILES_H

#include "context.h"
#include "list.h"

struct transport;

enum {
        /* Bytes, at most: registering takes some ms for as many, in which nothing else is done. */
        LENT_FILE_MOST = 64 << 20,
        LENT_FILE_HEADER = 4096,
};

struct lent_file {
        struct node same;   /* in its hash bucket */
        struct node grants; /* to relays of peers: moves.c */
        uint64_t number, token, owner;
        size_t size;
        int memory;
        bool writable, ended;
        bool refused; /* it can't be mapped or registered: that is not tried again */
        unsigned users;
        unsigned char *base; /* NULL: not mapped yet */
        const struct transport *transport;
        void *registration; /* the transport's; NULL: none */
};

/* `ends`: revokes what peers' relays were granted. */
void lent_files_start(void (*ends)(struct lent_file *file));
/* R_FILE; takes over the descriptor. */
void lent_file_add(const struct relay_file *message, int memory);
/* R_FILE_END. */
void lent_file_end(uint64_t number);
/* One that is not given up, of this process; NULL: there is none. */
struct lent_file *lent_file_find(uint64_t number, uint64_t owner);
/* False: it is too large, or the device refuses it, once and for all. Otherwise it is used until
 * lent_file_leave(). */
bool lent_file_use(struct lent_file *file, const struct transport *transport);
/* May free it. */
void lent_file_leave(struct lent_file *file);
/* Deregisters all files of a transport whose device is gone or closed. */
void lent_files_deregister(const struct transport *transport);

/* Are these bytes in a file of this size, behind its header? */
static inline bool lent_file_has(uint64_t size, uint64_t offset, uint64_t length)
{
        return offset >= LENT_FILE_HEADER && offset <= size && length <= size - offset;
}

/* What the file's header says: the first word (extents.h of our libibverbs). */
static inline uint64_t lent_file_key(const struct lent_file *file)
{
        return __atomic_load_n((const uint64_t *)(const void *)file->base, __ATOMIC_ACQUIRE);
}

#endif
