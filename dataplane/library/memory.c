#include "memory.h"

#include "arena.h"
#include "clock.h"
#include "raw.h"
#include "sys.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#define SECOND UINT64_C(1000000000)

enum {
        SHARE = 8,
        READ_MOST = 64 * 1024 * 1024,
};

uint64_t memory_budget = UINT64_MAX;

static _Atomic uint64_t next_look; /* ns */

uint64_t memory_number_in(const char *path)
{
        char text[32];
        uint64_t number = 0;
        long fd = sys_4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0), size;

        if (fd < 0)
                return UINT64_MAX;
        size = sys_3(SYS_read, fd, text, sizeof text);
        sys_1(SYS_close, fd);
        if (size <= 0 || text[0] < '0' || text[0] > '9')
                return UINT64_MAX;
        for (long i = 0; i < size && text[i] >= '0' && text[i] <= '9'; i++)
                number = number * 10 + (uint64_t)(text[i] - '0');
        return number;
}

/* The rest of the line of /proc/self/cgroup that begins with a number and `kind`; empty: there is none. */
static const char *group_named(const char *text, const char *kind)
{
        for (size_t length = strlen(kind); *text; text += strcspn(text, "\n"), text += *text == '\n') {
                const char *line = text + strspn(text, "0123456789");

                if (strncmp(line, kind, length) == 0)
                        return line + length;
        }
        return text;
}

static char *append(char *end, const char *last, const char *text, size_t length)
{
        if (length >= (size_t)(last - end))
                length = (size_t)(last - end) - 1;
        memcpy(end, text, length);
        end[length] = 0;
        return end + length;
}

/* A file of the process's own control group. Where the group's path can't be seen from inside, the file at
 * the top is its own. */
static uint64_t number_of_group(const char *top, const char *kind, const char *file)
{
        char path[1024], text[2048], *end, *last = path + sizeof path;
        long fd = sys_4(SYS_openat, AT_FDCWD, "/proc/self/cgroup", O_RDONLY | O_CLOEXEC, 0), size = 0;
        const char *group;
        uint64_t number;

        if (fd >= 0) {
                size = sys_3(SYS_read, fd, text, sizeof text - 1);
                sys_1(SYS_close, fd);
        }
        text[size > 0 ? size : 0] = 0;
        group = group_named(text, kind);
        end = append(path, last, top, strlen(top));
        end = append(end, last, group, strcspn(group, "\n"));
        append(end, last, file, strlen(file));
        number = memory_number_in(path);
        if (number != UINT64_MAX)
                return number;
        append(path + strlen(top), last, file, strlen(file));
        return memory_number_in(path);
}

void memory_start(void)
{
        uint64_t limit = number_of_group("/sys/fs/cgroup", "::", "/memory.max");

        if (limit == UINT64_MAX)
                limit = number_of_group("/sys/fs/cgroup/memory", ":memory:", "/memory.limit_in_bytes");
        if (limit != UINT64_MAX)
                memory_budget = limit / SHARE;
}

void memory_forget_read(struct flow *flow)
{
        uint64_t touched = atomic_exchange(&flow->touched, 0);

        if (touched > SMALL_SIZE)
                atomic_fetch_sub(&family->read, touched - SMALL_SIZE);
}

bool memory_read_more(struct flow *flow, uint64_t end)
{
        uint64_t before = atomic_load_explicit(&flow->touched, memory_order_relaxed), more;
        uint64_t most = memory_budget < READ_MOST ? memory_budget : READ_MOST;

        if (end <= SMALL_SIZE)
                return true;
        more = end - (before > SMALL_SIZE ? before : SMALL_SIZE);
        if (atomic_fetch_add_explicit(&family->read, more, memory_order_relaxed) + more > most) {
                atomic_fetch_sub_explicit(&family->read, more, memory_order_relaxed);
                return false;
        }
        atomic_store_explicit(&flow->touched, end, memory_order_relaxed);
        return true;
}

/* Under the sender's lock. */
static void count_out(struct flow *flow)
{
        uint64_t touched = atomic_load_explicit(&flow->touched, memory_order_relaxed);

        if (touched > SMALL_SIZE)
                atomic_fetch_sub_explicit(&family->touched, touched - SMALL_SIZE, memory_order_relaxed);
        atomic_store_explicit(&flow->touched, 0, memory_order_relaxed);
}

void memory_forget(struct flow *flow)
{
        count_out(flow);
        atomic_store_explicit(&flow->stopped, 0, memory_order_relaxed);
}

/* Returns whether the ring still has something to give back later. Under the sender's lock. */
static bool give_back(struct end *end)
{
        struct flow *flow = &end->tx;
        uint64_t edge = atomic_load_explicit(&flow->edge, memory_order_relaxed);
        uint64_t touched = atomic_load_explicit(&flow->touched, memory_order_relaxed);
        struct view view;

        if (atomic_load_explicit(&flow->phase, memory_order_relaxed) != PHASE_RING || touched <= SMALL_SIZE ||
            atomic_load_explicit(&flow->reserved, memory_order_relaxed))
                return false;
        view = end_sends(end);
        if (atomic_exchange_explicit(&flow->seen, edge, memory_order_relaxed) != edge ||
            atomic_load_explicit(&view.ring->head, memory_order_acquire) != edge)
                return true;
        ring_restart(flow, &view, edge);
        sys_3(SYS_madvise, view_bulk(&view), (touched + PAGE - 1) / PAGE * PAGE, MADV_REMOVE);
        count_out(flow);
        return false;
}

static void look(void)
{
        uint32_t high = atomic_load(&process.high);
        bool more = false;

        atomic_store_explicit(&process.touched, false, memory_order_relaxed);
        for (uint32_t fd = 0; fd < high; fd++) {
                uint64_t key;
                struct end *end = end_of((int)fd, &key);
                enum taken taken;

                if (!end || atomic_load_explicit(&end->tx.touched, memory_order_relaxed) <= SMALL_SIZE)
                        continue;
                taken = lock_take(&end->tx.lock, self());
                if (taken == LOCK_NESTED)
                        more = true;
                else if (end_is(end, key))
                        more = give_back(end) || more;
                lock_release(&end->tx.lock, taken);
        }
        if (more)
                atomic_store_explicit(&process.touched, true, memory_order_relaxed);
}

int64_t memory_sleep(int64_t left)
{
        uint64_t present, due;

        raw_settle();
        if (__builtin_expect(!atomic_load_explicit(&process.touched, memory_order_relaxed), 1))
                return left;
        present = now();
        due = atomic_load_explicit(&next_look, memory_order_relaxed);
        if (present >= due &&
            atomic_compare_exchange_strong_explicit(&next_look, &due, present + SECOND, memory_order_relaxed,
                                                    memory_order_relaxed)) {
                due = present + SECOND;
                look();
                if (!atomic_load_explicit(&process.touched, memory_order_relaxed))
                        return left;
        }
        /* All sleepers wake for it: which of them will still be there isn't known. */
        if (due <= present)
                due = present + SECOND;
        return left < 0 || (uint64_t)left > due - present ? (int64_t)(due - present) : left;
}
