/* The overlay's eBPF fast path.
 *
 *   container ── ffh ─┬─ same host ────────────────────────► the other container's eth0
 *                     └─ header on ─► ffu pair ─► host's namespace: route, neighbour, NIC
 *   NIC ── header off ─► ffu pair ─► overlay namespace ────► the container's eth0
 *   VXLAN device ──────────────────────────────────────────► the container's eth0
 *
 * A packet takes it if everything about it is known and ordinary. Whatever else comes goes on to the bridge,
 * which knows ARP, multicast, unknown addresses and errors: each program ends with NEXT for it, and hasn't
 * changed a byte then. What is on the wire is VXLAN as the kernel makes it, so the other host needs none of
 * this.
 *
 * A redirect looks its device up in the namespace where the packet is. So one veth pair leads from the
 * overlay namespace into the host's: a packet that is redirected to the peer of its one end is received at
 * the other at once, in the same run of the softirq. The mark, which nothing on this way changes, says where
 * it goes then.
 *
 * Programs at the hook tc ingress run before the source filter (driver/kernel/filter.py). Only what its first
 * rules accept leaves here: the container's own MAC with its own IPv4 address, or its own IPv6 address and
 * TCP or UDP.
 */
#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "overlay.h"

#define NEXT TC_ACT_UNSPEC /* to whoever is attached behind us, and then the ordinary way */
#define VXLAN_FLAGS bpf_htonl(0x08000000)
#define OVERHEAD 50 /* outer IPv4, UDP, VXLAN, inner Ethernet */
#define AF_INET 2
#define ECN 3
#define CE 3
#define ECT0 2
#define MOMENT 250000000LL /* ns: an address is noted as heard so often at most */
/* linux/bpf.h of Debian 12 is older than this. From Linux 6.3. */
#define DECAP_L3_IPV6 (1ULL << 8)
#define PUSH                                                                                                 \
        (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |             \
         BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH)
/* Checksums are taken care of as VXLAN's own receive does: one level less is known to be right. */
#define POP (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET)

struct vxlan {
        __be32 flags;
        __be32 vni;
} __attribute__((packed));

/* From the frame's first byte on, as it is on the underlay. */
struct headers {
        struct ethhdr outer;
        struct iphdr ip;
        struct udphdr udp;
        struct vxlan vxlan;
        struct ethhdr inner;
} __attribute__((packed, aligned(2)));

_Static_assert(sizeof(struct headers) == ETH_HLEN + OVERHEAD, "no gaps");

#define HASH(kind, key_type, value_type, size)                                                               \
        {                                                                                                    \
                __uint(type, kind);                                                                          \
                __uint(map_flags, BPF_F_NO_PREALLOC);                                                        \
                __uint(max_entries, size);                                                                   \
                __type(key, key_type);                                                                       \
                __type(value, value_type);                                                                   \
        }

struct {
        __uint(type, BPF_MAP_TYPE_ARRAY);
        __uint(max_entries, 1);
        __type(key, __u32);
        __type(value, struct ff_settings);
} settings SEC(".maps");

struct HASH(BPF_MAP_TYPE_HASH, __u32, struct ff_port, 16384) ports SEC(".maps");
struct HASH(BPF_MAP_TYPE_HASH, struct ff_place_key, struct ff_place, 65536) places SEC(".maps");
struct HASH(BPF_MAP_TYPE_HASH, struct ff_network_key, __u32, 4096) networks SEC(".maps");
struct HASH(BPF_MAP_TYPE_HASH, struct ff_peer_key, struct ff_peer, 65536) peers SEC(".maps");
struct {
        __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
        __uint(max_entries, FF_SLOTS);
        __type(key, __u32);
        __type(value, struct ff_count);
} counts SEC(".maps");

static __always_inline const struct ff_settings *the_settings(void)
{
        __u32 zero = 0;

        return bpf_map_lookup_elem(&settings, &zero);
}

/* Whether the packet has `length` bytes, and they can be read directly; pointers into it are to be taken
 * anew. */
static __always_inline bool readable(struct __sk_buff *skb, __u32 length)
{
        if ((void *)(long)skb->data + length <= (void *)(long)skb->data_end)
                return true;
        return skb->len >= length && !bpf_skb_pull_data(skb, length) &&
               (void *)(long)skb->data + length <= (void *)(long)skb->data_end;
}

static __always_inline bool same_mac(const __u8 *one, const __u8 *other)
{
        return ((one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) | (one[3] ^ other[3]) |
                (one[4] ^ other[4]) | (one[5] ^ other[5])) == 0;
}

