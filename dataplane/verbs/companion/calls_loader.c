/* A module that binds to its own libraries before it binds to us (RTLD_DEEPBIND), as Valkey's
 * modules do. Libraries that are loaded for its sake do so as well: librdmacm would open the
 * kernel's files instead of the device's. One that is loaded already stays as it is, so librdmacm
 * is loaded before, if there is one.
 */
#include <dlfcn.h>

#define CALL __attribute__((visibility("default")))

/* The C library takes its search paths from its caller, so this is a jump. */
CALL void *dlopen(const char *file, int mode)
{
        void *(*next)(const char *, int) = dlsym(RTLD_NEXT, "dlopen");

        if (file && mode & RTLD_DEEPBIND)
                next("librdmacm.so.1", RTLD_LAZY);
        return next(file, mode);
}
