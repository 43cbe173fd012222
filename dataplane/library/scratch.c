#include "scratch.h"

#include "family.h"
#include "real.h"
#include "sys.h"

#include <errno.h>

static __thread struct scratch kept[SCRATCH_USES] __attribute__((tls_model("initial-exec")));
static struct {
        bool made;
        pthread_key_t key;
} at_thread_end;

static void free_kept(void *unused)
{
        (void)unused;
        for (int i = 0; i < SCRATCH_USES; i++) {
                if (kept[i].memory)
                        sys_2(SYS_munmap, kept[i].memory, kept[i].size);
                kept[i] = (struct scratch){0};
        }
}

/* Before the program has keys of its own: for a small key the C library has a place already. */
__attribute__((constructor)) static void make_key(void)
{
        struct real *functions = real();

        at_thread_end.made = functions->pthread_key_create && functions->pthread_setspecific &&
                             functions->pthread_key_create(&at_thread_end.key, free_kept) == 0;
}

/* Will free_kept() run at the thread's end, or does the thread end with the process? */
static bool may_keep(void)
{
        return at_thread_end.made ? real()->pthread_setspecific(at_thread_end.key, kept) == 0
                                  : self() == (uint32_t)load_relaxed(&process.pid);
}

void *scratch_take(enum scratch_use use, size_t size, struct scratch *own)
{
        struct scratch *scratch = &kept[use];
        long got;

        *own = (struct scratch){0};
        if (scratch->used || (scratch->size < size && !may_keep()))
                scratch = own;
        scratch->used = true;
        if (scratch->size >= size)
                return scratch->memory;
        got = sys_6(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got < 0 && got > -4096) {
                scratch->used = false;
                *__errno_location() = ENOMEM;
                return NULL;
        }
        if (scratch->memory)
                sys_2(SYS_munmap, scratch->memory, scratch->size);
        scratch->memory = (void *)got;
        scratch->size = size;
        return scratch->memory;
}

void scratch_return(enum scratch_use use, struct scratch *own)
{
        if (own->memory)
                sys_2(SYS_munmap, own->memory, own->size);
        else
                kept[use].used = false;
}
