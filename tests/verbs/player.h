/* One end of a queue pair that does everything at once: it sends, writes, reads and changes words
 * as fast as it can, in random sizes and lists of memory, signalled and not, fenced and not, with
 * receives posted late. Whoever receives knows what each message has to be. Whoever reads knows
 * what it has written before. All of it is compared.
 */
#ifndef FREEFLOW_TEST_PLAYER_H
#define FREEFLOW_TEST_PLAYER_H

#include "connecting.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

enum {
        MOST = 150000,
        OPEN = 32,
        RECEIVES = 8,
        COMPLETIONS = 128,
        AREA = 1 << 20,
        PAGE_BYTES = 4096,
        WORDS = 64,
        PATIENCE = 60
};

/* What both ends see. */
struct shared {
        struct {
                _Atomic uint32_t number; /* of the queue pair */
                uint64_t area;           /* address of the memory that the other end writes and reads */
                uint32_t key;
                _Atomic bool connected;
                _Atomic uint64_t sent, received; /* messages */
                _Atomic bool finished;           /* all that it has posted is complete */
        } ends[2];
};

static struct shared *shared;
static time_t end_of_test;

/* The program's: */
static struct ibv_context *open_device(void);
static struct ibv_qp_attr attributes_of(int side);
static void go_on(struct ibv_qp *qp); /* what is to be done besides polling */

/* A request that is not complete, as far as it is known. */
struct slot {
        unsigned char *bytes; /* MOST, of the end's memory */
        unsigned char *expected;
        uint32_t length; /* to compare once it is complete */
};

struct player {
        int side;
        uint64_t random;
        struct end end;
        unsigned char *memory; /* slots, then receives */
        struct ibv_mr *region;
        unsigned char *area, *area_start; /* of this end, the other's to use */
        struct ibv_mr *area_region;
        unsigned char *mirror; /* of the other end's area */
        struct slot slots[OPEN];
        uint64_t posted, complete; /* requests */
        uint64_t sent;             /* messages */
        uint64_t received, receives;
};

static unsigned char byte_of(uint64_t message, uint64_t place, int side)
{
        return (unsigned char)(((message * 31 + place + (uint64_t)side) * UINT64_C(0x9e3779b97f4a7c15)) >>
                               51);
}

/* A length that is often near one of the limits. */
static uint32_t some_length(uint64_t *random)
{
        static const uint32_t limits[] = {0, 8, 3680, 4096, 16352, 65536, 131072};

        switch (any(random, 4)) {
        case 0:
                return (uint32_t)any(random, MOST + 1);
        case 1:
                return (uint32_t)(limits[any(random, 7)] + any(random, 17));
        default:
                return (uint32_t)any(random, 100);
        }
}

/* What a message is, known to both ends. */
static uint32_t length_of(int side, uint64_t message)
{
        uint64_t state = seed * 7 + message * 2 + (uint64_t)side;

        return some_length(&state);
}

static void make_player(struct player *player, int side)
{
        const struct ibv_qp_cap cap = {.max_send_wr = OPEN,
                                       .max_recv_wr = RECEIVES,
                                       .max_send_sge = 4,
                                       .max_recv_sge = 4,
                                       .max_inline_data = 64};
        struct ibv_qp_init_attr wanted = {.cap = cap, .qp_type = IBV_QPT_RC};
        struct ibv_context *context = open_device();
        size_t size = (size_t)(OPEN + RECEIVES) * MOST;

        *player = (struct player){.side = side, .random = seed + (uint64_t)side};
        player->end.context = context;
        CHECK((player->end.pd = ibv_alloc_pd(context)));
        CHECK((player->end.sent = ibv_create_cq(context, COMPLETIONS, NULL, NULL, 0)));
        /* Sometimes one queue for both kinds. */
        player->end.received =
            seed % 2 ? player->end.sent : ibv_create_cq(context, COMPLETIONS, NULL, NULL, 0);
        wanted.send_cq = player->end.sent;
        wanted.recv_cq = player->end.received;
        wanted.qp_context = side ? &shared : NULL;
        CHECK((player->end.qp = ibv_create_qp(player->end.pd, &wanted)));
        CHECK((player->memory = malloc(size)) && (player->area = calloc(1, AREA + PAGE_BYTES)) &&
              (player->mirror = calloc(1, AREA)));
        /* Sometimes on a boundary of pages. */
        player->area_start =
            player->area + (seed / 2 % 2 ? PAGE_BYTES - (uintptr_t)player->area % PAGE_BYTES : 8);
        CHECK((player->region = ibv_reg_mr(player->end.pd, player->memory, size, IBV_ACCESS_LOCAL_WRITE)));
        CHECK((player->area_region = ibv_reg_mr(player->end.pd, player->area_start, AREA, ALL_ACCESS)));
        for (int i = 0; i < OPEN; i++) {
                player->slots[i].bytes = player->memory + (size_t)i * MOST;
                CHECK((player->slots[i].expected = malloc(MOST)));
        }
        shared->ends[side].area = (uintptr_t)player->area_start;
        shared->ends[side].key = player->area_region->rkey;
        atomic_store(&shared->ends[side].number, player->end.qp->qp_num);
        while (!atomic_load(&shared->ends[!side].number))
                sched_yield();
        become_ready(player->end.qp, attributes_of(side));
}

