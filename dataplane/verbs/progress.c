#include "progress.h"

#include "../library/waiters.h"
#include "executor.h"

#include <stdlib.h>

enum { LOOK_EVERY = 4096 /* polls */ };

/* The queue pairs of a completion queue. Whoever walks along them holds the mutex, and takes those
 * of the queue pairs meanwhile. */
struct drive {
        struct mutex mutex;
        struct queue_member *first;
        uint32_t polls;
};

static _Atomic uint32_t polls;

/* Is there anything that was not executed? */
static bool has_come(const struct queue_pair *queue, struct ring *in)
{
        return atomic_load_explicit(&in->tail, memory_order_relaxed) !=
               atomic_load_explicit(&queue->seen, memory_order_relaxed);
}

/* The relay, or the router, has given up the slot. */
static void check_broken(struct queue_pair *queue, const struct ring *in)
{
        if (view_remote(&queue->sender.view) && atomic_load_explicit(&in->broken, memory_order_acquire))
                atomic_store_explicit(&queue->pairing, QUEUE_LOST, memory_order_release);
}

static bool take(struct mutex *mutex, bool wait)
{
        if (!wait)
                return mutex_try(mutex);
        mutex_take(mutex);
        return true;
}

bool progress_make(struct queue_pair *queue, const struct cq *polled, bool wait)
{
        struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);
        bool did = false;

        if (in && has_come(queue, in) && take(&queue->receiving, wait)) {
                did = executor_run(queue, polled);
                mutex_release(&queue->receiving);
        }
        if ((atomic_load_explicit(&queue->open, memory_order_relaxed) ||
             atomic_load_explicit(&queue->owes, memory_order_relaxed)) &&
            take(&queue->sending, wait)) {
                if (queue_paired(queue) == QUEUE_PAIRED)
                        check_broken(queue, queue->sender.view.ring);
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

bool progress_arm(struct queue_pair *queue)
{
        struct ring *in = atomic_load_explicit(&queue->in, memory_order_acquire);
        struct ring *out = atomic_load_explicit(&queue->out, memory_order_acquire);
        int bell = atomic_load_explicit(&queue->bell, memory_order_acquire);

        if (atomic_load_explicit(&queue->looped, memory_order_relaxed))
                return true;
        if (!in || !out || bell < 0)
                return false;
        wait_begin(&in->receivers, bell);
        wait_begin(&out->senders, bell);
        return true;
}

uint32_t progress_polls(void)
{
        return atomic_load_explicit(&polls, memory_order_relaxed);
}

/* --- polling */

/* Nobody else may be listening to the router. */
static void look_around(struct drive *drive)
{
        bool due = ++drive->polls % LOOK_EVERY == 0;

        for (struct queue_member *at = drive->first; at; at = at->next)
                if (queue_paired(at->queue) == QUEUE_ASKED) {
                        queue_pairer->ask_again(at->queue);
                        due = true;
                }
        if (due)
                queue_pairer->listen();
}

static bool progress_poll(struct cq *cq)
{
        struct drive *drive = cq->driven;

        if (opened_is_lost(cq->plain.context) || !mutex_try(&drive->mutex))
                return false;
        /* Not exact: no word is written by two threads without losing some. */
        atomic_store_explicit(&polls, progress_polls() + 1, memory_order_relaxed);
        for (struct queue_member *at = drive->first; at; at = at->next)
                progress_make(at->queue, cq, false);
        look_around(drive);
        mutex_release(&drive->mutex);
        return completions_are_there(&cq->completions);
}

static void arm(struct cq *cq)
{
        struct drive *drive = cq->driven;

        if (opened_is_lost(cq->plain.context))
                return;
        mutex_take(&drive->mutex);
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
        mutex_release(&drive->mutex);
        atomic_store_explicit(&cq->driver, &driver, memory_order_release);
        return true;
}

static void leave(struct cq *cq, struct queue_member *member, bool lost)
{
        struct drive *drive = cq->driven;
        struct queue_member **at = &drive->first;

        if (!lost) {
                mutex_take(&drive->mutex);
                while (*at && *at != member)
                        at = &(*at)->next;
                if (*at)
                        *at = member->next;
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
