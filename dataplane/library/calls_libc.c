/* Functions of the C library that use a caller's descriptor by themselves, without the calls that
 * the library wraps. tests/dataplane/test_names.py knows every name that a C library exports.
 */
#include "calls.h"

#include "fallback.h"
#include "handover.h"
#include "protocol.h"
#include "sparse.h"
#include "sys.h"

#include <errno.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

void *dlsym(void *handle, const char *name) __attribute__((weak));
void *dlopen(const char *file, int mode) __attribute__((weak));

/* --- dprintf() --- */

static int print(int fd, int checked, const char *format, va_list list)
{
        enum { FEW = 512 };
        char few[FEW], *text = few;
        size_t room = FEW;
        int length, saved;
        bool fails = false;

        for (;;) {
                va_list again;

                va_copy(again, list);
                length = checked >= 0 && real()->__vsnprintf_chk
                             ? real()->__vsnprintf_chk(text, room, checked, room, format, again)
                             : real()->vsnprintf(text, room, format, again);
                va_end(again);
                if (length < 0 || (size_t)length < room)
                        break;
                room = (size_t)length + 1;
                text = reserve(room, MAP_PRIVATE);
                if (!text)
                        return (int)result(-ENOMEM);
        }
        for (int done = 0; done < length && !fails;) {
                ssize_t written = write(fd, text + done, (size_t)(length - done));

                fails = written < 0;
                done += fails ? 0 : (int)written;
        }
        saved = *__errno_location();
        if (text != few)
                sys_2(SYS_munmap, text, room);
        *__errno_location() = saved;
        return fails ? -1 : length;
}

CALL int vdprintf(int fd, const char *format, va_list list)
{
        uint64_t key;

        return end_of(fd, &key) ? print(fd, -1, format, list) : real()->vdprintf(fd, format, list);
}

CALL int dprintf(int fd, const char *format, ...)
{
        va_list list;
        int length;

        va_start(list, format);
        length = vdprintf(fd, format, list);
        va_end(list);
        return length;
}

CALL int __vdprintf_chk(int fd, int flag, const char *format, va_list list)
{
        uint64_t key;

        if (!real()->__vdprintf_chk)
                return vdprintf(fd, format, list);
        return end_of(fd, &key) ? print(fd, flag < 0 ? 0 : flag, format, list)
                                : real()->__vdprintf_chk(fd, flag, format, list);
}

CALL int __dprintf_chk(int fd, int flag, const char *format, ...)
{
        va_list list;
        int length;

        va_start(list, format);
        length = __vdprintf_chk(fd, flag, format, list);
        va_end(list);
        return length;
}

/* --- asynchronous I/O: threads of the C library read and write --- */

/* Before glibc 2.34 these are in a library of their own, which may be loaded later than ours. */
static void *late(const char *name)
{
        enum { LAZY = 1, NOLOAD = 4 };
        void *found = dlsym ? dlsym((void *)-1L, name) : NULL;
        void *handle = !found && dlopen ? dlopen("librt.so.1", LAZY | NOLOAD) : NULL;

        return handle ? dlsym(handle, name) : found;
}

#define REAL_OR_LATE(name) (real()->name ? real()->name : (__typeof__(real()->name))late(#name))

static void by_others(const struct aiocb *block)
{
        if (block)
                hand_over_descriptor(block->aio_fildes, REASON_STDIO);
}

CALL int aio_read(struct aiocb *block)
{
        __typeof__(real()->aio_read) function = REAL_OR_LATE(aio_read);

        by_others(block);
        return function ? function(block) : (int)result(-ENOSYS);
}

CALL int aio_write(struct aiocb *block)
{
        __typeof__(real()->aio_write) function = REAL_OR_LATE(aio_write);

        by_others(block);
        return function ? function(block) : (int)result(-ENOSYS);
}

CALL int lio_listio(int mode, struct aiocb *const *blocks, int count, struct sigevent *event)
{
        __typeof__(real()->lio_listio) function = REAL_OR_LATE(lio_listio);

        for (int i = 0; i < count; i++)
                by_others(blocks[i]);
        return function ? function(mode, blocks, count, event) : (int)result(-ENOSYS);
}

/* Offsets have 64 bits on all machines that FreeFlow supports. */
CALL int aio_read64(struct aiocb64 *block)
{
        return aio_read((struct aiocb *)(void *)block);
}

CALL int aio_write64(struct aiocb64 *block)
{
        return aio_write((struct aiocb *)(void *)block);
}

CALL int lio_listio64(int mode, struct aiocb64 *const *blocks, int count, struct sigevent *event)
{
        return lio_listio(mode, (struct aiocb *const *)(void *)(uintptr_t)blocks, count, event);
}

/* --- others --- */

CALL void backtrace_symbols_fd(void *const *places, int count, int fd)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);

        if (end)
                fall_back(fd, end, key, REASON_STDIO);
        if (real()->backtrace_symbols_fd)
                real()->backtrace_symbols_fd(places, count, fd);
}

ALSO(backtrace_symbols_fd) void __backtrace_symbols_fd(void *const *, int, int);

/* A stream that gets its descriptor later, as in old C++ libraries. */
CALL void *_IO_file_attach(void *stream, int fd)
{
        hand_over_descriptor(fd, REASON_STDIO);
        return real()->_IO_file_attach ? real()->_IO_file_attach(stream, fd) : NULL;
}

CALL int posix_close(int fd, int flags)
{
        (void)flags;
        return close(fd);
}

CALL int sockatmark(int fd)
{
        int at = 0;

        return ioctl(fd, SIOCATMARK, &at) < 0 ? -1 : at;
}

CALL int eventfd_read(int fd, eventfd_t *value)
{
        return read(fd, value, sizeof *value) == sizeof *value ? 0 : -1;
}

CALL int eventfd_write(int fd, eventfd_t value)
{
        return write(fd, &value, sizeof value) == sizeof value ? 0 : -1;
}
