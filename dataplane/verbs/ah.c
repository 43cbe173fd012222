/* Address handles: where datagrams go, as programs make them. */
#include "ah.h"

#include "memory.h"
#include "opened.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct ibv_ah *fail(int error)
{
        errno = error;
        return NULL;
}

VERB struct ibv_ah *ibv_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *wanted)
{
        static const union ibv_gid nobody;
        struct address_handle *handle;
        union ibv_gid from;

        if (opened_is_lost(pd->context))
                return fail(EIO);
        /* As on every Ethernet there are no local addresses but GIDs. */
        if (!wanted->is_global || wanted->port_num != PORT_NUMBER ||
            !port_gid(wanted->grh.sgid_index, &from) ||
            memcmp(&wanted->grh.dgid, &nobody, sizeof nobody) == 0)
                return fail(EINVAL);
        handle = calloc(1, sizeof *handle);
        if (!handle)
                return fail(ENOMEM);
        handle->plain = (struct ibv_ah){.context = pd->context, .pd = pd};
        handle->from = from;
        memcpy(&handle->to, &wanted->grh.dgid, sizeof handle->to);
        domain_use(pd);
        return &handle->plain;
}

VERB int ibv_destroy_ah(struct ibv_ah *plain)
{
        domain_leave(plain->pd);
        free(handle_of(plain));
        return 0;
}

/* --- answering who has sent something */

enum { LABEL = 0xfffff, CLASS_SHIFT = 20, CLASS = 0xff };

VERB int ibv_init_ah_from_wc(struct ibv_context *context, uint8_t port, struct ibv_wc *wc,
                             struct ibv_grh *grh, struct ibv_ah_attr *to)
{
        struct ibv_grh header;
        uint32_t flow, index;

        (void)context;
        /* It is where the program has received it. */
        memcpy(&header, grh, sizeof header);
        flow = be32toh(header.version_tclass_flow);
        if (!(wc->wc_flags & IBV_WC_GRH) || !port_find(&header.dgid, &index)) {
                errno = EINVAL;
                return -1;
        }
        *to = (struct ibv_ah_attr){.grh = {.dgid = header.sgid,
                                           .flow_label = flow & LABEL,
                                           .sgid_index = (uint8_t)index,
                                           .hop_limit = header.hop_limit,
                                           .traffic_class = (uint8_t)(flow >> CLASS_SHIFT & CLASS)},
                                   .dlid = wc->slid,
                                   .sl = wc->sl,
                                   .src_path_bits = wc->dlid_path_bits,
                                   .is_global = 1,
                                   .port_num = port};
        return 0;
}

VERB struct ibv_ah *ibv_create_ah_from_wc(struct ibv_pd *pd, struct ibv_wc *wc, struct ibv_grh *grh,
                                          uint8_t port)
{
        struct ibv_ah_attr wanted;

        return ibv_init_ah_from_wc(pd->context, port, wc, grh, &wanted) ? NULL : ibv_create_ah(pd, &wanted);
}
