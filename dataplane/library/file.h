/* The file of a sendfile(): read without waiting under the sender's lock, or ahead without the
 * lock. */
#ifndef FREEFLOW_FILE_H
#define FREEFLOW_FILE_H

#include "transfer.h"

/* Where the call reads next. */
off_t file_position(const struct operation *o);
void file_advance(const struct operation *o, off_t position);
/* Read what is there without waiting for a disk or a network. Returns bytes, 0 at the end of the
 * file; -ENODATA: it can't be had without waiting. */
long file_read(struct operation *o, unsigned char *place, size_t size, off_t position);
/* Wait for the file, without a lock: other threads can send meanwhile. Returns 0, or -errno;
 * -ENODATA: the file has ended. */
long file_read_ahead(struct operation *o, size_t left);
/* The call is over: the memory that it read ahead into goes to the next one. */
void file_end(struct operation *o);

#endif
