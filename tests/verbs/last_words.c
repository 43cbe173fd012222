/* A process that ends at the moment at which its program can see what a peer's request has done:
 * the request was executed, so it completes at the peer, as it does where a device acknowledges it.
 *
 *      last_words
 *
 * The process that ends is a child. Between its library's steps it looks as another thread of its
 * program would: when a completion is in its queue, or bytes are in its memory. If that is the last
 * one that it waits for it ends at once, whatever its library would have done next.
 */
#include "queue_bed.h"

enum { SIZE = 300000, OPEN = 8, RECEIVES = 150, MOST_SECONDS = 60, THE_WORD = 1000000 /* of atomics */ };

/* What the two processes tell each other. */
static struct board {
        _Atomic uint32_t numbers[2];
        _Atomic uint64_t area; /* of the child */
        _Atomic uint32_t key;
        _Atomic uint32_t taken; /* completions of the child's receives */
        _Atomic bool none_left; /* of the parent's receives, one of which the child knows */
        _Atomic bool sent;      /* by the child, for that one */
} * board;

static struct rings rings;
static bool second; /* this is the child */

/* --- the child's other thread */

static uint32_t receives_left;          /* 0: it waits for none */
static const _Atomic uint64_t *watched; /* NULL: it waits for no bytes */

enum completion_outcome __real_completions_put(struct completions *queue, const struct ibv_wc *completion,
                                               bool solicited, bool polling);
enum completion_outcome __wrap_completions_put(struct completions *queue, const struct ibv_wc *completion,
                                               bool solicited, bool polling);

enum completion_outcome __wrap_completions_put(struct completions *queue, const struct ibv_wc *completion,
                                               bool solicited, bool polling)
{
        enum completion_outcome outcome = __real_completions_put(queue, completion, solicited, polling);

        if (receives_left && completion->opcode & IBV_WC_RECV && !--receives_left)
                _exit(completion->status == IBV_WC_SUCCESS ? 0 : 1);
        return outcome;
}

/* Called when a record's bytes were copied to where they belong. */
void __real_key_release(struct keys *table, uint32_t key);
void __wrap_key_release(struct keys *table, uint32_t key);

void __wrap_key_release(struct keys *table, uint32_t key)
{
        if (watched && atomic_load(watched))
                _exit(0);
        __real_key_release(table, key);
}

/* Called when what was put is published. The word of an atomic operation has changed by then. */
static bool watches_word;
void __real_queue_publish_put(struct queue_pair *queue);
void __wrap_queue_publish_put(struct queue_pair *queue);

void __wrap_queue_publish_put(struct queue_pair *queue)
{
        if (watches_word && atomic_load(watched))
                _exit(0);
        __real_queue_publish_put(queue);
}

/* --- pairing: the rings are there already */

static void ask(struct queue_pair *queue)
{
        queue_pair_up(queue, rings.views[second], rings.views[!second], &nowhere, false);
}

static void leave(struct queue_pair *queue)
{
        (void)queue;
}

static const struct queue_pairer pairer = {
    .ask = ask, .ask_again = ask_again, .listen = listen_to_nobody, .ring = ring, .leave = leave};

/* --- an end */

static struct end end;
static unsigned char *memory;
static struct ibv_mr *region;

static void start(bool shared, int receives)
{
        struct ibv_qp_init_attr wanted = {.qp_type = IBV_QPT_RC,
                                          .sq_sig_all = 1,
                                          .cap = {.max_send_wr = 2 * RECEIVES,
                                                  .max_recv_wr = 2 * RECEIVES,
                                                  .max_send_sge = 1,
                                                  .max_recv_sge = 1}};
        struct ibv_srq_init_attr many = {.attr = {.max_wr = 2 * RECEIVES, .max_sge = 1}};
        struct ibv_qp_attr attributes;
        struct ibv_recv_wr receive = {.num_sge = 1}, *bad;
        struct ibv_sge to;

        queue_pairer = &pairer;
        end.context = open_device();
        CHECK((end.pd = ibv_alloc_pd(end.context)));
        CHECK((end.sent = wanted.send_cq = ibv_create_cq(end.context, 2 * RECEIVES, NULL, NULL, 0)));
        CHECK((end.received = wanted.recv_cq = ibv_create_cq(end.context, 2 * RECEIVES, NULL, NULL, 0)));
        CHECK(!shared || (wanted.srq = ibv_create_srq(end.pd, &many)));
        CHECK((end.qp = ibv_create_qp(end.pd, &wanted)));
        CHECK((memory = calloc(1, SIZE)) && (region = ibv_reg_mr(end.pd, memory, SIZE, ALL_ACCESS)));
        to = (struct ibv_sge){.addr = (uintptr_t)memory + 8, .length = SIZE - 8, .lkey = region->lkey};
        receive.sg_list = &to;
        atomic_store(&board->numbers[second], end.qp->qp_num);
        while (!atomic_load(&board->numbers[!second]))
                usleep(100);
        attributes = usual_attributes(atomic_load(&board->numbers[!second]));
        attributes.timeout = 1;
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = OPEN;
        CHECK(modify(end.qp, IBV_QPS_INIT, attributes, INIT_MASK) == 0);
        for (int i = 0; i < receives; i++)
                CHECK((shared ? ibv_post_srq_recv(wanted.srq, &receive, &bad)
                              : ibv_post_recv(end.qp, &receive, &bad)) == 0);
        CHECK(modify(end.qp, IBV_QPS_RTR, attributes, RTR_MASK) == 0);
        CHECK(modify(end.qp, IBV_QPS_RTS, attributes, RTS_MASK) == 0);
        if (second) {
                atomic_store(&board->area, (uintptr_t)memory);
                atomic_store(&board->key, region->rkey);
        }
        while (!atomic_load(&board->key))
                usleep(100);
}

