#include "progress.h"

#include "../library/waiters.h"
#include "datagrams.h"
#include "executor.h"
#include "monotonic.h"

#include <stdlib.h>

enum {
        LOOK_EVERY = 4096, /* polls */
        COLD_LOOKS = 16,
        HOT_MOST = 32,
        HOT_LOOKS = 1000,
        CORE_EVERY = 256, /* polls in vain */
        YIELDS = 16,
        LONG = 200000, /* ns: a yield in which somebody else has used the core */
        NAPS = 256,    /* before the next yield */
};

/* The queue pairs of a completion queue. Whoever walks along them holds the mutex, and takes those
 * of the queue pairs meanwhile.
 *
 * Each poll looks at the hot ones, at which something happened a short while ago, and at some of
 * the others, in turn. So a poll does not take longer the more queue pairs there are, and nobody
 * has to tell it which one has something to do.
 */
struct drive {
        struct mutex mutex;
        struct queue_member *first;
        struct queue_member *hot;
        struct queue_member *next; /* the one to look at next; NULL: the first one */
        uint32_t count, count_hot;
        uint32_t count_datagrams;            /* of type UD */
        struct queue_member *_Atomic posted; /* a cold one to which something was posted */
        uint32_t polls;
        uint32_t vain;         /* polls that have found nothing, in a row */
        bool shares_core;      /* with a thread that polls at the other side */
        _Atomic uint32_t naps; /* to be taken instead of yields */
        bool waits;            /* some have asked for the other side */
};

static _Atomic uint32_t polls;

/* Is there anything that was not executed? */
static bool has_come(const struct queue_pair *queue, struct ring *in)
{
        return atomic_load_explicit(&in->tail, memory_order_relaxed) !=
               atomic_load_explicit(&queue->seen, memory_order_relaxed);
}

/* Is the other side gone, and the queue pair does not know yet? */
static bool parts(const struct queue_pair *queue, const struct ring *in)
{
        return queue_is_parted(queue, in) && queue_paired(queue) == QUEUE_PAIRED;
}

/* May progress_make() have something to do? */
static bool may_go_on(const struct queue_pair *queue)
{
        struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);

        return (in && (has_come(queue, in) || parts(queue, in))) ||
               atomic_load_explicit(&queue->open, memory_order_relaxed) ||
               atomic_load_explicit(&queue->owes, memory_order_relaxed) ||
               (atomic_load_explicit(&queue->failed, memory_order_relaxed) &&
                queue_state(queue) != IBV_QPS_ERR);
}

static bool take(struct mutex *mutex, bool wait)
{
        if (!wait)
                return mutex_try(mutex);
        mutex_take(mutex);
        return true;
}

/* Wake those who wait for room, after something was taken. A relay has said how little has to be
 * left in the ring before it wants to know. */
static void wake_senders(struct queue_pair *queue, struct ring *in)
{
        if (atomic_load_explicit(&queue->relayed, memory_order_relaxed)) {
                uint64_t used = atomic_load_explicit(&in->tail, memory_order_relaxed) -
                                atomic_load_explicit(&queue->seen, memory_order_relaxed);

                /* Pairs with make_idle() of the relay: it sees what was taken, or we see its
                 * wish. */
                atomic_thread_fence(memory_order_seq_cst);
                if (used >= atomic_load_explicit(&in->room, memory_order_relaxed))
                        return;
        }
        queue_pairer->ring(queue, &in->senders);
}

/* All that the other side had published was taken: take an answer that it could not publish any
 * more, or part from it. */
static bool part(struct queue_pair *queue, const struct cq *polled)
{
        bool found;

        mutex_take(&queue->sending);
        found = requester_find_answer(queue);
        mutex_release(&queue->sending);
        if (found && executor_run(queue, polled))
                return true;
        queue_part(queue);
        return false;
}

