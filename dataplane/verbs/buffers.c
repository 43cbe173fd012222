/* Buffers whose memory the device may choose (rdma-core 64). Ours is the program's own memory. */
#include "verb.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

struct ibv_buf {
        struct ibv_pd *pd;
        unsigned char *first;
        size_t size;
};

/* Not in each header. */
VERB void *ibv_alloc_buf(struct ibv_pd *pd, size_t size, struct ibv_buf **buf);
VERB void ibv_free_buf(struct ibv_buf *buf);
VERB struct ibv_mr *ibv_reg_buf_mr(struct ibv_pd *pd, struct ibv_buf *buf, void *addr, size_t length,
                                   int access);

VERB void *ibv_alloc_buf(struct ibv_pd *pd, size_t size, struct ibv_buf **buf)
{
        struct ibv_buf *made = size ? calloc(1, sizeof *made) : NULL;

        if (!made) {
                errno = size ? ENOMEM : EINVAL;
                return NULL;
        }
        *made = (struct ibv_buf){.pd = pd, .size = size};
        made->first = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (made->first == MAP_FAILED) {
                free(made);
                errno = ENOMEM;
                return NULL;
        }
        *buf = made;
        return made->first;
}

VERB void ibv_free_buf(struct ibv_buf *buf)
{
        if (!buf)
                return;
        munmap(buf->first, buf->size);
        free(buf);
}

#undef ibv_reg_mr
VERB struct ibv_mr *ibv_reg_buf_mr(struct ibv_pd *pd, struct ibv_buf *buf, void *addr, size_t length,
                                   int access)
{
        uintptr_t offset = (uintptr_t)addr - (uintptr_t)buf->first;

        if (pd != buf->pd || offset > buf->size || length > buf->size - offset) {
                errno = EINVAL;
                return NULL;
        }
        return ibv_reg_mr(pd, addr, length, access);
}
