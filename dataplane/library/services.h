/* What libfreeflow.so does for libibverbs.so.1 (dataplane/verbs), and what it calls there.
 *
 * The two are not linked with each other: one has no versions of symbols and stands before the C
 * library, the other has versions and stands before nothing but itself. This one owns the socket to
 * the router, the arenas, the bells and the list of descriptors. The other one owns all that verbs
 * are. It finds the services by `dlsym(RTLD_DEFAULT, "freeflow_services")` when a program asks for
 * devices for the first time, so that they cost nothing in other programs.
 *
 * Both files are of one build. But a program that runs may have loaded one before and the other
 * after an update: so SERVICES_VERSION changes with every change of this file, verbs_protocol.h,
 * place.h or view.h, and with another version there is no device.
 *
 * Calls from libfreeflow.so (struct verbs_client) come on any thread, with locks held, and some in
 * signal handlers: also on a thread that was interrupted inside a verb. Each comment says what its
 * function may do.
 *
 * Calls to libfreeflow.so (struct freeflow_services):
 *
 *      - None blocks, unless it has a `patience`. None changes errno.
 *      - All may be called on any thread, with any of the caller's locks held; but not in a signal
 *        handler, and not from a function of `struct verbs_client` that doesn't say so, except
 *        is_own_descriptor().
 *      - A child of vfork must not call them: is_here() says so. In a child of fork, and after
 *        retired(), what was there before is gone.
 *
 * The way of a queue pair:
 *
 *      reach(&epoch)                    there is a router that carries verbs
 *      send(V_QUEUE_PAIR, epoch)
 *      receive(&message)                V_GRANT: message.place is this queue pair's slot
 *      sends(place), receives(place)    its two rings: record_send_from(), record_receive_from()
 *      bell_take(place.arena)           by the thread that waits for that arena
 *      ...
 *      release(place, &message)         after the last access to the rings
 *      send(message, epoch)
 *      send(V_QUEUE_PAIR_END, epoch)
 *
 * Whoever waits for messages of the router sleeps on router_descriptor(), and on a descriptor of
 * its own that arrived() makes readable: other threads take messages from the socket, too. Those
 * for verbs are kept until receive() returns them. If SERVICES_QUEUE are kept, nobody takes
 * anything from the socket any more, and nothing is lost.
 */
#ifndef FREEFLOW_SERVICES_H
#define FREEFLOW_SERVICES_H

#include "place.h"
#include "verbs_protocol.h"
#include "view.h"
#include "waiters.h"

#include <sys/types.h>

#define SERVICES_MAGIC UINT64_C(0x7365636976726573) /* "services" */
#define SERVICES_NAME "freeflow_services"

enum {
        SERVICES_VERSION = 4,
        SERVICES_QUEUE = 64, /* messages */
};

/* A message of the router for verbs. */
struct verbs_message {
        union {
                struct message header; /* `size` is right for the kind */
                struct v_device device;
                struct v_grant grant;
                struct v_refuse refuse;
                struct v_datagrams group;
                struct v_listen listening;
                struct v_connection connection;
                struct v_memory memory;
        };
        uint32_t epoch; /* of the socket that it came by */
        /* V_GRANT: why this process can't use the slot (enum reason): RELEASE is to be sent for it;
         * 0: it can, and has to release `place` in the end, whether the queue pair is still there
         * or not. REASON_MEMORY may have been for this moment only. */
        uint32_t reason;
        struct place place;
        int32_t descriptor; /* an own descriptor that came with another kind, now the caller's; or -1 */
};

/* Functions of libibverbs.so.1. */
struct verbs_client {
        /* A message is kept for receive(). May be in a signal handler: only writes to a descriptor.
         */
        void (*arrived)(void);
        /* Own descriptors may have been closed by somebody else: each is to be checked by
         * is_own_descriptor() before its next use. May be in a signal handler: only sets flags. */
        void (*descriptors_lost)(void);
        /* A child of fork is about to be made; and afterwards, in the parent, also if there is
         * none. No other call comes in between on this thread. */
        void (*forks)(void);
        void (*fork_done)(bool made);
        /* In a child of fork, before anything else there uses the library. The child has no other
         * thread. Its copies of places and own descriptors are not its own: it forgets them, and
         * releases and closes nothing. */
        void (*forked)(void);
        /* This process must do without the library from now on, because it confines itself to
         * certain system calls (retire.h). Threads of libibverbs have ended when this returns, or
         * will not make a system call any more. Places are left as they are, own descriptors are
         * closed afterwards. */
        void (*retired)(void);

        /* Of descriptors that were given to claim(). These three are called without locks, and may
         * call the services. In place of the system call: the number of bytes, or a negative errno.
         */
        ssize_t (*write)(int fd, const void *buffer, size_t size);
        /* It is about to be closed, or replaced by dup2(). The number is not claimed any more. */
        void (*closing)(int fd);
        /* `to` is another number of the same file, and claimed as well. */
        void (*duplicated)(int fd, int to);
};

