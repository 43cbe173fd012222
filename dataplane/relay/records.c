#include "records.h"

#include <endian.h>
#include <openssl/evp.h>
#include <string.h>

enum { NONCE = 12 };

bool seal_start(struct seal *seal, const uint8_t key[RECORD_KEY], uint32_t index, bool seals)
{
        EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();

        *seal = (struct seal){.context = context, .index = index};
        return context && EVP_CipherInit_ex(context, EVP_aes_256_gcm(), NULL, key, NULL, seals) == 1;
}

/* Wipes the key. */
void seal_end(struct seal *seal)
{
        EVP_CIPHER_CTX_free(seal->context);
        seal->context = NULL;
}

bool seal_begin(struct seal *seal, const void *open, size_t size)
{
        const uint64_t number = htobe64(seal->boxes++);
        uint8_t nonce[NONCE];
        int done;

        memcpy(nonce, &seal->index, sizeof seal->index);
        memcpy(nonce + sizeof seal->index, &number, sizeof number);
        return EVP_CipherInit_ex(seal->context, NULL, NULL, NULL, nonce, -1) == 1 &&
               (!size || EVP_CipherUpdate(seal->context, NULL, &done, open, (int)size) == 1);
}

bool seal_update(struct seal *seal, const void *from, void *to, size_t size)
{
        int done;

        return EVP_CipherUpdate(seal->context, to, &done, from, (int)size) == 1;
}

bool seal_finish(struct seal *seal, uint8_t tag[RECORD_TAG])
{
        uint8_t nothing[RECORD_TAG];
        int done;

        return EVP_CipherFinal_ex(seal->context, nothing, &done) == 1 &&
               EVP_CIPHER_CTX_ctrl(seal->context, EVP_CTRL_AEAD_GET_TAG, RECORD_TAG, tag) == 1;
}

bool seal_check(struct seal *seal, const uint8_t tag[RECORD_TAG])
{
        uint8_t copy[RECORD_TAG], nothing[RECORD_TAG];
        int done;

        memcpy(copy, tag, sizeof copy);
        return EVP_CIPHER_CTX_ctrl(seal->context, EVP_CTRL_AEAD_SET_TAG, RECORD_TAG, copy) == 1 &&
               EVP_CipherFinal_ex(seal->context, nothing, &done) == 1;
}
