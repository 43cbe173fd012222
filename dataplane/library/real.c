#include "real.h"

#include <stddef.h>

/* dlsym's special handle for "the next one after us"; the same in all C libraries that we run
 * under. */
#define NEXT ((void *)-1L)

void *dlsym(void *handle, const char *name) __attribute__((weak));

struct real real_functions;

void real_find(void)
{
        if (!dlsym)
                return;
#define FIND(type, name, arguments) real_functions.name = (type(*) arguments)dlsym(NEXT, #name);
        USED_FUNCTIONS(FIND)
        real_functions.rseq_offset = dlsym(NEXT, "__rseq_offset");
        REAL_FUNCTIONS(FIND)
#undef FIND
}

void *real_named(const char *name)
{
        return dlsym ? dlsym(NEXT, name) : NULL;
}
