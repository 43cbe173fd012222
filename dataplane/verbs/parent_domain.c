#include "parent_domain.h"

#include "memory.h"
#include "opened.h"

#include <errno.h>
#include <stdlib.h>

static void *fail(int error)
{
        errno = error;
        return NULL;
}

struct ibv_td *thread_domain_make(struct ibv_context *context, struct ibv_td_init_attr *wanted)
{
        struct ibv_td *made;

        if (wanted->comp_mask)
                return fail(EINVAL);
        if (opened_is_lost(context))
                return fail(EIO);
        made = calloc(1, sizeof *made);
        if (made)
                made->context = context;
        return made;
}

int thread_domain_end(struct ibv_td *plain)
{
        free(plain);
        return 0;
}

/* Programs may want to allocate the memory of queues themselves. None here is a device's. */
struct ibv_pd *parent_domain_make(struct ibv_context *context, struct ibv_parent_domain_init_attr *wanted)
{
        if (wanted->comp_mask &
            ~(uint32_t)(IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS | IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT))
                return fail(EINVAL);
        if (wanted->comp_mask & IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS)
                return fail(EOPNOTSUPP);
        if (!wanted->pd)
                return fail(EINVAL);
        if (opened_is_lost(context))
                return fail(EIO);
        return domain_in(context, wanted->pd);
}
