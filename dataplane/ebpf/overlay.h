/* Keys and values of the maps, which the programs in the kernel and `map_layout.py` share.
 *
 * FF_LAYOUT changes with any of them. Maps of another layout are never opened; they disappear with
 * the programs that use them. Addresses and ports are in network byte order, everything else is in
 * the host's. Times are CLOCK_MONOTONIC, in nanoseconds. A network is named by the ifindex of its
 * bridge, which the kernel does not use again.
 */
#ifndef FREEFLOW_OVERLAY_H
#define FREEFLOW_OVERLAY_H

#include <linux/types.h>

#define FF_LAYOUT 1

/* What the settings allow. Each was tried on the running kernel first. */
#define FF_ENCAP4 1 /* encapsulate packets to other hosts */
#define FF_ENCAP6 2 /* with IPv6 inside */
#define FF_DECAP4 4 /* decapsulate packets of other hosts at the NIC */
#define FF_DECAP6 8

/* The one element of `settings`. All zero: the fast path is only for packets within the host. */
struct ff_settings {
        __u64 lease;   /* encapsulate and decapsulate until then; each check of the host renews it */
        __u64 idle;    /* an address not seen for so long is left to the kernel path */
        __u32 inside;  /* ifindex of our veth pair's end in the overlay namespace */
        __u32 outside; /* ifindex of its end in the host's namespace */
        __u32 flags;
        __u16 port_low; /* UDP source ports, as the host's kernel chooses them */
        __u16 port_high;
        __u8 ttl;
        __u8 zero[7];
};

/* `ports`: links in the overlay namespace, by ifindex. */
#define FF_IP4 1   /* a container's link, with this IPv4 address */
#define FF_IP6 2   /* with this IPv6 address */
#define FF_VXLAN 4 /* a VXLAN device */
#define FF_FINAL 8 /* in `places`: the container is the final destination, it forwards nothing */

struct ff_port {
        __u32 net;
        __be32 vni; /* as in the VXLAN header: shifted left by eight bits */
        __be32 ip4;
        __be16 udp_port;
        __u16 flags;
        __u8 ip6[16];
        __u8 mac[6];
        __u16 zero;
        __u32 slot; /* of `counts`; 0 for a VXLAN device */
};

/* `places`: where a MAC address is; the fast path's FDB. The map keeps this name: it is pinned, and
 * programs of an earlier version share it until the layout changes. */
struct ff_fdb_key {
        __u32 net;
        __u8 mac[6];
        __u16 zero;
};

struct ff_fdb_entry {
        __u64 seen;    /* remote: when a packet from it came to the NIC last */
        __u32 ifindex; /* local: its link in the overlay namespace; 0: remote */
        __be32 peer;   /* remote: its host */
        __be32 ip4;    /* local: its addresses */
        __u32 flags;
        __u8 ip6[16];
        __u32 slot; /* local: of `counts` */
        __u32 zero;
};

/* `networks`: VNI and UDP port to network. */
struct ff_network_key {
        __be32 vni;
        __be16 udp_port;
        __u16 zero;
};

/* `peers`: the hosts that share a network with this one. */
struct ff_peer_key {
        __u32 net;
        __be32 address;
};

struct ff_peer {
        __u32 ifindex; /* of the device of the route to it */
        __be32 source; /* our address on that route */
        __u32 mtu;     /* path MTU */
        __be32 next;   /* next hop: a router, or the peer itself; 0: look the route up */
};

/* `counts`, by slot, per CPU. The link's own counters miss packets that are received by a redirect.
 */
#define FF_SLOTS 2048

struct ff_count {
        __u64 local_packets, local_bytes; /* received from this host */
        __u64 nic_packets, nic_bytes;     /* received from other hosts, at the NIC */
        __u64 vxlan_packets, vxlan_bytes; /* received from other hosts, at the VXLAN device */
        __u64 sent_packets, sent_bytes;   /* sent to other hosts */
};

#endif
