/* The overlay's eBPF fast path.
 *
 *   container ── ffh ─┬─ same host ──────────────────────────► the other container's eth0
 *                     └─ encapsulate ─► ffu pair ─► host's namespace: route, neighbour, NIC
 *   NIC ── decapsulate ─► ffu pair ─► overlay namespace ─────► the container's eth0
 *   VXLAN device ────────────────────────────────────────────► the container's eth0
 *
 * A packet takes the fast path if everything about it is known and ordinary. All other packets
 * continue on the kernel path: each program returns NEXT for them, and has not changed a byte then.
 * The bridge handles ARP, multicast, unknown addresses and errors. Packets on the wire are VXLAN
 * (RFC 7348) as the kernel makes it, so the other host needs no fast path.
 *
 * bpf_redirect() and its relatives look a device up in the namespace where the packet is. So one
 * veth pair leads from the overlay namespace into the host's. A packet that is redirected to the
 * peer of one end is received at the other end at once, in the same softirq. The mark, which
 * nothing on this path changes, holds the device to which the packet goes from there.
 *
 * Programs at the tc ingress hook run before the source filter (driver/kernel/filter.py). They pass
 * only packets that the filter's first rules would accept: from the container's own MAC address and
 * either its own IPv4 address, or its own IPv6 address with TCP or UDP.
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

#define NEXT TC_ACT_UNSPEC /* to programs attached after this one, then to the kernel path */
#define VXLAN_FLAGS bpf_htonl(0x08000000)
#define OVERHEAD 50 /* outer IPv4, UDP, VXLAN, inner Ethernet */
#define AF_INET 2
#define ECN 3
#define CE 3
#define ECT0 2
#define MOMENT 250000000LL /* ns between updates of `seen` */
/* From Linux 6.3; not in the linux/bpf.h of Debian 12. */
#define DECAP_L3_IPV6 (1ULL << 8)
#define ENCAP_FLAGS                                                                                          \
        (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |             \
         BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH)
/* As in the kernel's VXLAN receive: the checksum level is decremented instead of reset. */
#define DECAP_FLAGS (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET)

struct vxlan {
        __be32 flags;
        __be32 vni;
} __attribute__((packed));

/* The headers of a frame on the underlay, from its first byte. */
struct headers {
        struct ethhdr outer;
        struct iphdr ip;
        struct udphdr udp;
        struct vxlan vxlan;
        struct ethhdr inner;
} __attribute__((packed, aligned(2)));

_Static_assert(sizeof(struct headers) == ETH_HLEN + OVERHEAD, "no padding");

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
struct HASH(BPF_MAP_TYPE_HASH, struct ff_fdb_key, struct ff_fdb_entry, 65536) places SEC(".maps");
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

/* Makes the first `length` bytes readable by direct access. False: the packet is shorter. Pointers
 * into the packet are invalid afterwards. */
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

static __always_inline void key_of(struct ff_fdb_key *key, __u32 net, const __u8 *mac)
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

/* The properties of an inner packet that encapsulation needs. */
struct inner {
        __u32 length; /* of its IP header */
        __u8 protocol;
        __u8 tos;
        bool six;
};

/* Does the encapsulated packet, or each of its segments (GSO), fit the MTU? Oversized packets take
 * the kernel path, which reports the error to the sender. */
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

