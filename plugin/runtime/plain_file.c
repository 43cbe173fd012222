/* Reads and replaces small files; plain_file.h has the rules. */
#include "plain_file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "host.h"

static ssize_t read_all(int file, char *bytes, size_t most)
{
        size_t length = 0;

        while (length < most) {
                ssize_t got = read(file, bytes + length, most - length);

                if (got < 0 && errno == EINTR)
                        continue;
                if (got < 0)
                        return -1;
                if (got == 0)
                        break;
                length += (size_t)got;
        }
        return (ssize_t)length;
}

static int acceptable(const struct stat *status, int roots_own)
{
        if (!S_ISREG(status->st_mode) || status->st_size <= 0 || status->st_size > MOST_BYTES)
                return 0;
        return !roots_own || (status->st_uid == geteuid() && (status->st_mode & 022) == 0);
}

struct text read_text(int folder, const char *name, int roots_own)
{
        struct text text = {0};
        /* O_NONBLOCK: opening a FIFO would wait for its writer. */
        int file = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        ssize_t length = -1;

        if (file < 0)
                return text;
        if (fstat(file, &text.status) == 0 && acceptable(&text.status, roots_own) &&
            (text.bytes = malloc((size_t)text.status.st_size + 1)) != NULL)
                length = read_all(file, text.bytes, (size_t)text.status.st_size);
        close(file);
        if (length < 0) {
                free(text.bytes);
                text.bytes = NULL;
                return text;
        }
        text.bytes[length] = '\0';
        text.length = (size_t)length;
        return text;
}

static int write_all(int file, const char *bytes, size_t length)
{
        while (length > 0) {
                ssize_t done = write(file, bytes, length);

                if (done < 0 && errno == EINTR)
                        continue;
                if (done <= 0)
                        return -1;
                bytes += done;
                length -= (size_t)done;
        }
        return 0;
}

int replace_text(int folder, const char *name, const char *bytes, size_t length, const struct stat *before)
{
        char temporary[PATH_MAX];
        int file, failed;

        /* The process ID makes the name unique: files of exec are all in one folder. */
        if (snprintf(temporary, sizeof(temporary), "%s.freeflow-%d", name, (int)getpid()) >=
            (int)sizeof(temporary))
                return -1;
        file = openat(folder, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (file < 0)
                return -1;
        failed = write_all(file, bytes, length) != 0 || fchown(file, before->st_uid, before->st_gid) != 0 ||
                 fchmod(file, before->st_mode & 07777) != 0;
        failed |= close(file) != 0;
        if (failed || renameat(folder, temporary, folder, name) != 0) {
                unlinkat(folder, temporary, 0);
                return -1;
        }
        return 0;
}
