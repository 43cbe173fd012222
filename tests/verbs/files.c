/* A program that looks at the device's files by each call that programs use for that, before and
 * after it has asked for devices. FOLDER is one to write in.
 */
#include "../dataplane/check.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PORT "/sys/class/infiniband/freeflow0/ports/1/"
#define TYPE PORT "gid_attrs/types/0"
#define DEVICE "/dev/infiniband/freeflow0"

/* By name, so that it is called whatever the headers make of it; NULL: this C library has none. */
#define CALL_OF(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_DEFAULT, #name))

static void check_text(int fd, int flags)
{
        char text[32] = {0};

        CHECK(fd >= 0 && read(fd, text, sizeof text) == 8 && !strcmp(text, "RoCE v2\n"));
        CHECK(fcntl(fd, F_GETFD) == (flags & O_CLOEXEC ? FD_CLOEXEC : 0));
        CHECK(close(fd) == 0);
}

#define IS_DENIED(call) (errno = 0, (call) == -1 && errno == EACCES)

static void check_open(void)
{
        int (*two)(const char *, int);
        int (*at)(int, const char *, int, ...);
        int (*at_two)(int, const char *, int);
        int (*one)(const char *, int, ...);

        for (int flags = O_RDONLY; flags <= O_CLOEXEC; flags += O_CLOEXEC) {
                check_text(open(TYPE, flags), flags);
                check_text(openat(AT_FDCWD, TYPE, flags), flags);
                check_text(openat(-1, TYPE, flags), flags);
                if ((one = CALL_OF(int, open64, const char *, int, ...)))
                        check_text(one(TYPE, flags), flags);
                if ((at = CALL_OF(int, openat64, int, const char *, int, ...)))
                        check_text(at(-1, TYPE, flags), flags);
                if ((two = CALL_OF(int, __open_2, const char *, int)))
                        check_text(two(TYPE, flags), flags);
                if ((two = CALL_OF(int, __open64_2, const char *, int)))
                        check_text(two(TYPE, flags), flags);
                if ((at_two = CALL_OF(int, __openat_2, int, const char *, int)))
                        check_text(at_two(-1, TYPE, flags), flags);
                if ((at_two = CALL_OF(int, __openat64_2, int, const char *, int)))
                        check_text(at_two(-1, TYPE, flags), flags);
        }
        CHECK(IS_DENIED(open(TYPE, O_RDWR)) && IS_DENIED(open(TYPE, O_WRONLY | O_CREAT, 0600)));
        CHECK(open(PORT "gid_attrs/types/1", O_RDONLY) == -1 && errno == ENOENT);
        CHECK(open(PORT "none", O_RDONLY) == -1 && errno == ENOENT);
}

static void check_stream(void)
{
        FILE *(*other)(const char *, const char *) = CALL_OF(FILE *, fopen64, const char *, const char *);
        char text[32];

        for (int i = 0; i < 2; i++) {
                FILE *stream = i && other ? other(TYPE, "re") : fopen(TYPE, "r");

                CHECK(stream && fgets(text, sizeof text, stream) && !strcmp(text, "RoCE v2\n"));
                CHECK(!fgets(text, sizeof text, stream) && fclose(stream) == 0);
        }
        CHECK(!fopen(TYPE, "r+") && errno == EACCES);
        CHECK(!fopen(TYPE, "w") && errno == EACCES);
        CHECK(!fopen(PORT "none", "r") && errno == ENOENT);
}

static void check_looks(void)
{
        int (*old)(int, const char *, struct stat *) =
            CALL_OF(int, __xstat, int, const char *, struct stat *);
        int (*old64)(int, const char *, struct stat *) =
            CALL_OF(int, __xstat64, int, const char *, struct stat *);
        int (*new64)(const char *, struct stat *) = CALL_OF(int, stat64, const char *, struct stat *);
        struct stat found;

        CHECK(stat(TYPE, &found) == 0 && found.st_mode == (S_IFREG | 0444) && found.st_size == 8);
        CHECK(stat(DEVICE, &found) == 0 && S_ISCHR(found.st_mode));
        memset(&found, 0, sizeof found);
        CHECK(!old || (old(1, DEVICE, &found) == 0 && S_ISCHR(found.st_mode)));
        memset(&found, 0, sizeof found);
        CHECK(!old64 || (old64(1, TYPE, &found) == 0 && S_ISREG(found.st_mode)));
        memset(&found, 0, sizeof found);
        CHECK(!new64 || (new64(DEVICE, &found) == 0 && S_ISCHR(found.st_mode)));
        CHECK(access(TYPE, R_OK) == 0 && access(TYPE, F_OK) == 0 && IS_DENIED(access(TYPE, W_OK)));
        CHECK(access(DEVICE, R_OK | W_OK) == 0);
        CHECK(access(PORT "none", F_OK) == -1 && errno == ENOENT);
        CHECK(open(DEVICE, O_RDWR) >= 0);
}

/* All other files are the kernel's. */
static void check_others(const char *folder)
{
        struct stat found;
        char path[4096];
        FILE *stream;
        int at, fd;

        umask(0);
        snprintf(path, sizeof path, "%s/made", folder);
        fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0640);
        CHECK(fd >= 0 && fstat(fd, &found) == 0 && (found.st_mode & 07777) == 0640);
        CHECK(open(path, O_CREAT | O_EXCL | O_WRONLY, 0640) == -1 && errno == EEXIST);
        CHECK(close(fd) == 0 && stat(path, &found) == 0 && access(path, F_OK) == 0);
        at = open(folder, O_RDONLY | O_DIRECTORY);
        fd = openat(at, "second", O_CREAT | O_WRONLY, 0604);
        CHECK(fd >= 0 && fstat(fd, &found) == 0 && (found.st_mode & 07777) == 0604);
        stream = fopen(path, "w+");
        CHECK(stream && fputs("text", stream) >= 0 && fclose(stream) == 0);
        CHECK(stat(path, &found) == 0 && found.st_size == 4);
        CHECK(!fopen("/none/at/all", "r") && errno == ENOENT);
        CHECK(stat("/none/at/all", &found) == -1 && errno == ENOENT);
        CHECK(unlink(path) == 0 && unlinkat(at, "second", 0) == 0);
        CHECK(close(at) == 0 && close(fd) == 0);
}

int main(int arguments, char **argument)
{
        void *(*list)(int *) = CALL_OF(void *, ibv_get_device_list, int *);
        int count = 0;

        if (arguments != 2 || !list)
                return 2;
        check_others(argument[1]);
        CHECK(open(TYPE, O_RDONLY) == -1 && errno == ENOENT && access(DEVICE, F_OK) == -1);
        CHECK(list(&count) && count == 1);
        check_open();
        check_stream();
        check_looks();
        check_others(argument[1]);
        return 0;
}