struct freeflow_services {
        uint64_t magic;   /* SERVICES_MAGIC */
        uint32_t version; /* SERVICES_VERSION */
        uint32_t size;    /* of this structure */

        /* --- the process --- */

        /* False: the library is off here, or has retired, or this is a child of vfork. Then there
         * is no device, and every other call fails. In a child of fork that nothing has reported
         * yet, this calls forked(). */
        bool (*is_here)(void);
        /* Call these functions from now on, in this process and its children. False: !is_here(), or
         * there is another client. */
        bool (*attach)(const struct verbs_client *client);

        /* --- the router --- */

        /* Connect if there is no socket, and wait for the router's WELCOME, at most `patience` ms.
         * Returns 0 and the socket's epoch, or:
         *      ENOTCONN        there is no router now; it may come back
         *      EPROTONOSUPPORT the router carries no verbs
         *      EAGAIN          nothing has come yet, or the queue of receive() is full
         *      ENODEV          !is_here()
         */
        int (*reach)(uint32_t *epoch, int patience);
        /* Changes when the socket is lost. All that was requested before is void, what was granted
         * goes on: reach(), V_OPEN, and request again. */
        uint32_t (*epoch)(void);
        /* Send one message by this epoch's socket. Returns 0, or:
         *      ESTALE          that socket is lost, or there is none
         *      EAGAIN          no room: there will be, but perhaps not before the caller has read
         *                      what the router says
         */
        int (*send)(const void *message, size_t size, uint32_t epoch);
        /* The next message for verbs; false: there is none. */
        bool (*receive)(struct verbs_message *message);
        /* Readable when the router has sent something; -1: there is no socket. An own descriptor,
         * not to be read or kept: it may be another one at the next call. */
        int (*router_descriptor)(void);

        /* --- slots --- */

        /* The ring that this side of a slot writes, and the one that it reads. The memory stays
         * readable and writable for as long as the process lives; after release() it may be
         * anybody's. A `broken` ring (layout.h) ends the queue pair. */
        struct view (*sends)(const struct place *place);
        struct view (*receives)(const struct place *place);
        /* Leave the slot, and set place->incarnation to 0. True: `message` is to be sent, and then
         * the router may give the slot to somebody else. False: there is nothing to be done: the
         * incarnation was 0, or the place is that of a parent of this process. Bells of an arena
         * are returned before its last place is released, and places are released before
         * V_QUEUE_PAIR_END says so, which is an end of the slot as well. */
        bool (*release)(struct place *place, struct release *message);

        /* --- bells: bells.h, rung.h, sleep.h --- */

        /* A bell that only the caller uses until it returns it; -1: none now. One may be on its
         * way, and comes as a message of the router, though not as one of receive(). While there is
         * none, sleeps are short: 16 ms. */
        int (*bell_take)(uint32_t arena);
        void (*bell_return)(uint32_t arena, int bell);
        /* To be polled for POLLIN, not read; -1: the bell is lost. An own descriptor. */
        int (*bell_descriptor)(uint32_t arena, int bell);
        /* Can the other side ring it? If it can't yet, sleeps are short: 1 s. */
        bool (*bell_is_known)(uint32_t arena, int bell);
        /* After POLLIN: take out what rings. From now on the other side rings anew: what
         * bell_slots() and the rings say has to be read after this. False: the bell can't be used
         * any more, and is not to be returned. */
        bool (*bell_drain)(uint32_t arena, int bell);
        /* The same for somebody who was awake and did not sleep on the descriptor. */
        void (*bell_look)(uint32_t arena, int bell);
        /* The slots, a bit for each, in which something has happened for this bell's waiter since
         * the last call. The other side can set any bit. */
        uint64_t (*bell_slots)(uint32_t arena, int bell);
        /* Ring the bells of those who wait: services_wake(). */
        void (*ring)(struct waiters *waiters, const struct place *place);

        /* --- descriptors --- */

        /* Move a descriptor to where programs expect none, closed on exec, and have the program's
         * close() spare it. Takes over `fd`; returns the new number, or -1. */
        int (*own_descriptor)(int fd);
        bool (*is_own_descriptor)(int fd);
        void (*close_own)(int fd);
        /* A descriptor of the program on which write(), close() and dup() are the client's matter
         * from now on. False: its number is too high, or there is no client. */
        bool (*claim)(int fd);
};

/* Something was published in a ring of this slot, for those who wait in `waiters`: receivers of the
 * ring that this side writes, senders of the one that it reads. */
static inline void services_wake(const struct freeflow_services *services, struct waiters *waiters,
                                 const struct place *place)
{
        if (waiters_sleep(waiters))
                services->ring(waiters, place);
}

#endif
