/* Two queue pairs that do everything at once, and one whose other side is hostile.
 *
 *      queue_torture threads|processes|posters|hostile local|remote|direct SECONDS SEED
 *
 * threads, processes: player.h.
 *
 * posters: threads share the two queue pairs, and post, receive and poll at the same time. They
 * count in one word, and each request completes once.
 *
 * hostile: the other side writes anything into the rings: valid records with wrong keys and bounds,
 * records that are not valid, and positions. Only memory that it was given a key for changes, and
 * the queue pair never gets stuck: it can be reset and connected again.
 */
#include "queue_bed.h"

#include "player.h"

static struct rings rings;
static bool remote;

/* --- pairing: the rings are there already */

static void ask(struct queue_pair *queue)
{
        bool second = queue->plain.qp_base.qp_context;

        queue_pair_up(queue, rings.views[second], rings.views[!second], &nowhere, direct_reacher != NULL);
}

static void leave(struct queue_pair *queue)
{
        (void)queue;
}

static const struct queue_pairer pairer = {
    .ask = ask, .ask_again = ask_again, .listen = listen_to_nobody, .ring = ring, .leave = leave};

static void go_on(struct ibv_qp *qp)
{
        reach_files(queue_of(qp));
}

static struct ibv_qp_attr attributes_of(int side)
{
        return usual_attributes(atomic_load(&shared->ends[!side].number));
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
        static const uint8_t usual[] = {RECORD_SEND, RECORD_WRITE, RECORD_WRITE,  RECORD_READ,
                                        RECORD_SWAP, RECORD_ADD,   RECORD_CREDIT, RECORD_ASK};
        const uint32_t keys[] = {victim->readable->rkey, victim->own->rkey,
                                 (uint32_t)any(random, UINT32_MAX)};
        uint64_t place = any(random, GIVEN / 8) * 8;
        struct record record = {.operation = any(random, 80)
                                                 ? usual[any(random, 8)]
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
        case RECORD_ASK:
                record.address = 0;
                record.psn = 0;
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

/* A file of the other side, with anything in its header. */
static struct extent_file hostile_file;

static void make_hostile_file(void)
{
        if (!hostile_file.memory)
                CHECK(bed_make((size_t)4 * PAGE, true, 0, &hostile_file));
}

static void write_header(uint64_t key)
{
        CHECK(pwrite(hostile_file.memfd, &key, sizeof key, 0) == sizeof key);
}

/* What the victim asks for is there, in any part of it, or in none, or in a file that is not this
 * side's to give, for which it has no token. */
static void put_direct(struct record_sender *sender, uint32_t key, uint64_t *random)
{
        struct record_direct direct = {.memory = any(random, 4) ? (uint64_t)getpid() << 32 | any(random, 16)
                                                                : any(random, UINT64_MAX),
                                       .token = any(random, UINT64_MAX),
                                       .base = any(random, UINT64_MAX),
                                       .length = any(random, UINT64_MAX),
                                       .offset = any(random, 2) ? PAGE : any(random, UINT64_MAX),
                                       .access = (uint32_t)any(random, 32),
                                       .later = any(random, 50) == 0};
        struct record record = {
            .operation = RECORD_DIRECT, .rkey = key + (any(random, 50) == 0), .length = sizeof direct};
        struct iovec vec = {.iov_base = &direct, .iov_len = sizeof direct};
        struct cursor cursor = {.vec = &vec};

        make_hostile_file();
        if (any(random, 2)) {
                direct.memory = hostile_file.memory;
                direct.token = hostile_file.token;
                write_header(any(random, 4) ? key : any(random, UINT64_MAX));
                if (any(random, 4)) {
                        direct.base = any(random, 4) ? 0 : direct.base;
                        direct.length = any(random, 5 * PAGE);
                        direct.offset = any(random, 5 * PAGE);
                }
        }
        if (any(random, 8) == 0)
                direct.memory = 0;
        if (record_put(sender, &record, &cursor) == RECORD_OK)
                record_publish(sender);
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
                if (record->operation == RECORD_ASK && any(random, 4))
                        put_direct(sender, record->rkey, random);
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
        if (wr.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
                wr.wr.atomic.remote_addr = any(random, PAGE) * 8;
                wr.wr.atomic.rkey = 1 + (uint32_t)any(random, 4);
        } else {
                wr.wr.rdma.remote_addr = any(random, 5 * PAGE);
                wr.wr.rdma.rkey = 1 + (uint32_t)any(random, 4);
        }
        error = ibv_post_send(victim->end.qp, &wr, &bad);
        CHECK(error == 0 || error == ENOMEM);
        reach_files(queue_of(victim->end.qp));
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
                        memset((void *)rings.views[i].ring, 0, PAGE);
                atomic_store(&rings.views[0].ring->ready, 1);
                become_ready(victim.end.qp, usual_attributes(1));
                record_send_from(&sender, rings.views[1]);
                record_receive_from(&receiver, rings.views[0]);
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
        use_direct_memory(strcmp(arguments[2], "direct") == 0);
        end_of_test = time(NULL) + atoi(arguments[3]);
        seed = strtoull(arguments[4], NULL, 0);
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED);
        rings = new_rings(remote);
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
