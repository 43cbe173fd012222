#include "outbox.h"

#include "mutex.h"

#include <errno.h>
#include <string.h>

enum {
        /* in bytes: for a request, the slot and the end of each queue pair that there may be */
        ROOM = 1024 * 1024,
        ALIGNMENT = 8,
};

/* All are for one socket. */
static struct {
        struct mutex mutex; /* of what follows */
        _Atomic bool any;   /* without the mutex: a hint */
        uint32_t epoch;
        uint32_t first, last; /* bytes: the messages are between them */
        _Alignas(ALIGNMENT) unsigned char bytes[ROOM];
} kept;

static uint32_t rounded(size_t size)
{
        return (uint32_t)(size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

bool outbox_is_empty(void)
{
        return !atomic_load_explicit(&kept.any, memory_order_relaxed);
}

/* Under the mutex, as what follows. */
static void clear(void)
{
        kept.first = kept.last = 0;
        atomic_store_explicit(&kept.any, false, memory_order_relaxed);
}

static void flush(const struct freeflow_services *here)
{
        while (kept.first != kept.last) {
                const void *message = kept.bytes + kept.first;
                size_t size = ((const struct message *)message)->size;
                int failure = here->send(message, size, kept.epoch);

                if (failure == EAGAIN)
                        return;
                /* A socket that is lost has none of them. */
                kept.first = failure ? kept.last : kept.first + rounded(size);
        }
        clear();
}

/* False: there is no room. */
static bool keep(const void *message, size_t size, uint32_t epoch)
{
        uint32_t used = kept.last - kept.first;

        if (used + rounded(size) > ROOM)
                return false;
        if (kept.last + rounded(size) > ROOM) {
                memmove(kept.bytes, kept.bytes + kept.first, used);
                kept.first = 0;
                kept.last = used;
        }
        memcpy(kept.bytes + kept.last, message, size);
        kept.last += rounded(size);
        kept.epoch = epoch;
        atomic_store_explicit(&kept.any, true, memory_order_relaxed);
        return true;
}

enum outbox_outcome outbox_send(const struct freeflow_services *here, const void *message, size_t size,
                                uint32_t epoch)
{
        enum outbox_outcome outcome = OUTBOX_LOST;
        int failure = EAGAIN;

        mutex_take(&kept.mutex);
        flush(here);
        if (kept.first == kept.last)
                failure = here->send(message, size, epoch);
        if (!failure)
                outcome = OUTBOX_SENT;
        else if (failure == EAGAIN && epoch == here->epoch() && keep(message, size, epoch))
                outcome = OUTBOX_KEPT;
        mutex_release(&kept.mutex);
        return outcome;
}

void outbox_flush(const struct freeflow_services *here)
{
        if (outbox_is_empty())
                return;
        mutex_take(&kept.mutex);
        flush(here);
        mutex_release(&kept.mutex);
}

void outbox_forget(void)
{
        kept.mutex = (struct mutex){0};
        clear();
}
