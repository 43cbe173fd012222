/* Files of other processes' extents (extents.h) that this process has mapped.
 *
 * A file is mapped once, however many queue pairs and keys lead to it. Its owner can write anything
 * there at any time, but not make it shorter.
 */
#ifndef FREEFLOW_REACHED_H
#define FREEFLOW_REACHED_H

#include "record.h"

struct reached {
        struct reached *next;
        uint64_t memory; /* the router's number */
        uint64_t token;
        unsigned char *base;
        size_t size;
        bool writable;
        uint32_t users;
};

/* Map a file that the router has given for this token, unless that has been done. The descriptor
 * stays the caller's. NULL: it can't be. */
struct reached *reached_add(uint64_t memory, uint64_t token, int memfd, bool writable);
/* One that is mapped; NULL: it is not. Whoever says that its memory is there has to know the token:
 * else a peer could have this process write into the memory of another one. */
struct reached *reached_find(uint64_t memory, uint64_t token);
/* Whoever has got it by these has no use for it any more. */
void reached_leave(struct reached *reached);
/* In a child of fork(): nothing is mapped. */
void reached_forget(void);

/* Part of such a file: memory of one key. */
struct segment {
        struct segment *next;
        struct reached *reached;
        uint32_t key;
        uint32_t access; /* enum key_access */
        uint64_t base;   /* the key's address of the first byte */
        uint64_t length;
        unsigned char *first; /* that byte */
};

/* Add a key's memory to a list, with the caller's use of the file. False: what the other side has
 * said does not fit the file, and the use is given back. */
bool segment_add(struct segment **list, struct reached *reached, uint32_t key,
                 const struct record_direct *direct);
/* The memory of a key; NULL: none is known. One that its owner has given up is dropped. */
struct segment *segment_find(struct segment **list, uint32_t key);
/* Around its use: its owner waits meanwhile, for a moment, before it takes the memory away. False:
 * it has done so; at the end: perhaps before all was written. */
bool segment_enter(const struct segment *segment);
bool segment_leave(const struct segment *segment);
void segments_end(struct segment **list);

#endif