static __always_inline bool same_ip6(const struct in6_addr *one, const __u8 *other)
{
        __u32 b[4];

        __builtin_memcpy(b, other, sizeof(b));
        return ((one->in6_u.u6_addr32[0] ^ b[0]) | (one->in6_u.u6_addr32[1] ^ b[1]) |
                (one->in6_u.u6_addr32[2] ^ b[2]) | (one->in6_u.u6_addr32[3] ^ b[3])) == 0;
}

static __always_inline void key_of(struct ff_place_key *key, __u32 net, const __u8 *mac)
{
        key->net = net;
        key->zero = 0;
        __builtin_memcpy(key->mac, mac, ETH_ALEN);
}

static __always_inline __be16 sum_of(const struct iphdr *ip)
{
        const __u16 *words = (const __u16 *)ip;
        __u32 sum = 0;

#pragma unroll
        for (int i = 0; i < 10; i++)
                sum += words[i];
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        return (__be16)~sum;
}

/* --- from a container */

/* What of an inner packet its way depends on. */
struct inner {
        __u32 length; /* of its IP header */
        __u8 protocol;
        __u8 tos;
        bool six;
};

/* Whether the packet, or each that it will be cut into, fits with its new header. Who doesn't hears of it
 * from the ordinary path. */
static __always_inline bool fits(struct __sk_buff *skb, const struct inner *inner, __u32 mtu)
{
        __u32 whole = skb->len - ETH_HLEN + OVERHEAD, size = skb->gso_size;
        __u8 offset = 0;

        if (whole > 65535)
                return false;
        if (!size)
                return whole <= mtu;
        if (inner->protocol == IPPROTO_TCP) {
                if (bpf_skb_load_bytes(skb, ETH_HLEN + inner->length + 12, &offset, 1))
                        return false;
                return OVERHEAD + inner->length + (offset >> 4) * 4 + size <= mtu;
        }
        return inner->protocol == IPPROTO_UDP &&
               OVERHEAD + inner->length + sizeof(struct udphdr) + size <= mtu;
}

/* To another host. */
static __always_inline int push(struct __sk_buff *skb, const struct ff_port *own,
                                const struct ff_place *place, const struct inner *inner)
{
        const struct ff_settings *set = the_settings();
        struct ff_peer_key key = {.net = own->net, .address = place->peer};
        struct headers new = {};
        struct iphdr ip = {};
        const struct ff_peer *peer;
        __u64 now = bpf_ktime_get_ns();
        __u32 hash;

        if (!set || !(set->flags & (inner->six ? FF_PUSH6 : FF_PUSH4)) || now >= set->lease ||
            (__s64)(now - place->seen) > (__s64)set->idle)
                return NEXT;
        peer = bpf_map_lookup_elem(&peers, &key);
        if (!peer || !fits(skb, inner, peer->mtu))
                return NEXT;
        /* udp_flow_src_port() of the kernel: a packet that goes the other way has the same port. */
        hash = bpf_get_hash_recalc(skb);
        hash ^= hash << 16;
        new.udp.source =
            bpf_htons((__u16)(((__u64)hash * (__u32)(set->port_high - set->port_low)) >> 32) + set->port_low);
        new.udp.dest = own->udp_port;
        new.udp.len = bpf_htons(skb->len + sizeof(struct udphdr) + sizeof(struct vxlan));
        ip.version = 4;
        ip.ihl = 5;
        /* RFC 6040: congestion that was met inside isn't told again outside. */
        ip.tos = (inner->tos & ECN) == CE ? ECT0 : inner->tos & ECN;
        ip.tot_len = bpf_htons(skb->len - ETH_HLEN + OVERHEAD);
        /* What is cut for a narrow link on the way is told apart by it. */
        ip.id = (__be16)bpf_get_prandom_u32();
        ip.ttl = set->ttl;
        ip.protocol = IPPROTO_UDP;
        ip.saddr = peer->source;
        ip.daddr = place->peer;
        ip.check = sum_of(&ip);
        new.ip = ip;
        new.vxlan.flags = VXLAN_FLAGS;
        new.vxlan.vni = own->vni;
        if (bpf_skb_load_bytes(skb, 0, &new.inner, ETH_HLEN))
                return NEXT;
        /* It is nobody's frame before `ff_out` takes it: of its addresses only this is read, and who is next.
         */
        new.outer.h_dest[0] = 2;
        __builtin_memcpy(&new.outer.h_source[2], &peer->next, sizeof(peer->next));
        new.outer.h_proto = bpf_htons(ETH_P_IP);
        /* Refused, with nothing changed, for packets that a tunnel inside the container has already wrapped.
         */
        if (bpf_skb_adjust_room(skb, OVERHEAD, BPF_ADJ_ROOM_MAC, PUSH))
                return NEXT;
        if (bpf_skb_store_bytes(skb, 0, &new, sizeof(new), 0))
                return TC_ACT_SHOT;
        skb->mark = peer->ifindex;
        bpf_skb_change_type(skb, PACKET_HOST);
        return bpf_redirect_peer(set->inside, 0);
}