static void post(enum ibv_wr_opcode opcode, uint32_t length)
{
        struct ibv_sge list = {.addr = (uintptr_t)memory, .length = length, .lkey = region->lkey};
        struct ibv_send_wr wr = {.opcode = opcode, .sg_list = &list, .num_sge = 1}, *bad;

        if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
                wr.wr.atomic.compare_add = 1;
                wr.wr.atomic.remote_addr = atomic_load(&board->area);
                wr.wr.atomic.rkey = atomic_load(&board->key);
        } else {
                wr.wr.rdma.remote_addr = atomic_load(&board->area) + 8;
                wr.wr.rdma.rkey = atomic_load(&board->key);
        }
        CHECK(ibv_post_send(end.qp, &wr, &bad) == 0);
}

/* --- cases */

/* What the child's program waits for, and what is posted: up to that, and more. */
struct step {
        enum ibv_wr_opcode opcode;
        uint32_t length;
};

static const struct {
        uint32_t receives;
        uint32_t watched; /* the last byte of so many, of a WRITE; 0: none */
        struct step steps[5];
        int executed; /* of the requests */
} cases[] = {
    {1, 0, {{IBV_WR_SEND, 1}}, 1},
    {1, 0, {{IBV_WR_SEND, 100000}}, 1},
    {2, 0, {{IBV_WR_SEND, 8}, {IBV_WR_SEND, 8}, {IBV_WR_SEND, 8}}, 2},
    {1, 0, {{IBV_WR_RDMA_WRITE_WITH_IMM, 0}}, 1},
    {1, 0, {{IBV_WR_RDMA_WRITE_WITH_IMM, 100000}}, 1},
    {1, 0, {{IBV_WR_RDMA_READ, 100000}, {IBV_WR_SEND, 8}}, 2},
    {1, 0, {{IBV_WR_RDMA_READ, 8}, {IBV_WR_ATOMIC_FETCH_AND_ADD, 8}, {IBV_WR_RDMA_WRITE_WITH_IMM, 8}}, 3},
    {0, 1, {{IBV_WR_RDMA_WRITE, 1}}, 1},
    {0, 8, {{IBV_WR_RDMA_WRITE, 8}, {IBV_WR_RDMA_WRITE, 8}}, 1},
    {0, 70001, {{IBV_WR_RDMA_WRITE, 70001}}, 1},
    {0, 200, {{IBV_WR_RDMA_READ, 8}, {IBV_WR_RDMA_WRITE, 200}}, 2},
    {0, 200, {{IBV_WR_SEND, 8}, {IBV_WR_ATOMIC_FETCH_AND_ADD, 8}, {IBV_WR_RDMA_WRITE, 200}}, 3},
    {0, THE_WORD, {{IBV_WR_ATOMIC_FETCH_AND_ADD, 8}}, 1},
    {0, THE_WORD, {{IBV_WR_ATOMIC_FETCH_AND_ADD, 8}, {IBV_WR_ATOMIC_FETCH_AND_ADD, 8}}, 1},
    {0, THE_WORD, {{IBV_WR_RDMA_READ, 8}, {IBV_WR_ATOMIC_FETCH_AND_ADD, 8}, {IBV_WR_SEND, 8}}, 2},
};

enum { CASES = sizeof cases / sizeof *cases };

static void execute_and_end(int number)
{
        unsigned char *last;

        start(number % 2, RECEIVES);
        receives_left = cases[number / 2].receives;
        if (cases[number / 2].watched == THE_WORD) {
                watched = (const _Atomic uint64_t *)(void *)memory;
                watches_word = true;
        } else if (cases[number / 2].watched) {
                last = memory + 8 + cases[number / 2].watched - 1;
                watched = (const _Atomic uint64_t *)(void *)(last - (uintptr_t)last % 8);
        }
        for (;;)
                CHECK(ibv_poll_cq(end.received, 1, &(struct ibv_wc){0}) >= 0);
}

/* The child is gone, as a router or a relay says. */
static void tell_loss(bool remote)
{
        if (remote)
                atomic_store(&rings.views[1].ring->over, 1);
        else
                queue_lose(queue_of(end.qp));
}