bool progress_make(struct queue_pair *queue, const struct cq *polled, bool wait)
{
        struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);
        bool did = false;

        if (queue_has_datagrams(queue)) {
                datagrams_make(queue, polled, wait);
                return false;
        }
        if (in && (has_come(queue, in) || parts(queue, in)) && take(&queue->receiving, wait)) {
                const struct ring *now = queue->receiver.view.ring;
                bool parted = now && parts(queue, now);

                did = executor_run(queue, polled);
                if (parted && !did)
                        did = part(queue, polled);
                mutex_release(&queue->receiving);
                if (did)
                        wake_senders(queue, in);
        }
        if ((atomic_load_explicit(&queue->open, memory_order_relaxed) ||
             atomic_load_explicit(&queue->owes, memory_order_relaxed)) &&
            take(&queue->sending, wait)) {
                requester_complete(queue, polled);
                requester_push(queue);
                requester_check_time(queue);
                if (atomic_load_explicit(&queue->owes, memory_order_relaxed))
                        queue_publish(queue);
                mutex_release(&queue->sending);
        }
        queue_settle(queue, polled);
        return did;
}

void progress_loop(struct queue_pair *queue)
{
        const struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);
        uint64_t before;
        bool did;

        do {
                before = in ? atomic_load_explicit(&in->tail, memory_order_relaxed) : 0;
                did = progress_make(queue, NULL, true);
        } while (did || (in && before != atomic_load_explicit(&in->tail, memory_order_relaxed)));
}

void progress_feed(struct queue_pair *queue)
{
        progress_make(queue, NULL, true);
        if (queue_has_datagrams(queue))
                datagrams_take(NULL, true);
        mutex_take(&queue->sending);
        if (queue_paired(queue) == QUEUE_PAIRED)
                queue_publish(queue);
        mutex_release(&queue->sending);
        if (atomic_load_explicit(&queue->looped, memory_order_relaxed))
                progress_loop(queue);
}

/* Execute some of what lies before this position. False: none of it is left that can be executed.
 * The other side may put more all the time, also answers behind a message that waits for a receive.
 */
static bool run_up_to(struct queue_pair *queue, uint64_t end)
{
        uint64_t from = queue->receiver.head;

        return executor_run(queue, NULL) &&
               (queue->receiver.head != from || (int64_t)(end - queue->ahead.head) > 0);
}

void progress_finish(struct queue_pair *queue)
{
        const struct ring *in;
        uint64_t end;

        if (queue_has_datagrams(queue) || atomic_load_explicit(&queue->looped, memory_order_relaxed))
                return;
        mutex_take(&queue->receiving);
        in = queue->receiver.view.ring;
        end = in ? atomic_load_explicit(&in->tail, memory_order_acquire) : 0;
        queue->leaves = true;
        while (in && (int64_t)(end - queue->receiver.head) > 0 && run_up_to(queue, end))
                ;
        queue->leaves = false;
        mutex_release(&queue->receiving);
}

bool progress_arm(struct queue_pair *queue)
{
        struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);
        struct ring *out = atomic_load_explicit(&queue->out, memory_order_acquire);
        int bell = atomic_load_explicit(&queue->bell, memory_order_acquire);

        if (queue_has_datagrams(queue) || atomic_load_explicit(&queue->looped, memory_order_relaxed))
                return true;
        if (!in || !out || bell < 0)
                return false;
        if (!wait_has_begun(&in->receivers, bell))
                wait_begin(&in->receivers, bell);
        if (!wait_has_begun(&out->senders, bell))
                wait_begin(&out->senders, bell);
        return true;
}

void progress_disarm(struct queue_pair *queue)
{
        struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);
        struct ring *out = atomic_load_explicit(&queue->out, memory_order_acquire);
        int bell = atomic_load_explicit(&queue->bell, memory_order_acquire);

        if (!in || !out || bell < 0 || atomic_load_explicit(&queue->looped, memory_order_relaxed))
                return;
        if (wait_has_begun(&in->receivers, bell))
                wait_end(&in->receivers, bell);
        if (wait_has_begun(&out->senders, bell))
                wait_end(&out->senders, bell);
}

uint32_t progress_polls(void)
{
        return atomic_load_explicit(&polls, memory_order_relaxed);
}

/* --- polling */

/* True: something has happened. */
static bool look_at(struct drive *drive, struct queue_pair *queue, const struct cq *cq)
{
        uint32_t open = atomic_load_explicit(&queue->open, memory_order_relaxed);

        if (queue_paired(queue) == QUEUE_ASKED) {
                queue_pairer->ask_again(queue);
                drive->waits = true;
        }
        return may_go_on(queue) && (progress_make(queue, cq, false) ||
                                    open != atomic_load_explicit(&queue->open, memory_order_relaxed));
}