static void destroy_player(struct player *player)
{
        struct ibv_context *context = player->end.context;

        CHECK(ibv_destroy_qp(player->end.qp) == 0);
        CHECK(ibv_destroy_cq(player->end.sent) == 0);
        CHECK(player->end.received == player->end.sent || ibv_destroy_cq(player->end.received) == 0);
        CHECK(ibv_dereg_mr(player->region) == 0 && ibv_dereg_mr(player->area_region) == 0);
        CHECK(ibv_dealloc_pd(player->end.pd) == 0 && ibv_close_device(context) == 0);
        for (int i = 0; i < OPEN; i++)
                free(player->slots[i].expected);
        free(player->memory);
        free(player->area);
        free(player->mirror);
}

/* A list of up to four pieces. */
static int split(struct player *player, struct ibv_sge *list, const unsigned char *bytes, uint32_t length)
{
        int count = 0;
        uint32_t done = 0;

        while (done < length || any(&player->random, 8) == 0) {
                uint32_t part =
                    count == 3 ? length - done : (uint32_t)any(&player->random, length - done + 1);

                list[count++] = (struct ibv_sge){
                    .addr = (uintptr_t)bytes + done, .length = part, .lkey = player->region->lkey};
                done += part;
                if (count == 4)
                        break;
        }
        CHECK(done == length);
        return count;
}

static void post_receives(struct player *player)
{
        while (player->receives - player->received < RECEIVES && any(&player->random, 3)) {
                unsigned char *bytes = player->memory + (OPEN + player->receives % RECEIVES) * (size_t)MOST;
                struct ibv_sge list[4];
                struct ibv_recv_wr wr = {.wr_id = player->receives, .sg_list = list}, *bad;

                wr.num_sge = split(player, list, bytes, MOST);
                CHECK(ibv_post_recv(player->end.qp, &wr, &bad) == 0);
                player->receives++;
        }
}

/* A message, or a write with immediate data: both take a receive. */
static void fill_message(struct player *player, struct ibv_send_wr *wr, struct slot *slot, uint32_t *length)
{
        uint64_t message = player->sent++;

        *length = length_of(player->side, message);
        for (uint32_t i = 0; i < *length; i++)
                slot->bytes[i] = byte_of(message, i, player->side);
        wr->opcode = message % 3 ? IBV_WR_SEND : IBV_WR_SEND_WITH_IMM;
        wr->imm_data = (uint32_t)message;
        atomic_fetch_add(&shared->ends[player->side].sent, 1);
}

/* A write or a read of part of the other end's area, behind its words. */
static void fill_one_sided(struct player *player, struct ibv_send_wr *wr, struct slot *slot, uint32_t *length,
                           bool is_read)
{
        uint64_t offset;

        *length = some_length(&player->random);
        offset = 8 * WORDS + any(&player->random, AREA - 8 * WORDS - *length + 1);
        wr->opcode = is_read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
        wr->wr.rdma.remote_addr = shared->ends[!player->side].area + offset;
        wr->wr.rdma.rkey = shared->ends[!player->side].key;
        if (is_read) {
                memset(slot->bytes, 0, *length);
                memcpy(slot->expected, player->mirror + offset, *length);
                slot->length = *length;
                return;
        }
        for (uint32_t i = 0; i < *length; i++)
                slot->bytes[i] = byte_of(player->posted, i, 5);
        memcpy(player->mirror + offset, slot->bytes, *length);
        if (any(&player->random, 4) == 0) {
                wr->opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
                wr->imm_data = UINT32_MAX;
                player->sent++;
                atomic_fetch_add(&shared->ends[player->side].sent, 1);
        }
}

static void fill_atomic(struct player *player, struct ibv_send_wr *wr, struct slot *slot)
{
        uint64_t place = any(&player->random, WORDS), *word = (uint64_t *)(void *)player->mirror + place;

        memcpy(slot->expected, word, sizeof *word);
        slot->length = sizeof *word;
        wr->wr.atomic.remote_addr = shared->ends[!player->side].area + 8 * place;
        wr->wr.atomic.rkey = shared->ends[!player->side].key;
        wr->wr.atomic.compare_add = any(&player->random, 3);
        if (any(&player->random, 2)) {
                wr->opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
                *word += wr->wr.atomic.compare_add;
                return;
        }
        wr->opcode = IBV_WR_ATOMIC_CMP_AND_SWP;
        wr->wr.atomic.compare_add += any(&player->random, 2) ? *word : 0;
        wr->wr.atomic.swap = any(&player->random, 5);
        if (*word == wr->wr.atomic.compare_add)
                *word = wr->wr.atomic.swap;
}