static void expect(int executed, int posted)
{
        for (int i = 0; i < posted; i++) {
                enum ibv_wc_status status = wait_for(end.sent, NULL).status;

                CHECK(status == (i < executed    ? IBV_WC_SUCCESS
                                 : i == executed ? IBV_WC_RETRY_EXC_ERR
                                                 : IBV_WC_WR_FLUSH_ERR));
        }
}

static void wait_for_child(pid_t child)
{
        int status;

        CHECK(waitpid(child, &status, 0) == child && status == 0);
}

/* It can be waited for afterwards. */
static bool has_ended(pid_t child)
{
        siginfo_t found = {0};

        CHECK(waitid(P_PID, (id_t)child, &found, WEXITED | WNOHANG | WNOWAIT) == 0);
        return found.si_pid;
}

static void check_case(int number, bool remote, pid_t child)
{
        int posted = 0;

        start(false, 0);
        memset(memory, 0x77, SIZE);
        for (const struct step *at = cases[number / 2].steps; at->length || !posted; at++, posted++)
                post(at->opcode, at->length);
        /* Rings of another host are small: all that does not fit is put while the child is there.
         */
        while (remote && queue_of(end.qp)->sends.next != queue_of(end.qp)->sends.tail && !has_ended(child))
                atomic_load(&cq_of(end.sent)->driver)->poll(cq_of(end.sent));
        wait_for_child(child);
        tell_loss(remote);
        expect(cases[number / 2].executed, posted);
        CHECK(cases[number / 2].watched != THE_WORD || *(const uint64_t *)(void *)memory == 0);
}

/* Many answers wait behind a message for which there is no receive: all are taken before the rest
 * is given up. */
static void answer_and_end(void)
{
        start(false, RECEIVES);
        for (uint32_t taken = 0; taken < RECEIVES; taken++) {
                CHECK(wait_for(end.received, end.sent).status == IBV_WC_SUCCESS);
                atomic_store(&board->taken, taken + 1);
                if (taken)
                        continue;
                while (!atomic_load(&board->none_left))
                        usleep(10);
                post(IBV_WR_SEND, 8);
                CHECK(queue_of(end.qp)->sends.next == queue_of(end.qp)->sends.tail);
                atomic_store(&board->sent, true);
        }
        /* Its library may be as slow as it likes to answer. */
        for (int i = 0; i < 1000; i++)
                CHECK(ibv_poll_cq(end.received, 1, &(struct ibv_wc){0}) == 0);
        _exit(0);
}

static void check_answers(bool remote, pid_t child)
{
        struct receive_work work;

        start(true, 1);
        for (uint32_t i = 0; i < RECEIVES; i++) {
                if (i == RECEIVES - 1)
                        post(IBV_WR_RDMA_READ, 8);
                post(IBV_WR_SEND, 0);
                /* The first one waits for the child's receives. From then on nothing is taken, and
                 * another queue pair has this one's receive. */
                if (!i) {
                        CHECK(wait_for(end.sent, NULL).status == IBV_WC_SUCCESS);
                        CHECK(queue_of(end.qp)->credit_told == 1);
                        CHECK(shared_take(queue_of(end.qp)->shared, &work));
                        atomic_store(&board->none_left, true);
                        while (!atomic_load(&board->sent))
                                usleep(10);
                }
                while (atomic_load(&board->taken) <= i)
                        usleep(10);
        }
        wait_for_child(child);
        tell_loss(remote);
        expect(RECEIVES, RECEIVES);
}

static void run(int number, bool remote)
{
        pid_t child;

        alarm(MOST_SECONDS);
        memset(board, 0, sizeof *board);
        rings = new_rings(remote);
        /* A relay publishes an answer later than the other side can see its word. */
        if (remote && number < 2 * CASES && cases[number / 2].watched == THE_WORD)
                return;
        child = fork();
        CHECK(child >= 0);
        if (!child) {
                second = true;
                alarm(MOST_SECONDS);
                if (number == 2 * CASES)
                        answer_and_end();
                else
                        execute_and_end(number);
        }
        if (number == 2 * CASES)
                check_answers(remote, child);
        else
                check_case(number, remote, child);
}

/* Each in a process of its own, which forks before it has a device. */
int main(void)
{
        bool all = true;

        board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(board != MAP_FAILED);
        for (int number = 0; number <= 2 * CASES; number++)
                for (int remote = 0; remote < 2; remote++) {
                        pid_t child = fork();
                        int status;

                        CHECK(child >= 0);
                        if (!child) {
                                run(number, remote);
                                _exit(0);
                        }
                        CHECK(waitpid(child, &status, 0) == child);
                        if (status)
                                fprintf(stderr, "case %d, %s queue, %s\n", number / 2,
                                        number % 2 ? "shared" : "own", remote ? "remote" : "local");
                        all &= status == 0;
                }
        return all ? 0 : 1;
}
