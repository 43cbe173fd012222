/* A process with queue pairs, which does what it is told line by line. Each line has one answer.
 *
 *      make                 a queue pair: its number, and the address and the key of its memory
 *      connect N ADDRESS KEY    the last one with number N, whose memory is there
 *      many COUNT           so many queue pairs: the first one's number, and so on as for make
 *      join N ADDRESS KEY   all of them, with those of numbers N and so on
 *      each poll|sleep      a write by each of them: how many have succeeded, and an error
 *      write COUNT          so many writes: how many have succeeded, and the first error
 *      sleep COUNT          the same, asleep until each is complete
 *      send COUNT           messages, for which the other side has no receive: the same
 *      flood poll|sleep     reads, writes and atomics without end; "begun", and when they fail how
 *                           each of those that were open has ended
 *      event                the next asynchronous event
 *      destroy              the last one
 *      part                 all that `many` has made are destroyed
 *      files COUNT          so many descriptors may be open from now on
 *      fork                 the child answers from now on: how polling its parent's queue fails
 *      breed COUNT          so many children, one after the other, which look at its memory
 *      discard              it discards some of its memory
 *      move                 it moves memory that is registered, too: where it is then
 *      confine              the process confines itself to certain system calls
 *      close                it closes all descriptors that it did not open
 */
#include "connecting.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
        OPEN = 16,
        WORDS = 2 * OPEN,
        LENGTH = 100000,
        PAGE_BYTES = 4096,
        MANY = 1024,
        SECONDS = 30,
        DESCRIPTORS = 1 << 16,
};

static struct ibv_context *context;
static struct ibv_comp_channel *channel;
static struct ibv_cq *cq;
static struct ibv_pd *pd;
static struct ibv_mr *region;
static struct ibv_qp *last, *many[MANY];
static int count_many;
static union ibv_gid gid;
static uint64_t peer_address;
static uint32_t peer_key;

static void open_device(void)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        void *memory;

        CHECK(list && list[0] && (context = ibv_open_device(list[0])));
        CHECK((pd = ibv_alloc_pd(context)) && (channel = ibv_create_comp_channel(context)));
        CHECK((cq = ibv_create_cq(context, 4 * MANY, NULL, channel, 0)));
        CHECK(ibv_query_gid(context, 1, 0, &gid) == 0);
        memory = mmap(NULL, 2 * LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED && (region = ibv_reg_mr(pd, memory, 2 * LENGTH, ALL_ACCESS)));
}

static void make(void)
{
        struct ibv_qp_init_attr wanted = {
            .qp_type = IBV_QPT_RC,
            .cap = {.max_send_wr = OPEN, .max_recv_wr = OPEN, .max_send_sge = 1, .max_recv_sge = 1},
            .sq_sig_all = 1};

        if (!context)
                open_device();
        wanted.send_cq = wanted.recv_cq = cq;
        CHECK((last = ibv_create_qp(pd, &wanted)));
}

static void say(uint32_t number)
{
        printf("%u %llu %u\n", number, (unsigned long long)(uintptr_t)region->addr, region->rkey);
}

static void make_many(int count)
{
        for (count_many = 0; count_many < count; count_many++) {
                make();
                many[count_many] = last;
                CHECK(last->qp_num == many[0]->qp_num + (uint32_t)count_many);
        }
        say(many[0]->qp_num);
}

static void connect_last(uint32_t number)
{
        struct ibv_qp_attr attributes = usual_attributes(number);

        attributes.ah_attr.grh.dgid = gid;
        become_ready(last, attributes);
}

static void post(enum ibv_wr_opcode opcode, uint32_t length)
{
        struct ibv_sge piece = {
            .addr = (uintptr_t)region->addr + LENGTH, .length = length, .lkey = region->lkey};
        struct ibv_send_wr wr = {.opcode = opcode, .sg_list = &piece, .num_sge = 1}, *bad;

        if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
                wr.wr.atomic.remote_addr = peer_address;
                wr.wr.atomic.compare_add = 1;
                wr.wr.atomic.rkey = peer_key;
        } else {
                wr.wr.rdma.remote_addr = peer_address;
                wr.wr.rdma.rkey = peer_key;
        }
        CHECK(ibv_post_send(last, &wr, &bad) == 0);
}

/* One completion. It fails if there is none for a long time. */
static struct ibv_wc wait_for_one(bool asleep)
{
        struct pollfd event = {.fd = channel->fd, .events = POLLIN};
        time_t end = time(NULL) + SECONDS;
        struct ibv_cq *told;
        struct ibv_wc wc;
        void *of_program;