static void post_request(struct player *player)
{
        struct slot *slot = &player->slots[player->posted % OPEN];
        struct ibv_sge list[4];
        struct ibv_send_wr wr = {.wr_id = player->posted, .sg_list = list}, *bad;
        uint32_t length = 8;
        uint64_t kind = any(&player->random, 8);

        slot->length = 0;
        if (kind < 3)
                fill_message(player, &wr, slot, &length);
        else if (kind < 7)
                fill_one_sided(player, &wr, slot, &length, kind > 4);
        else
                fill_atomic(player, &wr, slot);
        wr.num_sge = split(player, list, slot->bytes, length);
        /* The last one that fits has to be signalled: otherwise nobody hears of any. */
        if (any(&player->random, 3) == 0 || player->posted % OPEN == OPEN - 1)
                wr.send_flags |= IBV_SEND_SIGNALED;
        if (any(&player->random, 4) == 0)
                wr.send_flags |= IBV_SEND_FENCE;
        if (kind < 5 && length <= 64 && any(&player->random, 2))
                wr.send_flags |= IBV_SEND_INLINE;
        CHECK(ibv_post_send(player->end.qp, &wr, &bad) == 0);
        if (wr.send_flags & IBV_SEND_INLINE)
                memset(slot->bytes, 0x55, length);
        player->posted++;
}

static void check_received(struct player *player, const struct ibv_wc *wc)
{
        const unsigned char *bytes = player->memory + (OPEN + player->received % RECEIVES) * (size_t)MOST;

        CHECK(wc->wr_id == player->received);
        player->received++;
        if (wc->opcode == IBV_WC_RECV) {
                /* Writes that take a receive count as messages. */
                uint64_t message = player->received - 1;

                CHECK(wc->byte_len == length_of(!player->side, message));
                CHECK(!(wc->wc_flags & IBV_WC_WITH_IMM) == (message % 3 != 0));
                CHECK(message % 3 || wc->imm_data == (uint32_t)message);
                for (uint32_t i = 0; i < wc->byte_len; i++)
                        CHECK(bytes[i] == byte_of(message, i, !player->side));
        } else {
                CHECK(wc->opcode == IBV_WC_RECV_RDMA_WITH_IMM && wc->imm_data == UINT32_MAX);
        }
        atomic_fetch_add(&shared->ends[player->side].received, 1);
}

/* All requests up to this one are complete. */
static void check_complete(struct player *player, const struct ibv_wc *wc)
{
        CHECK(wc->wr_id >= player->complete && wc->wr_id < player->posted);
        for (; player->complete <= wc->wr_id; player->complete++) {
                const struct slot *slot = &player->slots[player->complete % OPEN];

                CHECK(memcmp(slot->bytes, slot->expected, slot->length) == 0);
        }
}

static void take_completions(struct player *player)
{
        struct ibv_wc wcs[8];
        struct ibv_cq *cqs[2] = {player->end.sent, player->end.received};

        go_on(player->end.qp);
        for (int which = 0; which < (cqs[0] == cqs[1] ? 1 : 2); which++) {
                int count = ibv_poll_cq(cqs[which], 8, wcs);

                for (int i = 0; i < count; i++) {
                        if (wcs[i].status != IBV_WC_SUCCESS)
                                fprintf(stderr, "side %d: status %d, opcode %d\n", player->side,
                                        wcs[i].status, wcs[i].opcode);
                        CHECK(wcs[i].status == IBV_WC_SUCCESS);
                        if (wcs[i].opcode & IBV_WC_RECV)
                                check_received(player, &wcs[i]);
                        else
                                check_complete(player, &wcs[i]);
                }
        }
}

/* Post one last request that is signalled, so that all are known to be complete. */
static void finish(struct player *player)
{
        struct ibv_send_wr wr = {.wr_id = player->posted,
                                 .opcode = IBV_WR_RDMA_WRITE,
                                 .send_flags = IBV_SEND_SIGNALED},
                           *bad;

        player->slots[player->posted % OPEN].length = 0;
        CHECK(ibv_post_send(player->end.qp, &wr, &bad) == 0);
        player->posted++;
}

static void *play(void *argument)
{
        struct player player;
        int side = argument != NULL;
        bool last = false;

        make_player(&player, side);
        for (;;) {
                bool over = time(NULL) >= end_of_test && player.posted > 1000;

                CHECK(time(NULL) < end_of_test + PATIENCE);
                post_receives(&player);
                if (!over && player.posted - player.complete < OPEN && any(&player.random, 4))
                        post_request(&player);
                else if (over && !last && player.posted - player.complete < OPEN) {
                        finish(&player);
                        last = true;
                }
                take_completions(&player);
                if (any(&player.random, 100) == 0)
                        sched_yield();
                if (last && player.complete == player.posted)
                        atomic_store(&shared->ends[side].finished, true);
                if (atomic_load(&shared->ends[0].finished) && atomic_load(&shared->ends[1].finished) &&
                    player.received == atomic_load(&shared->ends[!side].sent))
                        break;
        }
        /* The other end may still need this one. */
        while (atomic_load(&shared->ends[!side].received) != atomic_load(&shared->ends[side].sent))
                sched_yield();
        if (getenv("QUEUE_TORTURE_COUNT"))
                fprintf(stderr, "side %d: %llu requests, %llu messages received\n", side,
                        (unsigned long long)player.posted, (unsigned long long)player.received);
        destroy_player(&player);
        return NULL;
}

#endif