/* Encapsulates a packet to another host and redirects it to the host's namespace. */
static __always_inline int encapsulate(struct __sk_buff *skb, const struct ff_port *own,
                                       const struct ff_fdb_entry *entry, const struct inner *inner)
{
        const struct ff_settings *set = the_settings();
        struct ff_peer_key key = {.net = own->net, .address = entry->peer};
        struct headers new = {};
        struct iphdr ip = {};
        const struct ff_peer *peer;
        __u64 now = bpf_ktime_get_ns();
        __u32 hash;

        if (!set || !(set->flags & (inner->six ? FF_ENCAP6 : FF_ENCAP4)) || now >= set->lease ||
            (__s64)(now - entry->seen) > (__s64)set->idle)
                return NEXT;
        peer = bpf_map_lookup_elem(&peers, &key);
        if (!peer || !fits(skb, inner, peer->mtu))
                return NEXT;
        /* As the kernel's udp_flow_src_port(), so a flow has the same port on both paths. */
        hash = bpf_get_hash_recalc(skb);
        hash ^= hash << 16;
        new.udp.source =
            bpf_htons((__u16)(((__u64)hash * (__u32)(set->port_high - set->port_low)) >> 32) + set->port_low);
        new.udp.dest = own->udp_port;
        new.udp.len = bpf_htons(skb->len + sizeof(struct udphdr) + sizeof(struct vxlan));
        ip.version = 4;
        ip.ihl = 5;
        /* RFC 6040: a CE mark of the inner packet is not copied to the outer one. */
        ip.tos = (inner->tos & ECN) == CE ? ECT0 : inner->tos & ECN;
        ip.tot_len = bpf_htons(skb->len - ETH_HLEN + OVERHEAD);
        /* Fragments are reassembled by it, if a link of the underlay fragments the packet. */
        ip.id = (__be16)bpf_get_prandom_u32();
        ip.ttl = set->ttl;
        ip.protocol = IPPROTO_UDP;
        ip.saddr = peer->source;
        ip.daddr = entry->peer;
        ip.check = sum_of(&ip);
        new.ip = ip;
        new.vxlan.flags = VXLAN_FLAGS;
        new.vxlan.vni = own->vni;
        if (bpf_skb_load_bytes(skb, 0, &new.inner, ETH_HLEN))
                return NEXT;
        /* Until `ff_out` redirects the packet, its outer Ethernet header is scratch space: the
         * source address carries the next hop's IPv4 address. Apart from that only the first byte
         * of the destination is read. */
        new.outer.h_dest[0] = 2;
        __builtin_memcpy(&new.outer.h_source[2], &peer->next, sizeof(peer->next));
        new.outer.h_proto = bpf_htons(ETH_P_IP);
        /* The kernel refuses it, and changes nothing, for GSO packets that a tunnel inside the
         * container has encapsulated already. */
        if (bpf_skb_adjust_room(skb, OVERHEAD, BPF_ADJ_ROOM_MAC, ENCAP_FLAGS))
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
        struct ff_fdb_key key;
        struct ff_fdb_entry *entry;
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
                /* Neighbour discovery, and extension headers that may hide it, are left to the
                 * filter. */
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
        entry = bpf_map_lookup_elem(&places, &key);
        if (!entry || entry->ifindex == index)
                return NEXT;
        if (!entry->ifindex) {
                __u32 length = skb->len;
                int verdict = encapsulate(skb, own, entry, &inner);

                if (verdict == TC_ACT_REDIRECT) {
                        count = bpf_map_lookup_elem(&counts, &own->slot);
                        if (count) {
                                count->sent_packets++;
                                count->sent_bytes += length;
                        }
                }
                return verdict;
        }
        index = entry->ifindex;
        count = bpf_map_lookup_elem(&counts, &entry->slot);
        if (count) {
                count->local_packets++;
                count->local_bytes += skb->len;
        }
        /* Its destination is not the MAC address of the link it came from: the kernel took it for
         * PACKET_OTHERHOST. */
        bpf_skb_change_type(skb, PACKET_HOST);
        return bpf_redirect_peer(index, 0);
}

/* At our pair's end in the host's namespace: packets are encapsulated, the mark is the device to
 * send them on, and the last four bytes of the source MAC address are the next hop. */
SEC("tc")
int ff_out(struct __sk_buff *skb)
{
        struct bpf_redir_neigh next = {.nh_family = AF_INET};
        const struct ethhdr *eth = (const void *)(long)skb->data;
        __u32 device = skb->mark;

        if (!device || (const void *)(eth + 1) > (const void *)(long)skb->data_end)
                return TC_ACT_SHOT;
        __builtin_memcpy(&next.ipv4_nh, &eth->h_source[2], sizeof(next.ipv4_nh));
        /* The host's rules must not match our mark. */
        skb->mark = 0;
        if (!next.ipv4_nh)
                return bpf_redirect_neigh(device, NULL, 0, 0);
        return bpf_redirect_neigh(device, &next, sizeof(next), 0);
}

