#include "cork.h"

#include "sys.h"

#include <netinet/in.h>
#include <netinet/tcp.h>

/* Bits of `delays`. */
enum {
        KEPT = 1,
        CORK = 2,
        NODELAY = 4,
        SET = 8, /* times CORK or NODELAY: set by the program since the ring began */
};

static uint32_t bit_of(int level, int name)
{
        if (level != IPPROTO_TCP)
                return 0;
        return name == TCP_CORK ? CORK : name == TCP_NODELAY ? NODELAY : 0;
}

/* Of one option, unless the program has set it meanwhile. */
static uint32_t filled(uint32_t word, uint32_t bit, int value)
{
        return word & bit * SET || !value ? word : word | bit;
}

void cork_begin(int fd, struct end *end)
{
        uint32_t word = KEPT;
        int cork, nodelay;

        /* First: another thread that sets an option just now, in the kernel, either finds the word
         * afterwards or has set it before we read it. */
        atomic_store(&end->delays, KEPT);
        cork = sys_option(fd, IPPROTO_TCP, TCP_CORK);
        nodelay = sys_option(fd, IPPROTO_TCP, TCP_NODELAY);
        if (cork < 0 || nodelay < 0) {
                atomic_store(&end->delays, 0);
                return;
        }
        while (!atomic_compare_exchange_weak(&end->delays, &word,
                                             filled(filled(word, CORK, cork), NODELAY, nodelay)))
                ;
        if (cork)
                sys_set_option(fd, IPPROTO_TCP, TCP_CORK, 0);
        /* Also sends what MSG_MORE holds back, whatever the option was: tcp(7). */
        sys_set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
}

void cork_end(int fd, struct end *end)
{
        uint32_t word = atomic_load(&end->delays);

        while (word & KEPT) {
                sys_set_option(fd, IPPROTO_TCP, TCP_NODELAY, !!(word & NODELAY));
                sys_set_option(fd, IPPROTO_TCP, TCP_CORK, !!(word & CORK));
                if (atomic_compare_exchange_strong(&end->delays, &word, 0))
                        break;
        }
}

bool cork_keeps(const struct end *end, int level, int name)
{
        return bit_of(level, name) && load_relaxed(&end->delays) & KEPT;
}

bool cork_clears(const struct end *end, int name, int value)
{
        return name == TCP_CORK && !value && load_relaxed(&end->delays) & CORK;
}

bool cork_set(struct end *end, int level, int name, int value)
{
        uint32_t bit = bit_of(level, name), word = atomic_load(&end->delays);

        while (bit && word & KEPT)
                if (atomic_compare_exchange_weak(&end->delays, &word,
                                                 (word & ~bit) | bit * SET | (value ? bit : 0)))
                        return true;
        return false;
}

bool cork_get(const struct end *end, int level, int name, int *value)
{
        uint32_t bit = bit_of(level, name), word = atomic_load(&end->delays);

        if (!bit || !(word & KEPT))
                return false;
        *value = !!(word & bit);
        return true;
}
