/* A link: the relay's way to one peer's relay, and the messages on it. Its states are in queue.h.
 *
 * A relay sends a message only if the peer has granted it: `granted` in each header is the number
 * of messages that its reader may have sent since the link came up. The last granted one is kept
 * for a message that only grants, so that two relays cannot wait for each other. Each lane has its
 * own grants.
 *
 * A grant also says how many messages have arrived. A connection that is to go over to another lane
 * waits for the grant that covers its last message, and asks for it: so the two lanes cannot bring
 * its blocks out of order.
 */
#ifndef FREEFLOW_RELAY_LINK_H
#define FREEFLOW_RELAY_LINK_H

#include "queue.h"
#include "transport.h"

#include <stddef.h>

struct link *link_find(uint32_t number);
struct link *link_add(uint32_t number);
/* R_LINK: makes a channel of this transport, in place of an older one. errno, with a text. */
int link_prepare(struct link *link, const struct transport *transport, struct wire_address *address,
                 char *text);
/* R_SOCKET; takes the socket over. False: the link, which may be NULL, has no use for it. */
bool link_add_socket(struct link *link, uint32_t index, int socket);
/* R_CONNECT. EINPROGRESS: link_connected() answers it. errno, with a text. */
int link_connect(struct link *link, const struct wire_address *address, char *text);
/* R_STREAM: from now on the link goes over this transport, which needs no channel. */
void link_use_stream(struct link *link, const struct transport *stream);
/* R_EXPIRE: asks the peer for an answer if the link is up. */
void link_expire(struct link *link, enum relay_user user, uint32_t most);
/* R_UNLINK; breaks connections that are left. */
void link_remove(struct link *link);
/* All links send what is queued. True: one has. */
bool links_flush(void);
bool links_have_channels(const struct transport *transport);
/* Is everything that was sent complete, and nothing queued? */
bool links_are_idle(void);
/* Does what is due by time. Returns when to call it again; 0: never. */
uint64_t links_tick(uint64_t present);

/* From transports (transport.h). */

/* connect_channel() has come to its end: answers the router. */
void link_connected(struct link *link, int error, const char *text);
/* A message has arrived. The link may be down, without its channel, afterwards. */
void link_receive(struct link *link, unsigned lane, const void *data, size_t size);
/* Batches up to this one read our rings no more. */
void link_completed(struct link *link, unsigned lane, uint64_t batch);
/* The channel is lost. The link has none afterwards. */
void link_down(struct link *link, int error, const char *text);

#endif
