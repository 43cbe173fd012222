/* The messages that wait for room in the router's socket: `outbox.h`, with a socket made by hand.
 *
 *      outbox rules
 *      outbox race SECONDS SEED
 *
 * race: threads send while the socket is full now and then, and others flush. The messages of each
 * come in their order, and none is lost.
 */
#include "../../dataplane/verbs/outbox.c"
#include "../dataplane/check.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

enum { SENDERS = 3, EPOCH = 5 };

/* A message of a sender, of any length. */
struct numbered {
        struct message message;
        uint32_t sender, number;
        uint32_t words[70];
};

static _Atomic uint32_t epoch = EPOCH;
static _Atomic uint32_t room;
static uint32_t next[SENDERS]; /* number of the next one that comes */

static uint32_t epoch_now(void)
{
        return epoch;
}

/* The caller has the outbox's mutex. */
static int take(const void *message, size_t size, uint32_t wanted)
{
        const struct numbered *numbered = message;

        if (wanted != epoch)
                return ESTALE;
        if (!room)
                return EAGAIN;
        room--;
        CHECK(numbered->message.size == size && numbered->number == next[numbered->sender]);
        for (size_t i = 0; i < (size - offsetof(struct numbered, words)) / 4; i++)
                CHECK(numbered->words[i] == numbered->number + i);
        next[numbered->sender]++;
        return 0;
}

static const struct freeflow_services services = {.epoch = epoch_now, .send = take};

static enum outbox_outcome send_one(uint32_t sender, uint32_t number, uint32_t words, uint32_t by)
{
        struct numbered made = {.sender = sender, .number = number};

        made.message.size = (uint16_t)(offsetof(struct numbered, words) + words * 4);
        for (uint32_t i = 0; i < words; i++)
                made.words[i] = number + i;
        return outbox_send(&services, &made, made.message.size, by);
}

/* --- rules */

static void check_order(void)
{
        room = 2;
        CHECK(send_one(0, 0, 3, EPOCH) == OUTBOX_SENT && send_one(0, 1, 0, EPOCH) == OUTBOX_SENT);
        CHECK(outbox_is_empty());
        CHECK(send_one(0, 2, 1, EPOCH) == OUTBOX_KEPT && send_one(0, 3, 70, EPOCH) == OUTBOX_KEPT);
        CHECK(!outbox_is_empty() && next[0] == 2);
        room = 1;
        outbox_flush(&services);
        CHECK(!outbox_is_empty() && next[0] == 3);
        /* What is kept goes first. */
        room = 1;
        CHECK(send_one(0, 4, 2, EPOCH) == OUTBOX_KEPT && next[0] == 4);
        room = 2;
        CHECK(send_one(0, 5, 2, EPOCH) == OUTBOX_SENT && next[0] == 6 && outbox_is_empty());
}

static void check_lost_socket(void)
{
        room = 0;
        CHECK(send_one(0, 6, 1, EPOCH) == OUTBOX_KEPT);
        epoch++;
        CHECK(send_one(0, 7, 1, EPOCH) == OUTBOX_LOST && outbox_is_empty());
        CHECK(send_one(0, 6, 1, EPOCH + 1) == OUTBOX_KEPT);
        room = 1;
        outbox_flush(&services);
        CHECK(outbox_is_empty() && next[0] == 7);
        epoch = EPOCH;
}

/* Its memory is used up, and again, from wherever the first message is. */
static void check_room(void)
{
        for (int i = 0; i < 3; i++) {
                uint32_t number = next[0], first = number;

                room = 0;
                while (send_one(0, number, 70, EPOCH) == OUTBOX_KEPT)
                        number++;
                CHECK((number - first + 1) * rounded(sizeof(struct numbered)) > ROOM);
                room = 100;
                outbox_flush(&services);
                room = 0;
                while (send_one(0, number, 70, EPOCH) == OUTBOX_KEPT)
                        number++;
                CHECK(number - next[0] >= (number - first) - 100);
                room = UINT32_MAX;
                outbox_flush(&services);
                CHECK(outbox_is_empty() && next[0] == number);
        }
        room = 0;
        CHECK(send_one(0, next[0], 0, EPOCH) == OUTBOX_KEPT);
        outbox_forget();
        CHECK(outbox_is_empty());
}

/* --- race */

static time_t end;

static void *send_some(void *argument)
{
        uint32_t sender = (uint32_t)(uintptr_t)argument, number = 0;
        uint64_t dice = seed + sender;

        while (time(NULL) < end)
                if (send_one(sender, number, (uint32_t)any(&dice, 71), EPOCH) != OUTBOX_LOST)
                        number++;
        return (void *)(uintptr_t)number;
}

static void race(void)
{
        pthread_t threads[SENDERS];
        uint64_t dice = seed;
        void *sent[SENDERS];

        for (uintptr_t i = 0; i < SENDERS; i++)
                CHECK(pthread_create(&threads[i], NULL, send_some, (void *)i) == 0);
        while (time(NULL) < end) {
                room = (uint32_t)any(&dice, 500);
                outbox_flush(&services);
        }
        room = UINT32_MAX;
        /* Whoever still sends sends what others have left, too. */
        for (int i = 0; i < SENDERS; i++)
                CHECK(pthread_join(threads[i], &sent[i]) == 0);
        outbox_flush(&services);
        for (int i = 0; i < SENDERS; i++)
                CHECK(next[i] == (uint32_t)(uintptr_t)sent[i] && next[i]);
}

int main(int count, char **arguments)
{
        if (is_race(count, arguments, &end)) {
                race();
                return 0;
        }
        check_order();
        check_lost_socket();
        check_room();
        return 0;
}