/* --- from the underlay */

/* At our pair's end in the overlay namespace: packets are decapsulated, and the mark is the
 * container's link. */
SEC("tc")
int ff_in(struct __sk_buff *skb)
{
        __u32 device = skb->mark;

        if (!device)
                return TC_ACT_SHOT;
        skb->mark = 0;
        return bpf_redirect_peer(device, 0);
}

/* Notes where an address is, as the kernel's VXLAN device does: where its last packet came from. */
static __always_inline void learn(const struct ff_fdb_key *key, __be32 peer, __u64 now)
{
        struct ff_fdb_entry *entry = bpf_map_lookup_elem(&places, key);

        if (!entry) {
                struct ff_fdb_entry new = {.seen = now, .peer = peer};

                bpf_map_update_elem(&places, key, &new, BPF_NOEXIST);
                return;
        }
        /* A packet from outside never moves an address of this host. */
        if (entry->ifindex)
                return;
        if (entry->peer != peer)
                entry->peer = peer;
        if ((__s64)(now - entry->seen) > MOMENT)
                entry->seen = now;
}

SEC("tc")
int ff_nic(struct __sk_buff *skb)
{
        const struct ff_settings *set;
        const struct headers *all;
        struct ff_network_key wire = {};
        struct ff_peer_key from;
        struct ff_fdb_key key;
        struct ff_fdb_entry *entry;
        struct ff_count *count;
        const struct ff_peer *peer;
        const __u32 *net;
        struct ethhdr inner;
        __u64 flags = DECAP_FLAGS, now;
        __u32 link, slot;
        bool six, odd;

        /* Nearly all packets that are not VXLAN end here. */
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
        /* Only the first fragment of a packet has these headers. */
        if (all->ip.frag_off & bpf_htons(0x1fff))
                return NEXT;
        /* Fragments, packets with an outer checksum, and CE marks are left to the kernel. */
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
        if (!set || !(set->flags & FF_DECAP4) || now >= set->lease)
                return NEXT;
        inner = all->inner;
        if (inner.h_source[0] & 1)
                return NEXT;
        key_of(&key, *net, inner.h_source);
        /* From every packet of a peer, also from those that the kernel path handles. */
        learn(&key, from.address, now);
        if (odd)
                return NEXT;

        six = inner.h_proto == bpf_htons(ETH_P_IPV6);
        if (!six && inner.h_proto != bpf_htons(ETH_P_IP))
                return NEXT;
        if (six && !(set->flags & FF_DECAP6))
                return NEXT;
        key_of(&key, *net, inner.h_dest);
        entry = bpf_map_lookup_elem(&places, &key);
        if (!entry || !entry->ifindex || !(entry->flags & FF_FINAL))
                return NEXT;
        /* Only packets whose final destination is the container. GSO packets keep their tunnel GSO
         * type after decapsulation, since no kernel lets a BPF program clear it. A container that
         * forwarded such a packet would hand it to a device that segments it as a tunnel packet. */
        if (six) {
                const struct ipv6hdr *ip;

                if (!readable(skb, sizeof(struct headers) + sizeof(struct ipv6hdr)))
                        return NEXT;
                ip = (const void *)(long)skb->data + sizeof(struct headers);
                if ((const void *)(ip + 1) > (const void *)(long)skb->data_end)
                        return NEXT;
                if (!(entry->flags & FF_IP6) || ip->version != 6 || !same_ip6(&ip->daddr, entry->ip6))
                        return NEXT;
                flags |= DECAP_L3_IPV6;
        } else {
                const struct iphdr *ip;

                if (!readable(skb, sizeof(struct headers) + sizeof(struct iphdr)))
                        return NEXT;
                ip = (const void *)(long)skb->data + sizeof(struct headers);
                if ((const void *)(ip + 1) > (const void *)(long)skb->data_end)
                        return NEXT;
                if (!(entry->flags & FF_IP4) || ip->version != 4 || ip->daddr != entry->ip4)
                        return NEXT;
        }
        link = entry->ifindex;
        slot = entry->slot;
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

/* At a VXLAN device: packets that the kernel has decapsulated. */
SEC("tc")
int ff_vxlan(struct __sk_buff *skb)
{
        __u32 index = skb->ifindex;
        const struct ff_port *own = bpf_map_lookup_elem(&ports, &index);
        const struct ff_settings *set;
        const struct ethhdr *eth;
        struct ff_fdb_key key;
        struct ff_fdb_entry *entry;
        struct ff_count *count;
        __u64 now;

        if (!own || !readable(skb, ETH_HLEN))
                return NEXT;
        eth = (const void *)(long)skb->data;
        if ((const void *)(eth + 1) > (const void *)(long)skb->data_end)
                return NEXT;
        set = the_settings();
        now = bpf_ktime_get_ns();
        /* Without the plugin, which refreshes the bridge's FDB, the bridge has to see the packets.
         */
        if (!set || now >= set->lease)
                return NEXT;
        key_of(&key, own->net, eth->h_source);
        entry = bpf_map_lookup_elem(&places, &key);
        /* A packet from outside with an address of this host: leave it to the bridge. */
        if (entry && entry->ifindex)
                return NEXT;
        if (!(set->flags & FF_DECAP4)) {
                /* Nothing is learned at the NIC. Note that the address is remote, so that the
                 * bridge's FDB is refreshed for it. */
                if (!(eth->h_source[0] & 1))
                        learn(&key, 0, now);
        } else if (entry && (__s64)(now - entry->seen) > (__s64)set->idle) {
                /* The outer source address is gone here, so the peer is unknown. ff_nic sees all
                 * packets of peers and would have noted a move; so only an entry that it has not
                 * seen for long is deleted. */
                bpf_map_delete_elem(&places, &key);
        }
        if (skb->vlan_present ||
            (eth->h_proto != bpf_htons(ETH_P_IP) && eth->h_proto != bpf_htons(ETH_P_IPV6)))
                return NEXT;
        key_of(&key, own->net, eth->h_dest);
        entry = bpf_map_lookup_elem(&places, &key);
        if (!entry || !entry->ifindex)
                return NEXT;
        index = entry->ifindex;
        count = bpf_map_lookup_elem(&counts, &entry->slot);
        if (count) {
                count->vxlan_packets++;
                count->vxlan_bytes += skb->len;
        }
        bpf_skb_change_type(skb, PACKET_HOST);
        return bpf_redirect_peer(index, 0);
}

/* --- trials, run once on made-up packets: does this kernel change the headers, and set the
 * protocol? */

SEC("tc")
int ff_try_encap(struct __sk_buff *skb)
{
        if (bpf_skb_adjust_room(skb, OVERHEAD, BPF_ADJ_ROOM_MAC, ENCAP_FLAGS))
                return 1;
        return skb->protocol == bpf_htons(ETH_P_IP) ? 0 : 2;
}

SEC("tc")
int ff_try_decap4(struct __sk_buff *skb)
{
        if (bpf_skb_adjust_room(skb, -OVERHEAD, BPF_ADJ_ROOM_MAC, DECAP_FLAGS))
                return 1;
        return skb->protocol == bpf_htons(ETH_P_IP) ? 0 : 2;
}

SEC("tc")
int ff_try_decap6(struct __sk_buff *skb)
{
        if (bpf_skb_adjust_room(skb, -OVERHEAD, BPF_ADJ_ROOM_MAC, DECAP_FLAGS | DECAP_L3_IPV6))
                return 1;
        return skb->protocol == bpf_htons(ETH_P_IPV6) ? 0 : 2;
}

/* No helper used here is for GPL programs only. */
char LICENSE[] SEC("license") = "Apache-2.0";
