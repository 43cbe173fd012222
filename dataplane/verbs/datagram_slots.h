/* What the router says of datagrams: the slots that it gives, and their ends.
 *
 * A slot comes to both processes, also to the one that has not asked.
 */
#ifndef FREEFLOW_DATAGRAM_SLOTS_H
#define FREEFLOW_DATAGRAM_SLOTS_H

#include "../library/services.h"

/* The device is there: ask for slots from now on. */
void datagram_slots_start(void);
/* A message of the router. False: it is about something else. */
bool datagram_slots_handle(const struct freeflow_services *here, struct verbs_message *message);

#endif
