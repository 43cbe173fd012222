#include "identity.h"

#include "bucket.h"
#include "ends.h"
#include "poller.h"
#include "sys.h"

#include <sys/socket.h>

enum { PACE = 25 }; /* times raw_near for each question, which takes a quarter of it */

__thread struct identity_last identity_last __attribute__((tls_model("initial-exec")));

bool identity_check(int fd, const struct end *end, uint64_t stamp)
{
        uint64_t cost = load_relaxed(&raw_near) * PACE;

        identity_last.end = end;
        identity_last.stamp = stamp;
        return !bucket_take(&identity_last.spent, stamp, cost) || end_is_behind(fd, end);
}

/* Another descriptor that the table has for the same connection; -1: none. */
static int same_as(int fd)
{
        uint64_t cookie = 0, key;
        uint32_t size = sizeof cookie;
        struct end *end;

        if (sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) < 0 || !cookie)
                return -1;
        for (int other = -1; (other = end_next(other, &end, &key)) >= 0;)
                if (atomic_load(&end->cookie) == cookie)
                        return other;
        return -1;
}

void identity_lost(int fd)
{
        int other;

        identity_last.end = NULL;
        poller_closed(fd);
        end_forget(fd);
        other = same_as(fd);
        if (other >= 0)
                end_alias(other, fd);
}