SEC("tc")
int ff_port(struct __sk_buff *skb)
{
        __u32 index = skb->ifindex;
        const struct ff_port *own = bpf_map_lookup_elem(&ports, &index);
        struct ff_place_key key;
        struct ff_place *place;
        struct ff_count *count;
        struct inner inner = {};
        const struct ethhdr *eth;

        if (!own || skb->vlan_present || !readable(skb, ETH_HLEN + sizeof(struct iphdr)))
                return NEXT;
        eth = (const void *)(long)skb->data;
        if ((const void *)(eth + 1) + sizeof(struct iphdr) > (const void *)(long)skb->data_end)
                return NEXT;
        if (!same_mac(eth->h_source, own->mac))
                return NEXT;
        if (eth->h_proto == bpf_htons(ETH_P_IP)) {
                const struct iphdr *ip = (const void *)(eth + 1);

                if (!(own->flags & FF_IP4) || ip->version != 4 || ip->ihl < 5 || ip->saddr != own->ip4)
                        return NEXT;
                inner.length = ip->ihl * 4;
                inner.protocol = ip->protocol;
                inner.tos = ip->tos;
        } else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
                const struct ipv6hdr *ip;

                if (!readable(skb, ETH_HLEN + sizeof(struct ipv6hdr)))
                        return NEXT;
                eth = (const void *)(long)skb->data;
                ip = (const void *)(eth + 1);
                if ((const void *)(ip + 1) > (const void *)(long)skb->data_end)
                        return NEXT;
                if (!(own->flags & FF_IP6) || ip->version != 6 || !same_ip6(&ip->saddr, own->ip6))
                        return NEXT;
                /* Neighbour discovery, and headers that may hide it, are the filter's to judge. */
                if (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != IPPROTO_UDP)
                        return NEXT;
                inner.length = sizeof(struct ipv6hdr);
                inner.protocol = ip->nexthdr;
                inner.tos = (__u8)(ip->priority << 4 | ip->flow_lbl[0] >> 4);
                inner.six = true;
        } else {
                return NEXT;
        }
        key_of(&key, own->net, eth->h_dest);
        place = bpf_map_lookup_elem(&places, &key);
        if (!place || place->ifindex == index)
                return NEXT;
        if (!place->ifindex) {
                __u32 length = skb->len;
                int verdict = push(skb, own, place, &inner);

                if (verdict == TC_ACT_REDIRECT) {
                        count = bpf_map_lookup_elem(&counts, &own->slot);
                        if (count) {
                                count->sent_packets++;
                                count->sent_bytes += length;
                        }
                }
                return verdict;
        }
        index = place->ifindex;
        count = bpf_map_lookup_elem(&counts, &place->slot);
        if (count) {
                count->local_packets++;
                count->local_bytes += skb->len;
        }
        /* It was for another MAC address than the link's own. */
        bpf_skb_change_type(skb, PACKET_HOST);
        return bpf_redirect_peer(index, 0);
}

/* Our pair's end in the host's namespace: what comes has its header, the mark says which device leads on, and
 * the last bytes of the source address who is next there. */
SEC("tc")
int ff_out(struct __sk_buff *skb)
{
        struct bpf_redir_neigh next = {.nh_family = AF_INET};
        const struct ethhdr *eth = (const void *)(long)skb->data;
        __u32 device = skb->mark;

        if (!device || (const void *)(eth + 1) > (const void *)(long)skb->data_end)
                return TC_ACT_SHOT;
        __builtin_memcpy(&next.ipv4_nh, &eth->h_source[2], sizeof(next.ipv4_nh));
        /* Nothing of ours is for rules that go by marks. */
        skb->mark = 0;
        if (!next.ipv4_nh)
                return bpf_redirect_neigh(device, NULL, 0, 0);
        return bpf_redirect_neigh(device, &next, sizeof(next), 0);
}

/* --- from the underlay */

