/* The library that has the router's socket, and what the router says of the device.
 *
 * libfreeflow.so and the router are asked when a program asks for devices, and not before. What the
 * router says later is taken by whoever waits for it: client_receive().
 */
#ifndef FREEFLOW_CLIENT_H
#define FREEFLOW_CLIENT_H

#include "../library/services.h"

enum { CLIENT_USERS = 4 };

/* Who has queue pairs, or connections. */
struct client_user {
        /* A message that is not about the device. What came with it is the receiver's. Only one
         * thread at a time is here; it must not call client_receive(). False: it is for somebody
         * else. */
        bool (*handle)(struct verbs_message *message);
        /* As those of struct verbs_client. */
        void (*forked)(void);
        void (*retired)(void);
        /* NULL but for one whose memory children must not share. */
        void (*forks)(void);
        void (*fork_done)(bool made);
        /* NULL but for one who claims descriptors. */
        ssize_t (*write)(int fd, const void *buffer, size_t size);
        void (*closing)(int fd);
        void (*duplicated)(int fd, int to);
};

/* NULL: there is no device in this process, or no more. */
const struct freeflow_services *client_services(void);
/* Ask the router for the device, unless this socket's router has been. Waits until it has described
 * all of the port, at most `patience` ms, if it has not done so before. False: it hasn't. */
bool client_open(int patience);
/* The socket by which the router has described a device. False: the one that is there now has not,
 * or there is none: wait for it, or call client_open(). May be called with any lock held. */
bool client_epoch(uint32_t *epoch);
/* Take all that the router has said, and send what had to wait for room. */
void client_receive(void);
/* Send a message by this epoch's socket. If there is no room it is kept until there is, and those
 * sent like this come in their order. False: that socket is lost, or too much is kept. May be
 * called with any lock held. */
bool client_send(const void *message, size_t size, uint32_t epoch);
/* Give a slot back, after the last access to its rings. May be called with any lock held. */
void client_release(struct place *place);
/* Some are kept: whoever waits on the router's socket waits for room as well. */
bool client_keeps(void);
/* Readable when client_receive() has something to take that somebody else has read from the
 * router's socket; -1: there is no such descriptor. Whoever waits looks at the socket as well. */
int client_descriptor(void);
/* Have these called from now on. */
void client_serve(const struct client_user *user);

#endif
