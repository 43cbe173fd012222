/* Copying between a ring and a list of buffers. */
#ifndef FREEFLOW_CURSOR_H
#define FREEFLOW_CURSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/uio.h>

/* A place in a list of buffers. */
struct cursor {
        const struct iovec *vec;
        size_t offset;
};

/* Bytes of the cursor's buffer that are left. */
static inline size_t cursor_left(const struct cursor *cursor)
{
        return cursor->vec->iov_len - cursor->offset;
}

/* Move within the buffer, and from its end to the next one. */
static inline void cursor_move(struct cursor *cursor, size_t size)
{
        cursor->offset += size;
        if (cursor->offset == cursor->vec->iov_len) {
                cursor->vec++;
                cursor->offset = 0;
        }
}

/* Copy `size` bytes between the cursor's buffers and `place`, and move the cursor. */
static inline void cursor_copy(struct cursor *cursor, unsigned char *place, size_t size, bool into_ring)
{
        while (size) {
                size_t left = cursor_left(cursor), part = left < size ? left : size;
                unsigned char *buffer = (unsigned char *)cursor->vec->iov_base + cursor->offset;

                if (into_ring)
                        memcpy(place, buffer, part);
                else
                        memcpy(buffer, place, part);
                place += part;
                size -= part;
                cursor_move(cursor, part);
        }
}

#endif
