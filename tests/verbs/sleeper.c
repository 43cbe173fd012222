/* Processes whose queue pairs the router pairs.
 *
 *      sleeper
 *      sleeper peer
 *
 * sleeper: one of its two queue pairs writes into memory of the other while the program polls
 * nothing but that memory: somebody else has to execute the write. Then nothing happens for a
 * second, and no thread of the process may wake up more often than now and then.
 *
 * peer: prints the number of a queue pair, reads that of another process's, and sends to it, which
 * has no receive. Then it prints what becomes of its requests and the event that it gets.
 */
#include "connecting.h"

#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, WAKINGS = 8, ROUNDS = 200 };

static struct ibv_qp *queues[2];
static struct ibv_cq *cq;
static union ibv_gid gid;

static void connect_one(struct ibv_qp *queue, uint32_t peer)
{
        struct ibv_qp_attr attributes = usual_attributes(peer);

        attributes.qp_access_flags = ACCESS;
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1;
        attributes.timeout = 20;
        attributes.ah_attr.grh.dgid = gid;
        become_ready(queue, attributes);
}

/* Two of them, connected with one another or not. */
static struct ibv_pd *make_queues(bool connected)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        struct ibv_context *context;
        struct ibv_qp_init_attr wanted = {
            .qp_type = IBV_QPT_RC, .cap = {.max_send_wr = 4, .max_send_sge = 1}, .sq_sig_all = 1};
        struct ibv_pd *pd;

        CHECK(list && list[0] && (context = ibv_open_device(list[0])) && (pd = ibv_alloc_pd(context)));
        CHECK((cq = ibv_create_cq(context, 16, NULL, NULL, 0)) && ibv_query_gid(context, 1, 0, &gid) == 0);
        wanted.send_cq = wanted.recv_cq = cq;
        for (int i = 0; i < 2; i++)
                CHECK((queues[i] = ibv_create_qp(pd, &wanted)));
        for (int i = 0; i < 2 && connected; i++)
                connect_one(queues[i], queues[!i]->qp_num);
        return pd;
}

/* How often the threads of this process have gone to sleep. */
static long sleeps(void)
{
        DIR *tasks = opendir("/proc/self/task");
        struct dirent *task;
        char path[300], line[200];
        long sum = 0, one;

        while ((task = readdir(tasks))) {
                FILE *file;

                snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
                file = task->d_name[0] == '.' ? NULL : fopen(path, "r");
                while (file && fgets(line, sizeof line, file))
                        if (sscanf(line, "voluntary_ctxt_switches: %ld", &one) == 1)
                                sum += one;
                if (file)
                        fclose(file);
        }
        closedir(tasks);
        return sum;
}

/* Write into memory that the program watches, and take no completion before. */
static void write_and_watch(struct ibv_mr *region, uint64_t number)
{
        volatile uint64_t *words = region->addr;
        struct ibv_sge from = {.addr = (uintptr_t)region->addr, .length = 8, .lkey = region->lkey};
        struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE,
                                 .sg_list = &from,
                                 .num_sge = 1,
                                 .wr.rdma = {(uintptr_t)region->addr + 8, region->rkey}},
                           *bad;
        time_t end = time(NULL) + 30;
        struct ibv_wc wc;

        words[0] = number;
        CHECK(ibv_post_send(queues[0], &wr, &bad) == 0);
        while (words[1] != number)
                CHECK(time(NULL) < end);
        while (!ibv_poll_cq(cq, 1, &wc))
                CHECK(time(NULL) < end);
        CHECK(wc.status == IBV_WC_SUCCESS);
}

static void sleep_for_a_while(void)
{
        static uint64_t words[2];
        struct ibv_mr *region = ibv_reg_mr(make_queues(true), words, sizeof words, ACCESS);
        long before;

        CHECK(region);
        for (uint64_t i = 1; i <= ROUNDS; i++)
                write_and_watch(region, i);
        usleep(300000);
        before = sleeps();
        sleep(1);
        if (sleeps() - before > WAKINGS)
                fprintf(stderr, "%ld wakings\n", sleeps() - before);
        CHECK(sleeps() - before <= WAKINGS);
        for (int i = 0; i < 2; i++)
                CHECK(ibv_destroy_qp(queues[i]) == 0);
}

static void send_to_another(void)
{
        struct ibv_send_wr wr = {.opcode = IBV_WR_SEND}, *bad;
        struct ibv_async_event event;
        struct ibv_context *context;
        struct ibv_wc wcs[2];
        uint32_t number;
        int got = 0;

        make_queues(false);
        context = queues[0]->context;
        printf("%u\n", queues[0]->qp_num);
        fflush(stdout);
        CHECK(scanf("%u", &number) == 1);
        connect_one(queues[0], number);
        for (int i = 0; i < 2; i++)
                CHECK(ibv_post_send(queues[0], &wr, &bad) == 0);
        printf("sent\n");
        fflush(stdout);
        while (got < 2) {
                got += ibv_poll_cq(cq, 2 - got, wcs + got);
                usleep(1000);
        }
        CHECK(ibv_get_async_event(context, &event) == 0);
        printf("%s, %s, %s\n", ibv_wc_status_str(wcs[0].status), ibv_wc_status_str(wcs[1].status),
               ibv_event_type_str(event.event_type));
        ibv_ack_async_event(&event);
}

int main(int count, char **arguments)
{
        (void)arguments;
        if (count == 1)
                sleep_for_a_while();
        else
                send_to_another();
        return 0;
}
