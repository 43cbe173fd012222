/* The sending half of the transport `tcp`. */
#ifndef FREEFLOW_RELAY_TCP_SEND_H
#define FREEFLOW_RELAY_TCP_SEND_H

#include "tcp_socket.h"
#include "transport.h"

/* errno; 0: it can send. */
int tcp_send_start(struct tcp_socket *socket, const uint8_t key[RECORD_KEY], bool encrypts);
void tcp_send_end(struct tcp_socket *socket);
/* The kernel takes more. */
void tcp_send_ready(struct tcp_socket *socket);

/* As in struct transport. */
bool tcp_has_room(struct link *link, unsigned lane, unsigned writes);
void tcp_write(struct link *link, struct mirror *mirror, uint32_t offset, uint32_t size);
void tcp_send(struct link *link, unsigned lane, const void *message, uint32_t size, uint64_t number,
              bool soon);
/* Sends what waits, with one call per socket. True: there was something. */
bool tcp_flush(void);
/* Has all been given to the kernel that it can take? */
bool tcp_is_flushed(void);

#endif
