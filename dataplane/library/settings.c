#include "settings.h"

#include "layout.h"

#include <string.h>

/* Until the router's WELCOME. */
struct settings settings = {.enabled = 1,
                            .operations = 4,
                            .age = 10000,
                            .bytes = 0,
                            .bulk = 1 << 20,
                            .spin = 50,
                            .ring_limit = RING_SIZE};

extern char **environ __attribute__((weak));

const char *environment(const char *name)
{
        size_t length = strlen(name);

        if (!&environ || !environ)
                return NULL;
        for (char **entry = environ; *entry; entry++)
                if (strncmp(*entry, name, length) == 0 && (*entry)[length] == '=')
                        return *entry + length + 1;
        return NULL;
}
