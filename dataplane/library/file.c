#include "file.h"

#include "sparse.h"
#include "sys.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

enum { AHEAD = 64 * 1024 };

off_t file_position(const struct operation *o)
{
        return o->offset ? *o->offset : (off_t)sys_3(SYS_lseek, o->other, 0, SEEK_CUR);
}

void file_advance(const struct operation *o, off_t position)
{
        if (o->offset)
                *o->offset = position;
        else
                sys_3(SYS_lseek, o->other, position, SEEK_SET);
}

long file_read(struct operation *o, unsigned char *place, size_t size, off_t position)
{
        struct iovec vec = {place, size};
        long got;

        if (position >= o->ahead_at && position < o->ahead_at + (off_t)o->ahead_size) {
                size_t left = o->ahead_size - (size_t)(position - o->ahead_at);

                size = size < left ? size : left;
                memcpy(place, o->ahead + (position - o->ahead_at), size);
                return (long)size;
        }
        /* -1 would mean the file's own position, and take bytes of a pipe. */
        if (position < 0 || o->file_waits)
                return -ENODATA;
        got = sys_6(SYS_preadv2, o->other, &vec, 1, position, 0, RWF_NOWAIT);
        /* overlayfs, the root of most containers, can't say whether a read would wait. */
        o->file_waits = got == -EOPNOTSUPP;
        return got < 0 ? -ENODATA : got;
}

/* Memory that one call after the other reads files into: mapping it anew for each would cost more
 * than the read. */
static _Atomic(unsigned char *) spare;

static unsigned char *take_spare(void)
{
        unsigned char *place = atomic_exchange_explicit(&spare, NULL, memory_order_acquire);

        return place ? place : reserve(AHEAD, MAP_PRIVATE);
}

void file_end(struct operation *o)
{
        unsigned char *place = o->ahead;

        /* Pairs with the exchange in take_spare(), and with this one in another thread. */
        if (place)
                place = atomic_exchange_explicit(&spare, place, memory_order_acq_rel);
        if (place)
                sys_2(SYS_munmap, place, AHEAD);
        o->ahead = NULL;
}

long file_read_ahead(struct operation *o, size_t left)
{
        long got;

        if (!o->ahead)
                o->ahead = take_spare();
        if (!o->ahead)
                return -ENOMEM;
        o->ahead_size = 0;
        o->ahead_at = file_position(o);
        got = sys_4(SYS_pread64, o->other, o->ahead, left < AHEAD ? left : AHEAD, o->ahead_at);
        if (got > 0)
                o->ahead_size = (size_t)got;
        return got > 0 ? 0 : got < 0 ? got : -ENODATA;
}
