/* The receiving half of the transport `tcp`. */
#ifndef FREEFLOW_RELAY_TCP_RECEIVE_H
#define FREEFLOW_RELAY_TCP_RECEIVE_H

#include "tcp_socket.h"

/* errno; 0: it can receive. */
int tcp_receive_start(struct tcp_socket *socket, bool wants_sealed);
void tcp_receive_end(struct tcp_socket *socket);
/* There is something to read; `ends`: an end or an error after it. */
void tcp_receive_ready(struct tcp_socket *socket, bool ends);

/* As in struct transport. */
bool tcp_poll(void);
/* Has all been read that was announced? */
bool tcp_is_read(void);

#endif
