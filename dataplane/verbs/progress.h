/* Who makes queue pairs go on: a program that posts to one, or polls a completion queue of one.
 *
 * A thread that finds somebody else at work on a queue pair leaves it to that one.
 */
#ifndef FREEFLOW_PROGRESS_H
#define FREEFLOW_PROGRESS_H

#include "queue_pair.h"

/* Execute what has come, complete what is done, put what can be put. `polled`: the completion queue
 * that the caller polls, or NULL. `wait`: for others that are at work on it, who may have missed
 * what came last. True: something was executed, and there may be more. */
bool progress_make(struct queue_pair *queue, const struct cq *polled, bool wait);
/* Whoever waits for the queue pair's bell hears of what comes next; what has come already is for
 * the caller to look for afterwards. False: there is no such bell. Those of type UD are armed by
 * datagrams_arm(), all at once. */
bool progress_arm(struct queue_pair *queue);
/* The bell's waiter looks by itself for a while: nobody needs to ring. */
void progress_disarm(struct queue_pair *queue);
/* All that a queue pair that is connected with itself can do now. Called after each post. */
void progress_loop(struct queue_pair *queue);
/* A request was posted: its completion queue is to look at it soon. */
void progress_note_post(struct queue_pair *queue);
/* The queue pair's shared receive queue has receives for which it has waited. */
void progress_feed(struct queue_pair *queue);
/* The program is about to leave the other side: execute what has come by now, as a device would
 * have done when it came. What is not allowed stays there. */
void progress_finish(struct queue_pair *queue);
/* How often programs have polled in vain, about. */
uint32_t progress_polls(void);

/* Whoever polls the queue pair's completion queues makes it go on, from now on or no longer. False:
 * no memory. */
bool progress_join(struct queue_pair *queue);
/* `lost`: what is known of it is a parent's, and others of it may have held mutexes. */
void progress_leave(struct queue_pair *queue, bool lost);

#endif