static uint32_t looks_of(const struct queue_member *member)
{
        return atomic_load_explicit(&member->looks, memory_order_relaxed);
}

static void set_looks(struct queue_member *member, uint32_t looks)
{
        atomic_store_explicit(&member->looks, looks, memory_order_relaxed);
}

static void look_at_hot_ones(struct drive *drive, const struct cq *cq)
{
        struct queue_member **at = &drive->hot, *member;

        while ((member = *at)) {
                if (look_at(drive, member->queue, cq))
                        set_looks(member, HOT_LOOKS);
                else
                        set_looks(member, looks_of(member) - 1);
                if (looks_of(member)) {
                        at = &member->next_hot;
                } else {
                        *at = member->next_hot;
                        drive->count_hot--;
                }
        }
}

static void heat(struct drive *drive, struct queue_member *member)
{
        if (looks_of(member) || drive->count_hot == HOT_MOST)
                return;
        set_looks(member, HOT_LOOKS);
        member->next_hot = drive->hot;
        drive->hot = member;
        drive->count_hot++;
}

static void look_at_cold_ones(struct drive *drive, const struct cq *cq)
{
        for (uint32_t i = 0; i < COLD_LOOKS && i < drive->count; i++) {
                struct queue_member *member = drive->next ? drive->next : drive->first;

                drive->next = member->next;
                if (!looks_of(member) && look_at(drive, member->queue, cq))
                        heat(drive, member);
        }
}

void progress_note_post(struct queue_pair *queue)
{
        struct queue_member *member = &queue->members[queue->send_cq != queue->receive_cq];
        struct drive *drive = queue->send_cq->driven;

        if (!looks_of(member))
                atomic_store_explicit(&drive->posted, member, memory_order_release);
}

static void take_posted(struct drive *drive)
{
        if (atomic_load_explicit(&drive->posted, memory_order_relaxed))
                heat(drive, atomic_exchange_explicit(&drive->posted, NULL, memory_order_acquire));
}

/* Nobody else may be listening to the router. */
static void listen_to_router(struct drive *drive)
{
        if (++drive->polls % LOOK_EVERY == 0 || drive->waits)
                queue_pairer->listen();
        drive->waits = false;
}

/* Does a thread at the other side poll on this core? Each side says in the ring that comes in on
 * which one it polls. */
static bool meets(struct queue_pair *queue, uint32_t core)
{
        struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);
        struct ring *out = atomic_load_explicit(&queue->out, memory_order_acquire);

        if (!in || !out || in == out)
                return false;
        /* What comes from another host has to get past this host's relay. If all cores are busy,
         * with programs that poll, the relay gets none before somebody's time is over. */
        if (atomic_load_explicit(&queue->relayed, memory_order_relaxed))
                return true;
        if (atomic_load_explicit(&in->receiver_cpu, memory_order_relaxed) != core)
                atomic_store_explicit(&in->receiver_cpu, core, memory_order_relaxed);
        return atomic_load_explicit(&out->receiver_cpu, memory_order_relaxed) == core;
}

/* Two threads that poll on one core would each use up its time while the other has something to do.
 * True: that is so, as far as is known. */
static bool has_to_give_way(struct drive *drive)
{
        uint32_t core = 0, most = COLD_LOOKS;

        if (++drive->vain % (drive->shares_core ? YIELDS : CORE_EVERY) == 0) {
                drive->shares_core = false;
                if (sys_3(SYS_getcpu, &core, NULL, NULL))
                        return false;
                if (drive->count_datagrams)
                        drive->shares_core |= datagrams_meet(core + 1);
                for (struct queue_member *at = drive->hot; at; at = at->next_hot)
                        drive->shares_core |= meets(at->queue, core + 1);
                for (struct queue_member *at = drive->hot ? NULL : drive->first; at && most--; at = at->next)
                        drive->shares_core |= meets(at->queue, core + 1);
        }
        return drive->shares_core;
}

/* The scheduler lets all others run first, some of them for long: then whoever sleeps gets the core
 * sooner than whoever yields. */