        while (!ibv_poll_cq(cq, 1, &wc)) {
                CHECK(time(NULL) < end);
                if (!asleep)
                        continue;
                CHECK(ibv_req_notify_cq(cq, 0) == 0);
                if (ibv_poll_cq(cq, 1, &wc))
                        break;
                CHECK(poll(&event, 1, SECONDS * 1000) == 1);
                CHECK(ibv_get_cq_event(channel, &told, &of_program) == 0);
                ibv_ack_cq_events(cq, 1);
        }
        return wc;
}

static void write_each(bool asleep)
{
        enum ibv_wc_status status = IBV_WC_SUCCESS;
        int good = 0;

        for (int i = 0; i < count_many; i++) {
                last = many[i];
                post(IBV_WR_RDMA_WRITE, 8);
        }
        for (int i = 0; i < count_many; i++) {
                struct ibv_wc wc = wait_for_one(asleep);

                good += wc.status == IBV_WC_SUCCESS;
                status = wc.status == IBV_WC_SUCCESS ? status : wc.status;
        }
        printf("%d %s\n", good, ibv_wc_status_str(status));
}

static void do_some(enum ibv_wr_opcode opcode, int count, bool asleep)
{
        enum ibv_wc_status status = IBV_WC_SUCCESS;
        int good = 0;

        for (int i = 0; i < count && status == IBV_WC_SUCCESS; i++) {
                post(opcode, 8);
                status = wait_for_one(asleep).status;
                good += status == IBV_WC_SUCCESS;
        }
        printf("%d %s\n", good, ibv_wc_status_str(status));
}

static void flood(bool asleep)
{
        static const enum ibv_wr_opcode opcodes[] = {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ,
                                                     IBV_WR_ATOMIC_FETCH_AND_ADD};
        static const uint32_t lengths[] = {LENGTH, 8, 1000};
        enum ibv_wc_status status;
        uint32_t number = 0;

        for (; number < OPEN; number++)
                post(opcodes[number % 3], number % 3 == 2 ? 8 : lengths[number / 3 % 3]);
        puts("begun");
        fflush(stdout);
        while ((status = wait_for_one(asleep).status) == IBV_WC_SUCCESS) {
                post(opcodes[number % 3], number % 3 == 2 ? 8 : lengths[number / 3 % 3]);
                number++;
        }
        printf("%s", ibv_wc_status_str(status));
        for (int i = 1; i < OPEN; i++)
                printf(", %s", ibv_wc_status_str(wait_for_one(asleep).status));
        puts("");
}

static void event(void)
{
        struct pollfd waits = {.fd = context->async_fd, .events = POLLIN};
        struct ibv_async_event found;

        CHECK(poll(&waits, 1, SECONDS * 1000) == 1 && ibv_get_async_event(context, &found) == 0);
        puts(ibv_event_type_str(found.event_type));
        ibv_ack_async_event(&found);
}

/* What it has of its parent's fails, and can be given up. */
static void become_child(void)
{
        pid_t child = fork();
        struct ibv_wc wc;
        int status;

        if (child) {
                waitpid(child, &status, 0);
                CHECK(status == 0);
                return;
        }
        printf("%d\n", ibv_poll_cq(cq, 1, &wc));
        CHECK(ibv_destroy_qp(last) == 0 && ibv_dereg_mr(region) == 0 && ibv_destroy_cq(cq) == 0);
        CHECK(ibv_destroy_comp_channel(channel) == 0 && ibv_dealloc_pd(pd) == 0);
        CHECK(ibv_close_device(context) == 0);
        context = NULL;
}

/* Children have the memory as it was when they were made, and nothing of what the peer or either
 * side writes later. */
static void breed(int count)
{
        const size_t bytes = (size_t)2 * LENGTH;
        unsigned char *memory = region->addr, *copy = malloc(bytes);
        int status;

        CHECK(copy);
        for (int i = 0; i < count; i++) {
                pid_t child;

                memset(memory + LENGTH, i, LENGTH);
                child = fork();
                if (!child) {
                        for (int j = 0; j < LENGTH; j++)
                                CHECK(memory[LENGTH + j] == (unsigned char)i);
                        memcpy(copy, memory, bytes);
                        usleep(10000);
                        CHECK(memcmp(copy, memory, bytes) == 0);
                        memset(memory, 0xff, bytes);
                        _exit(0);
                }
                memset(memory + LENGTH, i + 1, LENGTH);
                CHECK(waitpid(child, &status, 0) == child && status == 0);
                for (int j = 0; j < LENGTH; j++)
                        CHECK(memory[LENGTH + j] == (unsigned char)(i + 1));
        }
        free(copy);
        puts("bred");
}

