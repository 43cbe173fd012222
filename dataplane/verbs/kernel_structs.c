/* Attributes and paths between the kernel's structures and those of libibverbs, for librdmacm. Each
 * function copies what both have, and leaves the rest of its target as it is.
 */
#include "verb.h"

#include <infiniband/sa.h>
#include <rdma/ib_user_sa.h>
#include <rdma/ib_user_verbs.h>
#include <string.h>

#define COPY(field) (to->field = from->field)

VERB void ibv_copy_ah_attr_from_kern(struct ibv_ah_attr *to, struct ib_uverbs_ah_attr *from);
VERB void ibv_copy_ah_attr_from_kern(struct ibv_ah_attr *to, struct ib_uverbs_ah_attr *from)
{
        memcpy(to->grh.dgid.raw, from->grh.dgid, sizeof to->grh.dgid.raw);
        COPY(grh.flow_label);
        COPY(grh.sgid_index);
        COPY(grh.hop_limit);
        COPY(grh.traffic_class);
        COPY(dlid);
        COPY(sl);
        COPY(src_path_bits);
        COPY(static_rate);
        COPY(is_global);
        COPY(port_num);
}

/* Not `qp_state`: librdmacm sets it before. */
VERB void ibv_copy_qp_attr_from_kern(struct ibv_qp_attr *to, struct ib_uverbs_qp_attr *from);
VERB void ibv_copy_qp_attr_from_kern(struct ibv_qp_attr *to, struct ib_uverbs_qp_attr *from)
{
        to->cap.max_send_wr = from->max_send_wr;
        to->cap.max_recv_wr = from->max_recv_wr;
        to->cap.max_send_sge = from->max_send_sge;
        to->cap.max_recv_sge = from->max_recv_sge;
        to->cap.max_inline_data = from->max_inline_data;
        ibv_copy_ah_attr_from_kern(&to->ah_attr, &from->ah_attr);
        ibv_copy_ah_attr_from_kern(&to->alt_ah_attr, &from->alt_ah_attr);
        COPY(cur_qp_state);
        COPY(path_mtu);
        COPY(path_mig_state);
        COPY(qkey);
        COPY(rq_psn);
        COPY(sq_psn);
        COPY(dest_qp_num);
        COPY(qp_access_flags);
        COPY(pkey_index);
        COPY(alt_pkey_index);
        COPY(en_sqd_async_notify);
        COPY(sq_draining);
        COPY(max_rd_atomic);
        COPY(max_dest_rd_atomic);
        COPY(min_rnr_timer);
        COPY(port_num);
        COPY(timeout);
        COPY(retry_cnt);
        COPY(rnr_retry);
        COPY(alt_port_num);
        COPY(alt_timeout);
}

/* The fields of a path that both structures call the same. */
#define COPY_PATH()                                                                                          \
        do {                                                                                                 \
                COPY(dlid), COPY(slid), COPY(raw_traffic), COPY(flow_label), COPY(hop_limit);                \
                COPY(traffic_class), COPY(reversible), COPY(numb_path), COPY(pkey), COPY(sl);                \
                COPY(mtu_selector), COPY(mtu), COPY(rate_selector), COPY(rate);                              \
                COPY(packet_life_time_selector), COPY(packet_life_time), COPY(preference);                   \
        } while (0)

VERB void ibv_copy_path_rec_from_kern(struct ibv_sa_path_rec *to, struct ib_user_path_rec *from);
VERB void ibv_copy_path_rec_from_kern(struct ibv_sa_path_rec *to, struct ib_user_path_rec *from)
{
        memcpy(to->dgid.raw, from->dgid, sizeof from->dgid);
        memcpy(to->sgid.raw, from->sgid, sizeof from->sgid);
        COPY_PATH();
}

VERB void ibv_copy_path_rec_to_kern(struct ib_user_path_rec *to, struct ibv_sa_path_rec *from);
VERB void ibv_copy_path_rec_to_kern(struct ib_user_path_rec *to, struct ibv_sa_path_rec *from)
{
        memcpy(to->dgid, from->dgid.raw, sizeof to->dgid);
        memcpy(to->sgid, from->sgid.raw, sizeof to->sgid);
        COPY_PATH();
}