static void give_way(struct drive *drive)
{
        const struct timespec nap = {.tv_nsec = 1};
        uint32_t naps = atomic_load_explicit(&drive->naps, memory_order_relaxed);
        uint64_t begin;

        if (naps) {
                atomic_store_explicit(&drive->naps, naps - 1, memory_order_relaxed);
                sys_2(SYS_nanosleep, &nap, 0);
                return;
        }
        begin = monotonic();
        sys_0(SYS_sched_yield);
        if (monotonic() - begin > LONG)
                atomic_store_explicit(&drive->naps, NAPS, memory_order_relaxed);
}

static bool progress_poll(struct cq *cq)
{
        struct drive *drive = cq->driven;
        bool found, yields = false;

        if (opened_is_lost(cq->plain.context) || !mutex_try(&drive->mutex))
                return false;
        /* Not exact: no word is written by two threads without losing some. */
        atomic_store_explicit(&polls, progress_polls() + 1, memory_order_relaxed);
        take_posted(drive);
        if (drive->count_datagrams)
                datagrams_take(cq, false);
        look_at_hot_ones(drive, cq);
        look_at_cold_ones(drive, cq);
        listen_to_router(drive);
        found = completions_are_there(&cq->completions);
        if (found)
                drive->vain = 0;
        else
                yields = has_to_give_way(drive);
        mutex_release(&drive->mutex);
        if (yields)
                give_way(drive);
        return found;
}

/* Datagrams that wait for a receive are not waited for without end. */
static void arm_datagrams(void)
{
        datagrams_arm();
        datagrams_take(NULL, true);
        if (datagrams_are_held())
                queue_watch();
}

static void arm(struct cq *cq)
{
        struct drive *drive = cq->driven;

        if (opened_is_lost(cq->plain.context))
                return;
        mutex_take(&drive->mutex);
        if (drive->count_datagrams)
                arm_datagrams();
        for (struct queue_member *at = drive->first; at; at = at->next) {
                progress_arm(at->queue);
                progress_make(at->queue, NULL, true);
        }
        mutex_release(&drive->mutex);
}

static const struct cq_driver driver = {.poll = progress_poll, .arm = arm};

/* Completion queues are made and destroyed by programs, and only those that are used are driven. */
static bool join(struct cq *cq, struct queue_member *member)
{
        static struct mutex making;
        struct drive *drive;

        mutex_take(&making);
        if (!cq->driven)
                cq->driven = calloc(1, sizeof *drive);
        mutex_release(&making);
        drive = cq->driven;
        if (!drive)
                return false;
        atomic_fetch_add_explicit(&cq->users, 1, memory_order_relaxed);
        mutex_take(&drive->mutex);
        member->next = drive->first;
        drive->first = member;
        drive->count++;
        drive->count_datagrams += queue_has_datagrams(member->queue);
        mutex_release(&drive->mutex);
        atomic_store_explicit(&cq->driver, &driver, memory_order_release);
        return true;
}

static void leave(struct cq *cq, struct queue_member *member, bool lost)
{
        struct drive *drive = cq->driven;
        struct queue_member **at = &drive->first, **hot = &drive->hot;

        if (!lost) {
                mutex_take(&drive->mutex);
                while (*at != member)
                        at = &(*at)->next;
                *at = member->next;
                drive->count--;
                drive->count_datagrams -= queue_has_datagrams(member->queue);
                if (drive->next == member)
                        drive->next = member->next;
                if (atomic_load_explicit(&drive->posted, memory_order_relaxed) == member)
                        atomic_store_explicit(&drive->posted, NULL, memory_order_relaxed);
                while (*hot && *hot != member)
                        hot = &(*hot)->next_hot;
                if (*hot) {
                        *hot = member->next_hot;
                        drive->count_hot--;
                }
                mutex_release(&drive->mutex);
        }
        atomic_fetch_sub_explicit(&cq->users, 1, memory_order_release);
}

bool progress_join(struct queue_pair *queue)
{
        for (int i = 0; i < 2; i++)
                queue->members[i].queue = queue;
        if (!join(queue->receive_cq, &queue->members[0]))
                return false;
        if (queue->send_cq == queue->receive_cq || join(queue->send_cq, &queue->members[1]))
                return true;
        leave(queue->receive_cq, &queue->members[0], false);
        return false;
}

void progress_leave(struct queue_pair *queue, bool lost)
{
        leave(queue->receive_cq, &queue->members[0], lost);
        if (queue->send_cq != queue->receive_cq)
                leave(queue->send_cq, &queue->members[1], lost);
}
