/* Queue pairs of the transport `verbs`: one reliable connected queue pair per link.
 *
 * A link is lost after RETRIES times 4.096 us << TIMEOUT without an acknowledgement: two seconds,
 * and up to four times as long on devices that round up. Receiver-not-ready cannot happen, since
 * messages are granted.
 */
#ifndef FREEFLOW_RELAY_VERBS_PAIR_H
#define FREEFLOW_RELAY_VERBS_PAIR_H

#include "verbs_device.h"

/* Work request IDs: the channel's number, a bit for receives, and the number of the buffer or
 * batch. A channel's number is used once: completions of a destroyed channel are recognised and
 * ignored. */
enum { ID_SHIFT = 40 };
#define ID_RECEIVE (UINT64_C(1) << 39)
#define ID_MASK (ID_RECEIVE - 1)

/* Prepares threads that connect queue pairs. errno, with a text. */
int verbs_start_jobs(char *text);
/* As the functions of a transport (transport.h). */
int verbs_create_channel(struct link *link, struct wire_address *address, char *text);
int verbs_connect_channel(struct link *link, const struct wire_address *address, char *text);
void verbs_destroy_channel(struct link *link);
/* NULL: the channel with this number was destroyed. */
struct verbs_channel *verbs_channel_numbered(uint32_t number);
/* Buffers below WINDOW are for messages that arrive, the others for those that are sent. */
struct wire_message *verbs_buffer(struct verbs_channel *channel, uint64_t number);
/* A message has arrived in this buffer: passes it on, and makes room for another one. */
void verbs_receive(struct verbs_channel *channel, uint64_t number, uint32_t size);

#endif
