/* The event channels, ids and groups of the process, and the events that programs have not read.
 *
 * All but cm_mutex is for whoever holds cm_mutex.
 */
#ifndef FREEFLOW_CM_TABLE_H
#define FREEFLOW_CM_TABLE_H

#include "cm.h"
#include "mutex.h"

/* Not to be held while messages are taken from the router (client_receive()). */
extern struct mutex cm_mutex;

/* --- event channels */

/* A channel with a new descriptor. Returns that, or a negative errno. */
int cm_file_open(void);
/* The channel of a descriptor; NULL: it has none, or is one of the parent of this process. */
struct cm_file *cm_file_of(int fd);
/* Is it one's descriptor, even if that is the parent's? */
bool cm_file_is(int fd);
void cm_file_add(int fd, int other);
/* The descriptor is one no more. Returns the channel that no descriptor leads to any more, or NULL.
 */
struct cm_file *cm_file_drop(int fd);
/* After its ids. */
void cm_file_free(struct cm_file *file);

/* --- ids */

/* A new one; NULL: there are no more, or there is no memory. */
struct cm_id *cm_id_new(struct cm_file *file, uint16_t space, uint8_t type);
void cm_id_free(struct cm_id *id);
/* By the program's number. Returns 0 or a negative errno. */
int cm_id_find(const struct cm_file *file, uint32_t place, struct cm_id **found);
/* By the number for the router; NULL: there is none. */
struct cm_id *cm_id_of(uint32_t number);
/* The first one from this place on; NULL: there are no more. */
struct cm_id *cm_id_from(uint32_t place);

/* --- groups */

struct cm_group *cm_group_new(struct cm_id *id);
void cm_group_free(struct cm_group *group);
int cm_group_find(const struct cm_file *file, uint32_t place, struct cm_group **found);
struct cm_group *cm_group_of(const struct cm_id *id);

/* --- events */

/* An event of an id, for the caller to complete; NULL: the program doesn't know the id, or there is
 * no memory. */
struct cm_event *cm_event_new(struct cm_id *owner, uint32_t kind, int status);
/* Let the program have it. */
void cm_event_put(struct cm_event *event);
/* Shorthand: an event without anything else. */
void cm_event_tell(struct cm_id *owner, uint32_t kind, int status);
/* The oldest one of a channel, which stays there; NULL: none. */
struct cm_event *cm_event_first(const struct cm_file *file);
/* It has been read. */
void cm_event_take(struct cm_event *event);
/* Take the next event of an id that nobody has read from its channel, for the caller to free; NULL:
 * there are no more. Of a group, if it isn't NULL. */
struct cm_event *cm_event_withdraw(struct cm_id *owner, const struct cm_group *group);
/* Move an id with its events. */
void cm_id_move(struct cm_id *id, struct cm_file *file);

/* In a child of fork(): what was there is the parent's. */
void cm_table_forget(void);

#endif
