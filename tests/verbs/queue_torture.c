/* Two queue pairs that do everything at once, and one whose other side is hostile.
 *
 *      queue_torture threads|processes|posters|hostile local|remote SECONDS SEED
 *
 * threads, processes: each end sends, writes, reads and changes words as fast as it can, in random
 * sizes and lists of memory, signalled and not, fenced and not, with receives posted late. Whoever
 * receives knows what each message has to be. Whoever reads knows what it has written before. All
 * of it is compared.
 *
 * posters: threads share the two queue pairs, and post, receive and poll at the same time. They
 * count in one word, and each request completes once.
 *
 * hostile: the other side writes anything into the rings: valid records with wrong keys and bounds,
 * records that are not valid, and positions. Only memory that it was given a key for changes, and
 * the queue pair never gets stuck: it can be reset and connected again.
 */
#include "queue_bed.h"

#include <sched.h>

enum { MOST = 150000, OPEN = 32, RECEIVES = 8, AREA = 1 << 20, WORDS = 64, PATIENCE = 60 };

/* What both ends see. */
struct shared {
        struct rings rings;
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
static bool remote;

/* --- pairing: the rings are there already */

static void ask(struct queue_pair *queue)
{
        bool second = queue->plain.qp_base.qp_context;

        queue_pair_up(queue, shared->rings.views[second], shared->rings.views[!second], &nowhere);
}

static void leave(struct queue_pair *queue)
{
        (void)queue;
}

static const struct queue_pairer pairer = {
    .ask = ask, .ask_again = ask_again, .listen = listen_to_nobody, .ring = ring, .leave = leave};

/* --- one end */

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
        unsigned char *area; /* of this end, the other's to use */
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
        CHECK((player->end.sent = ibv_create_cq(context, LIMIT, NULL, NULL, 0)));
        /* Sometimes one queue for both kinds. */
        player->end.received = seed % 2 ? player->end.sent : ibv_create_cq(context, LIMIT, NULL, NULL, 0);
        wanted.send_cq = player->end.sent;
        wanted.recv_cq = player->end.received;
        wanted.qp_context = side ? &shared : NULL;
        CHECK((player->end.qp = ibv_create_qp(player->end.pd, &wanted)));
        CHECK((player->memory = malloc(size)) && (player->area = calloc(1, AREA)) &&
              (player->mirror = calloc(1, AREA)));
        CHECK((player->region = ibv_reg_mr(player->end.pd, player->memory, size, IBV_ACCESS_LOCAL_WRITE)));
        CHECK((player->area_region = ibv_reg_mr(player->end.pd, player->area, AREA, ALL_ACCESS)));
        for (int i = 0; i < OPEN; i++) {
                player->slots[i].bytes = player->memory + (size_t)i * MOST;
                CHECK((player->slots[i].expected = malloc(MOST)));
        }
        shared->ends[side].area = (uintptr_t)player->area;
        shared->ends[side].key = player->area_region->rkey;
        atomic_store(&shared->ends[side].number, player->end.qp->qp_num);
        while (!atomic_load(&shared->ends[!side].number))
                sched_yield();
        become_ready(player->end.qp, usual_attributes(atomic_load(&shared->ends[!side].number)));
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

static void play_threads(void)
{
        pthread_t other;

        CHECK(pthread_create(&other, NULL, play, &shared) == 0);
        play(NULL);
        CHECK(pthread_join(other, NULL) == 0);
}

static void play_processes(void)
{
        pid_t child = fork();
        int status;

        CHECK(child >= 0);
        if (!child) {
                play(&shared);
                _exit(0);
        }
        play(NULL);
        CHECK(waitpid(child, &status, 0) == child && status == 0);
}

/* --- threads that share queue pairs */

enum { POSTERS = 3, ROUND = 8 };

static struct end both[2];
/* The word of each end, what each request of a thread read of it, and where it was told. */
static struct {
        uint64_t words[2], read[POSTERS][ROUND], told[POSTERS][ROUND];
} counted;
static struct ibv_mr *counted_region[2];
static _Atomic uint64_t asked_for[2], posted_in_all, complete_in_all, received_in_all;
static _Atomic uint32_t complete_of[POSTERS];

static void take_any(struct end *end)
{
        struct ibv_wc wcs[4];
        int count = ibv_poll_cq(end->sent, 4, wcs);

        for (int i = 0; i < count; i++) {
                CHECK(wcs[i].status == IBV_WC_SUCCESS && wcs[i].wr_id < POSTERS);
                atomic_fetch_add(&complete_of[wcs[i].wr_id], 1);
                atomic_fetch_add(&complete_in_all, 1);
        }
        count = ibv_poll_cq(end->received, 4, wcs);
        for (int i = 0; i < count; i++) {
                struct ibv_recv_wr again = {0}, *bad;

                CHECK(wcs[i].status == IBV_WC_SUCCESS && wcs[i].byte_len == 8);
                atomic_fetch_add(&received_in_all, 1);
                CHECK(ibv_post_recv(end->qp, &again, &bad) == 0);
        }
}

/* Count, and tell what there was by a write with immediate data, in one list. */
static void post_count(int side, uint64_t poster, int place)
{
        struct ibv_sge list = {
            .addr = (uintptr_t)&counted.read[poster][place], .length = 8, .lkey = counted_region[side]->lkey};
        struct ibv_send_wr tell = {.wr_id = poster,
                                   .sg_list = &list,
                                   .num_sge = 1,
                                   .opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
                                   .send_flags = IBV_SEND_SIGNALED | IBV_SEND_FENCE};
        struct ibv_send_wr count = {.wr_id = poster,
                                    .next = &tell,
                                    .sg_list = &list,
                                    .num_sge = 1,
                                    .opcode = IBV_WR_ATOMIC_FETCH_AND_ADD,
                                    .send_flags = IBV_SEND_SIGNALED};
        struct ibv_send_wr *bad;

        tell.wr.rdma.remote_addr = (uintptr_t)&counted.told[poster][place];
        tell.wr.rdma.rkey = counted_region[!side]->rkey;
        count.wr.atomic.remote_addr = (uintptr_t)&counted.words[!side];
        count.wr.atomic.rkey = counted_region[!side]->rkey;
        count.wr.atomic.compare_add = 1;
        CHECK(ibv_post_send(both[side].qp, &count, &bad) == 0);
        atomic_fetch_add(&asked_for[!side], 1);
        atomic_fetch_add(&posted_in_all, 2);
}

static void *post_counts(void *argument)
{
        uint64_t poster = (uintptr_t)argument, random = seed + poster, rounds = 0;

        while (time(NULL) < end_of_test || rounds < 20) {
                uint32_t wanted = 0;

                CHECK(time(NULL) < end_of_test + PATIENCE);
                for (int i = 0; i < ROUND; i++, wanted += 2)
                        post_count((int)any(&random, 2), poster, i);
                while (atomic_load(&complete_of[poster]) != wanted)
                        take_any(&both[any(&random, 2)]);
                CHECK(memcmp(counted.told[poster], counted.read[poster], sizeof counted.read[poster]) == 0);
                atomic_store(&complete_of[poster], 0);
                rounds++;
        }
        return NULL;
}

static void play_posters(void)
{
        const struct ibv_qp_cap cap = {
            .max_send_wr = 2 * POSTERS * ROUND, .max_recv_wr = OPEN, .max_send_sge = 1, .max_recv_sge = 1};
        struct ibv_context *context = open_device();
        pthread_t threads[POSTERS];

        for (int i = 0; i < 2; i++) {
                make_end(&both[i], context, cap, false);
                both[i].qp->qp_context = i ? &shared : NULL;
                CHECK((counted_region[i] = ibv_reg_mr(both[i].pd, &counted, sizeof counted, ALL_ACCESS)));
        }
        for (int i = 0; i < 2; i++) {
                struct ibv_recv_wr receive = {0}, *bad;

                become_ready(both[i].qp, usual_attributes(both[!i].qp->qp_num));
                for (int j = 0; j < OPEN; j++)
                        CHECK(ibv_post_recv(both[i].qp, &receive, &bad) == 0);
        }
        for (uintptr_t i = 0; i < POSTERS; i++)
                CHECK(pthread_create(&threads[i], NULL, post_counts, (void *)i) == 0);
        for (int i = 0; i < POSTERS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        while (2 * atomic_load(&received_in_all) != atomic_load(&posted_in_all))
                for (int i = 0; i < 2; i++)
                        take_any(&both[i]);
        CHECK(atomic_load(&complete_in_all) == atomic_load(&posted_in_all));
        for (int i = 0; i < 2; i++) {
                CHECK(counted.words[i] == atomic_load(&asked_for[i]));
                CHECK(ibv_dereg_mr(counted_region[i]) == 0);
                destroy_end(&both[i]);
        }
        CHECK(ibv_close_device(context) == 0);
}

/* --- hostile */

enum { GUARD = 4096, GIVEN = 8192 };

/* What the other side is given, with memory around it that it is not. */
struct victim {
        struct end end;
        unsigned char *memory; /* GUARD, GIVEN to write, GIVEN to read, GUARD */
        struct ibv_mr *writable, *readable, *own;
};

static void make_victim(struct victim *victim)
{
        const struct ibv_qp_cap cap = {
            .max_send_wr = OPEN, .max_recv_wr = RECEIVES, .max_send_sge = 4, .max_recv_sge = 4};
        struct ibv_pd *pd;

        make_end(&victim->end, open_device(), cap, true);
        pd = victim->end.pd;
        CHECK((victim->memory = malloc(2 * GUARD + 2 * GIVEN)));
        memset(victim->memory, 0x77, 2 * GUARD + 2 * GIVEN);
        CHECK((victim->writable = ibv_reg_mr(pd, victim->memory + GUARD, GIVEN, ALL_ACCESS)));
        CHECK((victim->readable =
                   ibv_reg_mr(pd, victim->memory + GUARD + GIVEN, GIVEN, IBV_ACCESS_REMOTE_READ)));
        CHECK((victim->own = ibv_reg_mr(pd, victim->memory, 2 * GUARD + 2 * GIVEN, IBV_ACCESS_LOCAL_WRITE)));
}

/* Mostly a length that is allowed at this place. */
static uint32_t length_at(uint64_t place, uint64_t *random, uint32_t piece)
{
        uint64_t most = any(random, 60) ? GIVEN - place : 3 * GIVEN / 2;

        return (uint32_t)any(random, (most < piece ? most : piece) + 1);
}

/* A record that is valid, if not always allowed. */
static struct record some_record(const struct victim *victim, uint64_t *random, uint32_t piece)
{
        static const uint8_t usual[] = {RECORD_SEND, RECORD_WRITE, RECORD_WRITE, RECORD_READ,
                                        RECORD_SWAP, RECORD_ADD,   RECORD_CREDIT};
        const uint32_t keys[] = {victim->readable->rkey, victim->own->rkey,
                                 (uint32_t)any(random, UINT32_MAX)};
        uint64_t place = any(random, GIVEN / 8) * 8;
        struct record record = {.operation = any(random, 80)
                                                 ? usual[any(random, 7)]
                                                 : (uint8_t)(1 + any(random, RECORD_OPERATIONS - 1)),
                                .psn = (uint32_t)any(random, 8),
                                .rkey = any(random, 80) ? victim->writable->rkey : keys[any(random, 3)],
                                .address = (uintptr_t)victim->memory + GUARD + place};

        switch (record.operation) {
        case RECORD_SEND:
                record.rkey = 0;
                record.address = 0;
                __attribute__((fallthrough));
        case RECORD_WRITE:
                record.length = record.total = length_at(place, random, piece);
                record.flags = RECORD_FIRST | RECORD_LAST;
                if (any(random, 4) == 0) {
                        record.flags |= RECORD_IMMEDIATE;
                        record.immediate = 3;
                }
                break;
        case RECORD_READ:
                record.rkey = any(random, 2) ? record.rkey : victim->readable->rkey;
                record.address += record.rkey == victim->readable->rkey ? GIVEN : 0;
                record.total = length_at(place, random, piece);
                break;
        case RECORD_SWAP:
        case RECORD_ADD:
                record.total = 8;
                record.length = record.operation == RECORD_SWAP ? 16 : 8;
                record.address += any(random, 50) == 0;
                break;
        case RECORD_REFUSED:
                record.immediate = 1 + (uint32_t)any(random, 3);
                __attribute__((fallthrough));
        default:
                record.rkey = 0;
                record.address = 0;
                record.length = record.operation == RECORD_RESPONSE ? (uint32_t)any(random, 2) * 100 : 0;
                record.total = record.operation == RECORD_CREDIT ? (uint32_t)any(random, 1000) : 0;
                record.psn *= record.operation != RECORD_CREDIT && record.operation != RECORD_CLOSE;
        }
        return record;
}

static unsigned char garbage[3 * GIVEN];

static void put(struct record_sender *sender, struct record record)
{
        struct iovec vec = {.iov_base = garbage, .iov_len = sizeof garbage};
        struct cursor cursor = {.vec = &vec};

        if (record_put(sender, &record, &cursor) == RECORD_OK)
                record_publish(sender);
}

/* A message or a write in pieces, of which the last may be missing. */
static void put_pieces(struct record_sender *sender, struct record record, uint64_t *random)
{
        uint32_t first = record.length / 2;

        record.flags = RECORD_FIRST;
        record.immediate = 0;
        record.length = first;
        put(sender, record);
        if (any(random, 40) == 0)
                return;
        record.flags = RECORD_LAST;
        record.length = record.total - first;
        record.address += record.operation == RECORD_WRITE ? first : 0;
        put(sender, record);
}

/* Take what the victim asks for, and mostly answer as it is right. */
static void answer(struct record_sender *sender, struct record_receiver *receiver, uint64_t *random)
{
        while (any(random, 8) && record_next(receiver) == RECORD_OK) {
                const struct record *record = &receiver->now;
                bool asks = record->operation == RECORD_READ || record->operation == RECORD_SWAP ||
                            record->operation == RECORD_ADD;

                if (asks && any(random, 50))
                        put(sender, (struct record){.operation = RECORD_RESPONSE,
                                                    .psn = record->psn + (any(random, 50) == 0),
                                                    .length = record->total + (any(random, 50) == 0)});
                record_done(receiver);
        }
}

/* One step of the other side, with `sender` as its part of the ring. */
static void attack(const struct victim *victim, struct record_sender *sender,
                   struct record_receiver *receiver, uint64_t *random)
{
        struct ring *out = sender->view.ring, *in = receiver->view.ring;
        struct record record = some_record(victim, random, record_piece(&sender->view));

        memset(garbage, (int)any(random, 256), sizeof garbage);
        answer(sender, receiver, random);
        if (record.operation <= RECORD_WRITE && record.length > 1 && any(random, 3) == 0)
                put_pieces(sender, record, random);
        else
                put(sender, record);
        switch (any(random, 1000)) {
        case 0:
                atomic_store(&in->head, any(random, UINT64_MAX));
                break;
        case 1:
                atomic_store(&out->tail, any(random, UINT64_MAX));
                break;
        case 2:
                atomic_store(&out->base, any(random, UINT64_MAX));
                break;
        case 3:
                ((unsigned char *)out)[RING_HEADER + any(random, SMALL_SIZE)] ^=
                    (unsigned char)any(random, 256);
                break;
        case 4:
                atomic_fetch_add(&out->tail, 8 * any(random, 100));
                break;
        default:
                break;
        }
}

/* What the victim itself does meanwhile. */
static void act(struct victim *victim, uint64_t *random)
{
        static const enum ibv_wr_opcode opcodes[] = {IBV_WR_SEND, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ,
                                                     IBV_WR_ATOMIC_FETCH_AND_ADD};
        struct ibv_sge part = {.addr = (uintptr_t)victim->memory + GUARD,
                               .length = 8 + (uint32_t)any(random, 2) * 92,
                               .lkey = victim->own->lkey};
        struct ibv_recv_wr receive = {.sg_list = &part, .num_sge = 1}, *bad_receive;
        struct ibv_send_wr wr = {.sg_list = &part, .num_sge = 1, .opcode = opcodes[any(random, 4)]}, *bad;
        struct ibv_wc wcs[16];
        int error;

        /* Received messages may be as long as what is given to write. */
        part.length = any(random, 50) ? GIVEN : part.length;
        error = ibv_post_recv(victim->end.qp, &receive, &bad_receive);
        CHECK(error == 0 || error == ENOMEM);
        part.length = part.length > 100 ? 100 : part.length;
        error = ibv_post_send(victim->end.qp, &wr, &bad);
        CHECK(error == 0 || error == ENOMEM);
        ibv_poll_cq(victim->end.sent, 16, wcs);
        ibv_poll_cq(victim->end.received, 16, wcs);
}

static void check_guards(const struct victim *victim)
{
        for (int i = 0; i < GUARD; i++)
                CHECK(victim->memory[i] == 0x77);
        for (int i = GUARD + GIVEN; i < 2 * GUARD + 2 * GIVEN; i++)
                CHECK(victim->memory[i] == 0x77);
}

static void drain(struct victim *victim)
{
        struct ibv_wc wc;

        while (ibv_poll_cq(victim->end.sent, 1, &wc) || ibv_poll_cq(victim->end.received, 1, &wc))
                ;
}

static void play_hostile(void)
{
        uint64_t random = seed, rounds = 0, steps = 0;
        struct victim victim;

        make_victim(&victim);
        while (time(NULL) < end_of_test || rounds < 50) {
                struct record_sender sender;
                struct record_receiver receiver;
                struct ibv_async_event event;

                for (int i = 0; i < 2; i++)
                        memset((void *)shared->rings.views[i].ring, 0, PAGE);
                atomic_store(&shared->rings.views[0].ring->ready, 1);
                become_ready(victim.end.qp, usual_attributes(1));
                record_send_from(&sender, shared->rings.views[1]);
                record_receive_from(&receiver, shared->rings.views[0]);
                for (int i = 0; i < 1000 && victim.end.qp->state == IBV_QPS_RTS; i++, steps++) {
                        attack(&victim, &sender, &receiver, &random);
                        if (any(&random, 2))
                                act(&victim, &random);
                }
                check_guards(&victim);
                CHECK(modify(victim.end.qp, IBV_QPS_RESET, usual_attributes(1), IBV_QP_STATE) == 0);
                drain(&victim);
                while (completions_are_there(&cq_of(victim.end.sent)->completions))
                        drain(&victim);
                /* Events are read as they come, without waiting for one. */
                while (opened_of(victim.end.context)->events.first &&
                       ibv_get_async_event(victim.end.context, &event) == 0)
                        ibv_ack_async_event(&event);
                rounds++;
        }
        CHECK(ibv_dereg_mr(victim.writable) == 0 && ibv_dereg_mr(victim.readable) == 0);
        CHECK(ibv_dereg_mr(victim.own) == 0);
        destroy_end(&victim.end);
        free(victim.memory);
        CHECK(ibv_close_device(victim.end.context) == 0);
        if (getenv("QUEUE_TORTURE_COUNT"))
                fprintf(stderr, "%llu rounds, %llu steps\n", (unsigned long long)rounds,
                        (unsigned long long)steps);
}

int main(int count, char **arguments)
{
        if (count != 5)
                return 2;
        remote = strcmp(arguments[2], "remote") == 0;
        end_of_test = time(NULL) + atoi(arguments[3]);
        seed = strtoull(arguments[4], NULL, 0);
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED);
        shared->rings = new_rings(remote);
        queue_pairer = &pairer;
        if (strcmp(arguments[1], "threads") == 0)
                play_threads();
        else if (strcmp(arguments[1], "processes") == 0)
                play_processes();
        else if (strcmp(arguments[1], "posters") == 0)
                play_posters();
        else if (strcmp(arguments[1], "hostile") == 0)
                play_hostile();
        else
                return 2;
        return 0;
}
