/* What is sealed in records between two relays over TCP: AES-256-GCM (NIST SP 800-38D), by
 * libcrypto.
 *
 * Each relay makes a key for what it receives on a channel; the routers carry it to the peer within
 * their session. A seal is one direction of one socket. Its nonces are the socket's index (4 bytes)
 * and a count of boxes (8 bytes, big-endian), which only grows, so no nonce is used twice under a
 * key, and a box that is missing, doubled, or out of its place does not open.
 *
 * A box is begun, goes through in any number of parts, and is finished with a tag.
 */
#ifndef FREEFLOW_RELAY_RECORDS_H
#define FREEFLOW_RELAY_RECORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
        RECORD_KEY = 32, /* bytes */
        RECORD_TAG = 16,
};

struct seal {
        void *context; /* libcrypto's; NULL: not started */
        uint32_t index;
        uint64_t boxes;
};

/* `seals`: it seals; otherwise it opens. False: libcrypto fails. */
bool seal_start(struct seal *seal, const uint8_t key[RECORD_KEY], uint32_t index, bool seals);
void seal_end(struct seal *seal);
/* Begins a box; `open` bytes are authenticated with it, and not encrypted. */
bool seal_begin(struct seal *seal, const void *open, size_t size);
bool seal_update(struct seal *seal, const void *from, void *to, size_t size);
/* Finishes a box that is sealed: its tag. */
bool seal_finish(struct seal *seal, uint8_t tag[RECORD_TAG]);
/* Finishes a box that is opened. False: it is not the peer's, or not the next one. */
bool seal_check(struct seal *seal, const uint8_t tag[RECORD_TAG]);

#endif
