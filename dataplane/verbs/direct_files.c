#include "direct_files.h"

#include "agent.h"
#include "client.h"
#include "direct.h"
#include "extents.h"
#include "monotonic.h"
#include "numbers.h"

#include <poll.h>

enum {
        LONG = 500, /* ms: a router that has not answered by then is busy or stopped */
        STEP = 1,   /* ms: another thread may take the answer */
        PAUSE = 10, /* s without asking, after a router that has not answered */
};

/* --- our own */

/* What a thread waits for; one at a time does (extents.c). */
static struct {
        struct mutex mutex; /* of what follows */
        uint32_t request;   /* 0: nothing */
        bool answered, made;
        struct extent_file file;
} wanted;

static bool tell(const struct v_memory *message)
{
        uint32_t epoch;

        return client_epoch(&epoch) && client_send(message, sizeof *message, epoch);
}

static bool ask_for_one(size_t bytes, bool writable)
{
        static uint32_t requests;
        struct v_memory message = {
            .message = {.kind = V_MEMORY, .size = sizeof message}, .bytes = bytes, .writable = writable};

        requests = requests + 1 ? requests + 1 : 1;
        message.request = requests;
        mutex_take(&wanted.mutex);
        wanted.request = requests;
        wanted.answered = wanted.made = false;
        mutex_release(&wanted.mutex);
        return tell(&message);
}

static bool is_answered(void)
{
        bool answered;

        mutex_take(&wanted.mutex);
        answered = wanted.answered;
        mutex_release(&wanted.mutex);
        return answered;
}

static void wait_for_answer(int patience)
{
        const struct freeflow_services *here;
        const struct timespec step = {.tv_nsec = STEP * 1000000};
        uint64_t end = monotonic() + UINT64_C(1000000) * (uint64_t)patience;

        while (client_receive(), !is_answered() && monotonic() < end && (here = client_services())) {
                struct pollfd source = {.fd = here->router_descriptor(), .events = POLLIN};

                sys_5(SYS_ppoll, &source, 1, &step, 0, 0);
        }
}

static bool make(size_t bytes, bool writable, int patience, struct extent_file *file)
{
        static uint64_t not_before;
        bool made;

        if (monotonic() < not_before)
                return false;
        if (ask_for_one(bytes, writable))
                wait_for_answer(patience);
        mutex_take(&wanted.mutex);
        if (!wanted.answered && patience >= LONG)
                not_before = monotonic() + UINT64_C(1000000000) * PAUSE;
        made = wanted.made;
        *file = wanted.file;
        wanted.request = 0;
        mutex_release(&wanted.mutex);
        return made;
}

static void protect(const struct extent_file *file)
{
        struct v_memory message = {.message = {.kind = V_MEMORY_MAPPED, .size = sizeof message},
                                   .memory = file->memory};

        tell(&message);
}

static void give_back(const struct freeflow_services *here, uint64_t memory, int memfd)
{
        struct v_memory message = {.message = {.kind = V_MEMORY_END, .size = sizeof message},
                                   .memory = memory};

        tell(&message);
        if (here && memfd >= 0 && here->is_own_descriptor(memfd))
                here->close_own(memfd);
}

static void end(const struct extent_file *file)
{
        give_back(client_services(), file->memory, file->memfd);
}

static void settle_later(void)
{
        agent_start();
}

static const struct extent_maker maker = {
    .make = make, .protect = protect, .end = end, .unsettled = settle_later};

static void made(const struct freeflow_services *here, struct verbs_message *message)
{
        bool taken;

        mutex_take(&wanted.mutex);
        taken = wanted.request == message->memory.request && !wanted.answered && message->descriptor >= 0;
        if (taken) {
                wanted.answered = wanted.made = true;
                wanted.file = (struct extent_file){.memory = message->memory.memory,
                                                   .token = message->memory.token,
                                                   .memfd = message->descriptor};
        }
        mutex_release(&wanted.mutex);
        /* It came too late. */
        if (!taken)
                give_back(here, message->memory.memory, message->descriptor);
}

static void not_made(const struct v_refuse *refuse)
{
        mutex_take(&wanted.mutex);
        wanted.answered |= wanted.request == refuse->request;
        mutex_release(&wanted.mutex);
}

/* --- those of peers */

static void ask(struct queue_pair *queue, const struct record_direct *direct)
{
        struct v_memory message = {.message = {.kind = V_REACH, .size = sizeof message},
                                   .qpn = queue->plain.qp_base.qp_num,
                                   .memory = direct->memory,
                                   .token = direct->token};

        tell(&message);
}

static const struct direct_reacher reacher = {.ask = ask};

static void reached(void *owner, void *argument)
{
        const struct verbs_message *message = argument;

        direct_reached(owner, message->memory.memory, message->descriptor, message->memory.writable);
}

static void missed(void *owner, void *unused)
{
        (void)unused;
        direct_missed(owner);
}

/* --- */

static bool handle(struct verbs_message *message)
{
        const struct freeflow_services *here = client_services();

        if (message->header.kind == V_MEMORY_MADE) {
                made(here, message);
        } else if (message->header.kind == V_REACHED) {
                if (message->descriptor >= 0)
                        number_use(message->memory.qpn, reached, message);
                if (here && message->descriptor >= 0)
                        here->close_own(message->descriptor);
        } else if (message->header.kind == V_REFUSE && message->refuse.kind == V_MEMORY) {
                not_made(&message->refuse);
        } else if (message->header.kind == V_REFUSE && message->refuse.kind == V_REACH) {
                number_use(message->refuse.number, missed, NULL);
        } else {
                return false;
        }
        return true;
}

static void forked(void)
{
        extents_forked();
        reached_forget();
        wanted.mutex = (struct mutex){0};
        wanted.request = 0;
}

static void retired(void)
{
        extents_end();
}

static const struct client_user user = {.handle = handle,
                                        .forks = extents_fork,
                                        .fork_done = extents_fork_done,
                                        .forked = forked,
                                        .retired = retired};

void direct_files_start(void)
{
        extent_maker = &maker;
        direct_reacher = &reacher;
        client_serve(&user);
}