/* The end in the overlay namespace: the header is off, and the mark says whose link it is. */
SEC("tc")
int ff_in(struct __sk_buff *skb)
{
        __u32 device = skb->mark;

        if (!device)
                return TC_ACT_SHOT;
        skb->mark = 0;
        return bpf_redirect_peer(device, 0);
}

/* What the kernel's VXLAN device and bridge do, too: an address is where its last packet came from. */
static __always_inline void learn(const struct ff_place_key *key, __be32 peer, __u64 now)
{
        struct ff_place *place = bpf_map_lookup_elem(&places, key);

        if (!place) {
                struct ff_place new = {.seen = now, .peer = peer};

                bpf_map_update_elem(&places, key, &new, BPF_NOEXIST);
                return;
        }
        /* Nobody takes away an address of this host. */
        if (place->ifindex)
                return;
        if (place->peer != peer)
                place->peer = peer;
        if ((__s64)(now - place->seen) > MOMENT)
                place->seen = now;
}

SEC("tc")
int ff_nic(struct __sk_buff *skb)
{
        const struct ff_settings *set;
        const struct headers *all;
        struct ff_network_key wire = {};
        struct ff_peer_key from;
        struct ff_place_key key;
        struct ff_place *place;
        struct ff_count *count;
        const struct ff_peer *peer;
        const __u32 *net;
        struct ethhdr inner;
        __u64 flags = POP, now;
        __u32 link, slot;
        bool six, odd;

        /* Nearly everything that isn't ours ends here. */
        if (skb->protocol != bpf_htons(ETH_P_IP) || skb->pkt_type != PACKET_HOST || skb->vlan_present ||
            !readable(skb, sizeof(struct headers)))
                return NEXT;
        all = (const void *)(long)skb->data;
        if ((const void *)(all + 1) > (const void *)(long)skb->data_end)
                return NEXT;
        if (all->ip.version != 4 || all->ip.ihl != 5 || all->ip.protocol != IPPROTO_UDP ||
            all->vxlan.flags != VXLAN_FLAGS)
                return NEXT;
        wire.vni = all->vxlan.vni;
        wire.udp_port = all->udp.dest;
        net = bpf_map_lookup_elem(&networks, &wire);
        if (!net)
                return NEXT;
        /* A later piece of a packet has no such header. */
        if (all->ip.frag_off & bpf_htons(0x1fff))
                return NEXT;
        /* What has been cut, has a checksum to be looked at, or met congestion: the kernel knows how. */
        odd = all->ip.frag_off & bpf_htons(0x3fff) || all->udp.check || (all->ip.tos & ECN) == CE ||
              bpf_ntohs(all->ip.tot_len) + ETH_HLEN != skb->len ||
              bpf_ntohs(all->udp.len) + sizeof(struct iphdr) != bpf_ntohs(all->ip.tot_len);
        from.net = *net;
        from.address = all->ip.saddr;
        peer = bpf_map_lookup_elem(&peers, &from);
        if (!peer || peer->source != all->ip.daddr)
                return NEXT;
        set = the_settings();
        now = bpf_ktime_get_ns();
        if (!set || !(set->flags & FF_POP4) || now >= set->lease)
                return NEXT;
        inner = all->inner;
        if (inner.h_source[0] & 1)
                return NEXT;
        key_of(&key, *net, inner.h_source);
        /* From each packet, also from one that isn't taken here: so nothing that peers send comes past. */
        learn(&key, from.address, now);
        if (odd)
                return NEXT;

        six = inner.h_proto == bpf_htons(ETH_P_IPV6);
        if (!six && inner.h_proto != bpf_htons(ETH_P_IP))
                return NEXT;
        if (six && !(set->flags & FF_POP6))
                return NEXT;
        key_of(&key, *net, inner.h_dest);
        place = bpf_map_lookup_elem(&places, &key);
        if (!place || !place->ifindex || !(place->flags & FF_ENDS))
                return NEXT;
        /* Only what ends in the container: a packet that was cut by nobody yet keeps the mark of a tunnel,
         * which a container that forwards it would hand to a device that takes it at its word. */
        if (six) {
                const struct ipv6hdr *ip;

                if (!readable(skb, sizeof(struct headers) + sizeof(struct ipv6hdr)))
                        return NEXT;
                ip = (const void *)(long)skb->data + sizeof(struct headers);
                if ((const void *)(ip + 1) > (const void *)(long)skb->data_end)
                        return NEXT;
                if (!(place->flags & FF_IP6) || ip->version != 6 || !same_ip6(&ip->daddr, place->ip6))
                        return NEXT;
                flags |= DECAP_L3_IPV6;
        } else {
                const struct iphdr *ip;

                if (!readable(skb, sizeof(struct headers) + sizeof(struct iphdr)))
                        return NEXT;
                ip = (const void *)(long)skb->data + sizeof(struct headers);
                if ((const void *)(ip + 1) > (const void *)(long)skb->data_end)
                        return NEXT;
                if (!(place->flags & FF_IP4) || ip->version != 4 || ip->daddr != place->ip4)
                        return NEXT;
        }
        link = place->ifindex;
        slot = place->slot;
        if (bpf_skb_adjust_room(skb, -OVERHEAD, BPF_ADJ_ROOM_MAC, flags))
                return NEXT;
        if (bpf_skb_store_bytes(skb, 0, &inner, sizeof(inner), 0))
                return TC_ACT_SHOT;
        bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
        count = bpf_map_lookup_elem(&counts, &slot);
        if (count) {
                count->nic_packets++;
                count->nic_bytes += skb->len;
        }
        skb->mark = link;
        return bpf_redirect_peer(set->outside, 0);
}

