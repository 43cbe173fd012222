/* What the programs in the kernel and `layout.py` share: keys and values of the maps.
 *
 * FF_LAYOUT changes with any of them: maps of another layout are never opened, they go with the programs that
 * use them. Addresses and ports are in network order, as on the wire; all else is the host's. Times are
 * CLOCK_MONOTONIC, in nanoseconds. A network is named by the index of its bridge, which is the kernel's and
 * isn't used twice.
 */
#ifndef FREEFLOW_OVERLAY_H
#define FREEFLOW_OVERLAY_H

#include <linux/types.h>

#define FF_LAYOUT 1

/* What the settings allow: each was tried on the running kernel first. */
#define FF_PUSH4 1 /* packets to other hosts get their header here */
#define FF_PUSH6 2 /* the same for IPv6 inside */
#define FF_POP4 4  /* packets of other hosts lose their header at the NIC */
#define FF_POP6 8

/* The one element of `settings`. All zero: nothing leaves the ordinary path but what stays on the host. */
struct ff_settings {
        __u64 lease;   /* until when headers are put on and taken off: what was looked at then may be untrue
                          later */
        __u64 idle;    /* an address that wasn't heard for so long is looked for the ordinary way */
        __u32 inside;  /* our pair: the end in the overlay namespace, and */
        __u32 outside; /* the one in the host's */
        __u32 flags;
        __u16 port_low; /* UDP source ports, as the host's kernel chooses them */
        __u16 port_high;
        __u8 ttl;
        __u8 zero[7];
};

/* `ports`, by the index of a link in the overlay namespace. */
#define FF_IP4 1   /* a container's link, with this IPv4 address */
#define FF_IP6 2   /* with this IPv6 address */
#define FF_VXLAN 4 /* a VXLAN device */
#define FF_ENDS 8  /* in `places`: what is addressed to the container ends in it */

struct ff_port {
        __u32 net;
        __be32 vni; /* as in the header: eight bits further left */
        __be32 ip4;
        __be16 udp_port;
        __u16 flags;
        __u8 ip6[16];
        __u8 mac[6];
        __u16 zero;
        __u32 slot; /* of `counts`; 0 for a VXLAN device */
};

/* `places`: where a MAC address is. */
struct ff_place_key {
        __u32 net;
        __u8 mac[6];
        __u16 zero;
};

struct ff_place {
        __u64 seen;    /* elsewhere: when the NIC heard it last */
        __u32 ifindex; /* here: its link in the overlay namespace. 0: elsewhere, */
        __be32 peer;   /* at this host */
        __be32 ip4;    /* here: its addresses */
        __u32 flags;
        __u8 ip6[16];
        __u32 slot; /* here: of `counts` */
        __u32 zero;
};

/* `networks`: what a VXLAN header means; the value is the network. */
struct ff_network_key {
        __be32 vni;
        __be16 udp_port;
        __u16 zero;
};

/* `peers`: who may send to a network and is sent to. */
struct ff_peer_key {
        __u32 net;
        __be32 address;
};

struct ff_peer {
        __u32 ifindex; /* of the device that leads to it */
        __be32 source; /* our address on the way */
        __u32 mtu;     /* the largest packet on the way */
        __be32 next;   /* who takes it there: a router, or the peer itself. 0: the host's routes say */
};

/* `counts`, by slot; one per CPU. What is received so the link's own counters miss. */
#define FF_SLOTS 2048

struct ff_count {
        __u64 local_packets, local_bytes; /* received from this host */
        __u64 nic_packets, nic_bytes;     /* received from others, at the NIC */
        __u64 vxlan_packets, vxlan_bytes; /* the same, at the VXLAN device */
        __u64 sent_packets, sent_bytes;   /* sent to others */
};

#endif
