/* Calls about memory whose pages may not be the program's own any more: see virtual.h. In programs
 * that don't ask for devices they are system calls, as they are in the C library.
 */
#include "../../library/sys.h"
#include "../virtual.h"

#include <errno.h>
#include <stdarg.h>
#include <sys/mman.h>

#define CALL __attribute__((visibility("default")))

extern virtual_files freeflow_virtual_files_2;

static long result(long status)
{
        if (!sys_failed(status))
                return status;
        errno = (int)-status;
        return -1;
}

CALL int madvise(void *first, size_t length, int advice)
{
        const struct virtual_files *shown =
            atomic_load_explicit(&freeflow_virtual_files_2, memory_order_acquire);

        if (shown && shown->advise((uintptr_t)first, length, advice))
                return 0;
        return (int)result(sys_3(SYS_madvise, first, length, advice));
}

CALL void *mremap(void *first, size_t length, size_t wanted, int flags, ...)
{
        const struct virtual_files *shown =
            atomic_load_explicit(&freeflow_virtual_files_2, memory_order_acquire);
        void *place = NULL;
        va_list list;

        va_start(list, flags);
        if (flags & ~MREMAP_MAYMOVE)
                place = va_arg(list, void *);
        va_end(list);
        if (shown)
                shown->move((uintptr_t)first, length);
        return (void *)result(sys_5(SYS_mremap, first, length, wanted, flags, place));
}
