/*
 * The container's root file system. An earlier start of the container may have put anything into
 * it, so no link of it is followed to the outside, and nothing in it is opened for reading.
 *
 * The runtime would make the directory for the mount. It is made here instead, because a start
 * must not fail where that can't be done: on a full disk, or if a file has the name.
 */
#include "rootfs.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host.h"

/*
 * The loaders of glibc and musl: without one no program of this machine's kind preloads a
 * library.
 */
static const char *const loaders[] = {
#if defined(__x86_64__)
    "lib64/ld-linux-x86-64.so.2",
    "lib/ld-musl-x86_64.so.1",
#elif defined(__aarch64__)
    "lib/ld-linux-aarch64.so.1",
    "lib/ld-musl-aarch64.so.1",
#endif
    NULL,
};

static int has_loader(int root)
{
        struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};

        for (size_t at = 0; loaders[at] != NULL; at++) {
                int file = (int)syscall(SYS_openat2, root, loaders[at], &how, sizeof(how));

                if (file >= 0) {
                        close(file);
                        return 1;
                }
                /* Kernels before 5.6, and hosts whose own seccomp filter doesn't know the call. */
                if (errno == ENOSYS || errno == EPERM)
                        return 1;
        }
        return loaders[0] == NULL;
}

/* Opens a directory, which is made if it is missing, with the owner of its parent. */
static int enter(int parent, const char *name)
{
        struct stat owner;
        int made = mkdirat(parent, name, 0755) == 0;
        int folder;

        if (!made && errno != EEXIST)
                return -1;
        folder = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (folder >= 0 && made &&
            (fstat(parent, &owner) != 0 || fchown(folder, owner.st_uid, owner.st_gid) != 0 ||
             fchmod(folder, 0755) != 0)) {
                close(folder);
                return -1;
        }
        return folder;
}

int prepare_rootfs(int bundle, const char *path)
{
        int root = openat(bundle, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        int run = -1, folder = -1;

        if (root >= 0 && has_loader(root) && (run = enter(root, "run")) >= 0)
                folder = enter(run, strrchr(FOLDER, '/') + 1);
        if (root >= 0)
                close(root);
        if (run >= 0)
                close(run);
        if (folder >= 0)
                close(folder);
        return folder >= 0;
}