/* What the kernel's VXLAN device has unwrapped. */
SEC("tc")
int ff_vxlan(struct __sk_buff *skb)
{
        __u32 index = skb->ifindex;
        const struct ff_port *own = bpf_map_lookup_elem(&ports, &index);
        const struct ff_settings *set;
        const struct ethhdr *eth;
        struct ff_place_key key;
        struct ff_place *place;
        struct ff_count *count;
        __u64 now;

        if (!own || !readable(skb, ETH_HLEN))
                return NEXT;
        eth = (const void *)(long)skb->data;
        if ((const void *)(eth + 1) > (const void *)(long)skb->data_end)
                return NEXT;
        set = the_settings();
        now = bpf_ktime_get_ns();
        /* Without a plugin nobody tells the bridge what it doesn't see: then it is to see it. */
        if (!set || now >= set->lease)
                return NEXT;
        key_of(&key, own->net, eth->h_source);
        place = bpf_map_lookup_elem(&places, &key);
        /* An address of ours from outside: the bridge's to judge. */
        if (place && place->ifindex)
                return NEXT;
        if (!(set->flags & FF_POP4)) {
                /* Nobody at the NIC sees who is where. That it is elsewhere is noted for the bridge, which
                 * would forget it. */
                if (!(eth->h_source[0] & 1))
                        learn(&key, 0, now);
        } else if (place && (__s64)(now - place->seen) > (__s64)set->idle) {
                /* Whose frame this is isn't known here: its outer source is gone. The NIC, which all packets
                 * of peers pass, would have noted a move; so only what it hasn't heard for long makes room.
                 */
                bpf_map_delete_elem(&places, &key);
        }
        if (skb->vlan_present ||
            (eth->h_proto != bpf_htons(ETH_P_IP) && eth->h_proto != bpf_htons(ETH_P_IPV6)))
                return NEXT;
        key_of(&key, own->net, eth->h_dest);
        place = bpf_map_lookup_elem(&places, &key);
        if (!place || !place->ifindex)
                return NEXT;
        index = place->ifindex;
        count = bpf_map_lookup_elem(&counts, &place->slot);
        if (count) {
                count->vxlan_packets++;
                count->vxlan_bytes += skb->len;
        }
        bpf_skb_change_type(skb, PACKET_HOST);
        return bpf_redirect_peer(index, 0);
}

/* --- run once, on packets that are made up: does this kernel do it, and does it know afterwards which packet
 * it has? */

SEC("tc")
int ff_try_push(struct __sk_buff *skb)
{
        if (bpf_skb_adjust_room(skb, OVERHEAD, BPF_ADJ_ROOM_MAC, PUSH))
                return 1;
        return skb->protocol == bpf_htons(ETH_P_IP) ? 0 : 2;
}

SEC("tc")
int ff_try_pop4(struct __sk_buff *skb)
{
        if (bpf_skb_adjust_room(skb, -OVERHEAD, BPF_ADJ_ROOM_MAC, POP))
                return 1;
        return skb->protocol == bpf_htons(ETH_P_IP) ? 0 : 2;
}

SEC("tc")
int ff_try_pop6(struct __sk_buff *skb)
{
        if (bpf_skb_adjust_room(skb, -OVERHEAD, BPF_ADJ_ROOM_MAC, POP | DECAP_L3_IPV6))
                return 1;
        return skb->protocol == bpf_htons(ETH_P_IPV6) ? 0 : 2;
}

/* No helper that is used here asks for another licence. */
char LICENSE[] SEC("license") = "Apache-2.0";