/* What the program discards reads as 0. */
static void discard(void)
{
        volatile unsigned char *memory = region->addr;

        memset(region->addr, 7, LENGTH);
        CHECK(madvise(region->addr, PAGE_BYTES, MADV_DONTNEED) == 0);
        CHECK(!memory[0] && !memory[PAGE_BYTES - 1] && memory[PAGE_BYTES] == 7);
        puts("discarded");
}

/* Some of its memory, which is registered once more. Says where it is. */
static void move(void)
{
        const size_t bytes = (size_t)4 * PAGE_BYTES;
        unsigned char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct ibv_mr *other;

        CHECK(memory != MAP_FAILED && (other = ibv_reg_mr(pd, memory, bytes, ALL_ACCESS)));
        memset(memory, 7, bytes);
        memory = mremap(memory, bytes, 2 * bytes, MREMAP_MAYMOVE);
        CHECK(memory != MAP_FAILED && memory[0] == 7 && memory[bytes - 1] == 7 && !memory[bytes]);
        CHECK(ibv_dereg_mr(other) == 0 && memory[0] == 7);
        printf("%llu\n", (unsigned long long)(uintptr_t)memory);
}

static void confine(void)
{
        struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog filter = {.len = 1, .filter = &all};

        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0);
        puts("confined");
}

static void part(void)
{
        for (int i = 0; i < count_many; i++)
                CHECK(ibv_destroy_qp(many[i]) == 0);
        puts("parted");
}

static void limit_files(unsigned int count)
{
        struct rlimit limit;

        CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
        limit.rlim_cur = count;
        CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        puts("limited");
}

/* Not by a function of the C library, which would spare those of others. */
static void close_others(void)
{
        for (int fd = STDERR_FILENO + 1; fd < DESCRIPTORS; fd++)
                if (fd != channel->fd && fd != context->async_fd && fd != context->cmd_fd)
                        syscall(SYS_close, fd);
        puts("closed");
}

static void obey(const char *word, const char *rest)
{
        unsigned long long address = 0;
        unsigned int number = 0, key = 0;

        if (strcmp(word, "make") == 0) {
                make();
                say(last->qp_num);
        } else if (strcmp(word, "many") == 0) {
                make_many(atoi(rest));
        } else if (strcmp(word, "join") == 0) {
                CHECK(sscanf(rest, "%u %llu %u", &number, &address, &key) == 3);
                peer_address = address;
                peer_key = key;
                for (int i = 0; i < count_many; i++) {
                        last = many[i];
                        connect_last(number + (uint32_t)i);
                }
                puts("connected");
        } else if (strcmp(word, "each") == 0) {
                write_each(strcmp(rest, "sleep") == 0);
        } else if (strcmp(word, "connect") == 0) {
                CHECK(sscanf(rest, "%u %llu %u", &number, &address, &key) == 3);
                peer_address = address;
                peer_key = key;
                connect_last(number);
                puts("connected");
        } else if (strcmp(word, "write") == 0) {
                do_some(IBV_WR_RDMA_WRITE, atoi(rest), false);
        } else if (strcmp(word, "sleep") == 0) {
                do_some(IBV_WR_RDMA_WRITE, atoi(rest), true);
        } else if (strcmp(word, "send") == 0) {
                do_some(IBV_WR_SEND, atoi(rest), false);
        } else if (strcmp(word, "flood") == 0) {
                flood(strcmp(rest, "sleep") == 0);
        } else if (strcmp(word, "event") == 0) {
                event();
        } else if (strcmp(word, "destroy") == 0) {
                CHECK(ibv_destroy_qp(last) == 0);
                puts("destroyed");
        } else if (strcmp(word, "part") == 0) {
                part();
        } else if (strcmp(word, "files") == 0) {
                limit_files((unsigned int)atoi(rest));
        } else if (strcmp(word, "fork") == 0) {
                become_child();
        } else if (strcmp(word, "breed") == 0) {
                breed(atoi(rest));
        } else if (strcmp(word, "discard") == 0) {
                discard();
        } else if (strcmp(word, "move") == 0) {
                move();
        } else if (strcmp(word, "confine") == 0) {
                confine();
        } else if (strcmp(word, "close") == 0) {
                close_others();
        }
}

int main(void)
{
        char line[100], word[20];
        int end;

        /* No line of the parent's is read by a child. */
        setvbuf(stdin, NULL, _IONBF, 0);
        while (fgets(line, sizeof line, stdin)) {
                line[strcspn(line, "\n")] = 0;
                end = 0;
                if (sscanf(line, "%19s %n", word, &end) == 1)
                        obey(word, line + end);
                fflush(stdout);
        }
        return 0;
}
