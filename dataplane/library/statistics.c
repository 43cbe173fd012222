#include "statistics.h"

#include "settings.h"
#include "sys.h"

#include <fcntl.h>
#include <string.h>

struct statistics statistics;

void statistics_reason(uint32_t reason)
{
        statistics_count(&statistics.reasons[reason < REASONS ? reason : 0]);
}

static char *put_text(char *place, const char *text)
{
        size_t length = strlen(text);

        memcpy(place, text, length);
        return place + length;
}

static char *put_number(char *place, uint64_t number)
{
        char digits[24];
        int count = 0;

        do
                digits[count++] = (char)('0' + number % 10);
        while (number /= 10);
        while (count)
                *place++ = digits[--count];
        return place;
}

void statistics_report(void)
{
        const char *path = environment("FREEFLOW_STATS");
        char line[2048], *end = line;
        long fd;

        if (!path)
                return;
#define FIELD(name)                                                                                          \
        end = put_text(end, "\"" #name "\":");                                                               \
        end = put_number(end, atomic_load(&statistics.name));                                                \
        end = put_text(end, ",");
        end = put_text(end, "{");
        STATISTICS(FIELD)
#undef FIELD
        end = put_text(end, "\"reasons\":[");
        for (int i = 0; i < REASONS; i++) {
                end = put_number(end, atomic_load(&statistics.reasons[i]));
                end = put_text(end, i + 1 < REASONS ? "," : "],");
        }
        end = put_text(end, "\"pid\":");
        end = put_number(end, (uint64_t)sys_0(SYS_getpid));
        end = put_text(end, "}\n");
        fd = sys_4(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (fd < 0)
                return;
        sys_3(SYS_write, fd, line, end - line);
        sys_1(SYS_close, fd);
}
