/* Paths of the host, and limits of time. */
#include "host.h"

#ifdef FREEFLOW_TEST
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

const char *host_path(const char *path)
{
        static char changed[PATH_MAX];
        const char *root = getenv("FREEFLOW_TEST_ROOT");

        snprintf(changed, sizeof(changed), "%s%s", root != NULL ? root : "", path);
        return changed;
}

long patience(long milliseconds)
{
        const char *factor = getenv("FREEFLOW_TEST_PATIENCE");

        return milliseconds * (factor != NULL ? atoi(factor) : 1);
}
#else
const char *host_path(const char *path)
{
        return path;
}

long patience(long milliseconds)
{
        return milliseconds;
}
#endif
