/* Programs that lock their memory: it is locked, and they need no more than without the library. */
#include "pair.h"

enum { OWN = 1 << 20, MOST = 12 << 10 /* KiB */ };

static char own[OWN];

static long number_of(const char *file, const char *name)
{
        char line[512];
        FILE *from = fopen(file, "r");
        long found = 0;

        CHECK(from);
        while (fgets(line, sizeof line, from))
                if (strncmp(line, name, strlen(name)) == 0)
                        found += atol(line + strlen(name));
        fclose(from);
        return found;
}

/* Whether a mapping of an arena is locked. */
static bool arena_is_locked(void)
{
        char line[512];
        FILE *from = fopen("/proc/self/smaps", "r");
        bool arena = false, locked = false;

        CHECK(from);
        while (fgets(line, sizeof line, from)) {
                if (strchr(line, '-') && strchr(line, '-') < strchr(line, ' '))
                        arena = strstr(line, "memfd:freeflow") != NULL;
                if (arena && strncmp(line, "VmFlags:", 8) == 0)
                        locked = locked || strstr(line, " lo");
        }
        fclose(from);
        return locked;
}

static void check_memory(bool locked)
{
        long resident = number_of("/proc/self/status", "VmRSS:");

        if (resident > MOST)
                fprintf(stderr, "%ld KiB resident\n", resident);
        CHECK(resident <= MOST);
        CHECK(!arena_is_locked());
        if (locked) {
                unsigned char there[OWN / 4096];

                CHECK(number_of("/proc/self/status", "VmLck:") >= OWN / 1024);
                CHECK(mincore((void *)((uintptr_t)own & ~4095ul), OWN, there) == 0);
                for (size_t i = 0; i < sizeof there; i++)
                        CHECK(there[i] & 1);
        }
}

static void lock(int flags)
{
        CHECK(mlockall(flags) == 0);
        check_memory(!(flags & MCL_ONFAULT) && flags & MCL_CURRENT);
}

static void serve(int listener)
{
        int fd = accept(listener, NULL, NULL);

        CHECK(fd >= 0);
        warm_up_server(fd);
        check_memory(true);
        put_pattern(fd, 100000);
        get_end(fd);
}

static void use(int fd)
{
        fd = dial();
        warm_up(fd);
        get_pattern(fd, 100000);
}

static void current_and_future(int listener)
{
        void *later;

        lock(MCL_CURRENT | MCL_FUTURE);
        later = mmap(NULL, OWN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(later != MAP_FAILED);
        CHECK(number_of("/proc/self/status", "VmLck:") >= 2 * OWN / 1024);
        munmap(later, OWN);
        serve(listener);
}

static void current(int listener)
{
        lock(MCL_CURRENT);
        serve(listener);
}

static void future(int listener)
{
        CHECK(mlockall(MCL_FUTURE) == 0);
        lock(MCL_CURRENT);
        serve(listener);
}

/* mlockall() by syscall(). */
static void future_past_the_library(int listener)
{
        lock(MCL_CURRENT);
        CHECK(syscall(SYS_mlockall, MCL_FUTURE) == 0);
        serve(listener);
}

static void after_the_move(int fd)
{
        lock(MCL_CURRENT | MCL_FUTURE);
        put_pattern(fd, 100000);
        check_memory(true);
        CHECK(munlockall() == 0);
        CHECK(number_of("/proc/self/status", "VmLck:") == 0);
}

static void on_fault(int fd)
{
        lock(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);
        put_pattern(fd, 100000);
}

static void get_all_of_it(int fd)
{
        get_pattern(fd, 100000);
}

/* With a low RLIMIT_MEMLOCK and without CAP_IPC_LOCK: mlockall() locks as much as without the
 * library. */
static void limited(int listener)
{
        struct rlimit limit = {4 << 20, 4 << 20}, none = {0, 0};
        char byte;
        int fd;

        CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0);
        CHECK(setresuid(65534, 65534, 65534) == 0);
        lock(MCL_CURRENT);
        CHECK(mlockall(0) == -1 && errno == EINVAL);
        CHECK(mlockall(8) == -1 && errno == EINVAL);
        lock(MCL_CURRENT | MCL_FUTURE);
        fd = accept(listener, NULL, NULL);
        CHECK(fd >= 0);
        while (read(fd, &byte, 1) == 1)
                put_all(fd, &byte, 1);
        check_memory(true);
        CHECK(munlockall() == 0 && setrlimit(RLIMIT_MEMLOCK, &none) == 0);
        CHECK(mlockall(MCL_CURRENT) == -1 && errno == EPERM);
}

static void use_limited(int fd)
{
        char byte = 'x';

        fd = dial();
        for (int i = 0; i < 100; i++) {
                put_all(fd, &byte, 1);
                get_all(fd, &byte, 1);
                nap(i < 20);
        }
}

int main(int count, char **arguments)
{
        static const struct scenario scenarios[] = {
            {"current_and_future", current_and_future, use, true},
            {"current", current, use, true},
            {"future", future, use, true},
            {"future_past_the_library", future_past_the_library, use, true},
            {"after_the_move", after_the_move, get_all_of_it, false},
            {"on_fault", on_fault, get_all_of_it, false},
            {"limited", limited, use_limited, true},
            {0},
        };

        return run_scenario(count, arguments, scenarios);
}
