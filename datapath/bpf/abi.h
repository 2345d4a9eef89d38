/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What user space and the programs agree on: map keys and values, event records, verdicts.
 * datapath/maps/layout.py is its twin; tests/kernel compares both through BTF.
 * Addresses and ports are in network byte order, everything else in host order.
 * A change of any map's rows needs a new MAPS_DIR and a step in datapath/migrate.py.
 * No implicit padding anywhere: a padding byte is named, and zero. */
#ifndef TESSERA_ABI_H
#define TESSERA_ABI_H

enum verdict {
	VERDICT_NONE = 0,     /* no answer: default deny (in a peer row: ask the port rows, then deny) */
	VERDICT_ALLOW = 1,
	VERDICT_DENY = 2,     /* an explicit deny clause */
	VERDICT_REDIRECT = 3, /* to the proxy port of the row */
};

enum direction { DIR_INGRESS = 1, DIR_EGRESS = 2 };

/* An IPv6 address, or an IPv4 one mapped into it (::ffff:a.b.c.d); on the wire those are refused. */
struct addr {
	__be32 w[4];
};

enum endpoint_flags {
	EP_READY = 1 << 0,   /* policy realised; before that every packet is dropped with reason 203 */
	EP_AUDIT = 1 << 1,   /* what policy denies is reported and passes */
	EP_RESPOND = 1 << 2, /* who is denied is told: TCP RST, else ICMP administratively prohibited */
};

/* Of peer rows; of port rows all but the first two. */
enum peer_flags {
	PEER_HAS_PORTS = 1 << 0,
	PEER_HAS_RANGES = 1 << 1,
	PEER_AUDIT = 1 << 2,   /* as EP_AUDIT, for what this row denies */
	PEER_STAGED = 1 << 3,  /* the staged answer differs from the enforced one */
	PEER_RESPOND = 1 << 4, /* as EP_RESPOND */
};

/* Slot 0 is "open": no lookup, everything passes. */
#define SLOT_OPEN 0

/* Rule ids below 16 name no clause. */
enum reserved_rule {
	RULE_NONE = 0,
	RULE_OPEN = 1,            /* no policy selects the endpoint in this direction */
	RULE_DEFAULT_DENY = 2,
	RULE_ALLOW_LOCALHOST = 3,
	RULE_DEFAULT_ALLOW = 4,   /* policies select it, but all with default-deny off */
	RULE_CONTROL_CHANNEL = 5, /* a row of `control` */
	RULE_FIRST_CLAUSE = 16,
};

/* The field of skb->mark in which from_endpoint notes what it hands to the stack; the other bits are
 * other users'. The kernel clears marks on the way out of a namespace, and so does from_endpoint. */
#define MARK_FIELD 0x00000f00
#define MARK_FROM_ENDPOINT 0x00000100
#define MARK_REFUSAL 0x00000200 /* to_endpoint's answer for a denied packet, on its way back */

/* endpoints: hash, key = ifindex of the host side (u32). The node itself has the number of its
 * loopback, which no other endpoint can have; without that row nothing of the node's is judged. */
#define HOST_IFINDEX 1
struct endpoint {
	__u32 id;
	__u32 identity;
	__u32 slot_in;
	__u32 slot_out;
	__u32 flags;
	__be32 ipv4;
	__u8 mac[6];      /* of the interface inside the namespace */
	__u8 host_mac[6]; /* of the host side */
	struct addr ipv6; /* zero: it has none */
};

/* local4, local6: hash, key = address (be32, struct addr); delivery without the host stack */
struct local_endpoint {
	__u32 ifindex;
};

/* ipcache4: hash, key = IPv4 address (be32). ipcache4_prefix: LPM trie, key = struct prefix4 */
struct prefix4 {
	__u32 prefixlen;
	__be32 addr;
};
/* ipcache6, ipcache6_prefix: the same with struct addr and struct prefix6 */
struct prefix6 {
	__u32 prefixlen;
	struct addr addr;
};
struct ipcache_entry {
	__u32 identity;
	__be32 tunnel; /* node to encapsulate to; 0 = local or natively routed */
};

/* nodes: hash, key = the address a node of this or another cluster sends its tunnels from (be32) */
struct node {
	__u32 identity; /* of the node itself: remote-node or kube-apiserver */
};

/* policy_slot: array, key = slot. The revision a cached verdict must carry to be believed. */
struct policy_slot {
	__u32 revision;
};

/* policy_peer: hash, not preallocated. identity 0 is the row of everyone without a row of their own;
 * it exists for every slot in use. */
struct policy_peer_key {
	__u32 slot;
	__u32 identity;
};
struct policy_peer {
	__u32 class_id;
	__u32 rule_id;     /* of `verdict` */
	__be16 proxy_port;
	__u8 verdict;      /* the answer when no port row matches */
	__u8 flags;        /* enum peer_flags */
	__u32 staged_rule_id;
	__u8 staged;       /* enum verdict; counts with PEER_STAGED */
	__u8 pad[3];
};

/* policy_port: hash. ICMP: dport = type. */
struct policy_port_key {
	__u32 class_id;
	__be16 dport;
	__u8 proto;
	__u8 pad;
};
/* policy_range: LPM trie; prefixlen = 40 + leading port bits (0 = every port of the protocol) */
struct policy_range_key {
	__u32 prefixlen;
	__u32 class_id;
	__u8 proto;
	__u8 dport[2]; /* network order, unaligned in the trie */
	__u8 pad;
};
struct policy_answer {
	__u32 rule_id;
	__be16 proxy_port;
	__u8 verdict;
	__u8 flags;
	__u32 staged_rule_id;
	__u8 staged;
	__u8 pad[3];
};

/* control: hash. What the host firewall never stops, so that nobody locks himself out: packets to
 * `port` of the node (DIR_INGRESS) or of a peer (DIR_EGRESS), and those that come from there.
 * The value is a rule id. */
struct control_key {
	struct addr peer; /* zero: any */
	__be16 port;
	__u8 proto;
	__u8 direction;   /* enum direction */
};

/* ct: LRU hash. The two ends stand in an order both directions agree on, so that one lookup serves
 * both. ICMP echo: the asker's port is the id, the other's is 8, so that asking back is another
 * flow and never passes as a reply. */
struct ct_key {
	struct addr addr[2];
	__be16 port[2];
	__u8 proto;
	__u8 pad[3];
};
enum ct_flags {
	CT_INITIATOR_1 = 1 << 0, /* the initiator is addr[1] */
	CT_REPLY_SEEN = 1 << 1,
	CT_FIN_FWD = 1 << 2,
	CT_FIN_REV = 1 << 3,
	CT_RST = 1 << 4,
	CT_SYN_ONLY = 1 << 5,    /* TCP without a completed handshake */
	CT_VIA_STACK = 1 << 6,   /* began on this node and came through the stack: so go its replies */
};
/* What one side (the egress judge at the source, the ingress judge at the destination) said. Only
 * VERDICT_ALLOW is ever stored; VERDICT_NONE: this side was not judged on this node. */
struct ct_side {
	__u32 slot;
	__u32 revision;
	__u32 rule_id;
	__be16 proxy_port;
	__u8 verdict;
	__u8 audited; /* passes by EP_AUDIT alone */
};
struct ct_entry {
	__u64 last_seen;        /* coarse ktime ns */
	__u64 packets[2];       /* 0 forward, 1 reply */
	__u64 bytes[2];
	__u32 flags;
	__u32 src_identity;
	__u32 dst_identity;
	__be32 tunnel;          /* node it came from encapsulated, replies go there; 0: none */
	struct ct_side side[2]; /* 0 ingress judge, 1 egress judge */
};

/* fragments: LRU hash; what the first fragment said of the ones after it */
struct fragment_key {
	struct addr saddr;
	struct addr daddr;
	__u32 id;
	__u8 proto; /* IPv4, where it belongs to the datagram's name; else 0 */
	__u8 pad[3];
};
struct fragment {
	__u64 seen; /* coarse ktime ns */
	__be16 sport;
	__be16 dport;
	__be16 policy_port;
	__u16 bytes; /* the first fragment's share of the datagram: later ones start behind it */
	__u8 proto;
	__u8 kind;
	__u8 icmp_type;
	__u8 icmp_code;
	__u32 pad;
};

/* nat: LRU hash, two rows per masqueraded flow: what leaves, and what comes back. `local` is the
 * endpoint's (NAT_OUT) or the node's (NAT_IN). ICMP echo: the port is the id, remote_port 0. */
enum nat_direction { NAT_OUT = 0, NAT_IN = 1 };
struct nat_key {
	__be32 local;
	__be32 remote;
	__be16 port;
	__be16 remote_port;
	__u8 proto;
	__u8 direction; /* enum nat_direction */
	__u8 pad[2];
};
struct nat_entry {
	__be32 addr; /* instead of `local` */
	__be16 port; /* instead of `port` */
	__u8 pad[2];
};
/* masquerade_exclude4: LPM trie, key = struct prefix4 of destinations, value any u32 */

/* events: ring buffer, one fixed record */
enum event_type {
	EVENT_DROP = 1,
	EVENT_TRACE = 4,
	EVENT_VERDICT = 5,
};
/* hubble's policy_match_type */
enum match_type {
	MATCH_NONE = 0, MATCH_L3 = 1, MATCH_L3_L4 = 2, MATCH_L4 = 3, MATCH_ALL = 4, MATCH_L3_PROTO = 5, MATCH_PROTO = 6,
};
/* Where a packet was seen: hubble's trace observation points. */
enum trace_point {
	TRACE_TO_ENDPOINT = 0,
	TRACE_TO_HOST = 2,
	TRACE_TO_STACK = 3,
	TRACE_TO_OVERLAY = 4,
	TRACE_TO_NETWORK = 11,
};
enum event_flags {
	EVENT_REPLY = 1 << 0,  /* the packet goes against the direction its flow began in */
	EVENT_AUDIT = 1 << 1,  /* denied and let through */
	EVENT_STAGED = 1 << 2, /* staged and staged_rule_id count */
};
struct event {
	__u64 time_ns;     /* ktime (CLOCK_MONOTONIC) */
	__u32 endpoint;    /* id of the endpoint that judged */
	__u32 src_identity;
	__u32 dst_identity;
	__u32 rule_id;
	__u32 staged_rule_id;
	__u32 length;
	__be16 sport;
	__be16 dport;      /* ICMP: sport = type, dport = code */
	__u8 saddr[16];    /* as struct addr */
	__u8 daddr[16];
	__u8 type;         /* enum event_type */
	__u8 reason;       /* EVENT_DROP: hubble's drop code; else 0 */
	__u8 verdict;      /* enum verdict */
	__u8 direction;    /* enum direction */
	__u8 proto;
	__u8 tcp_flags;
	__u8 family;       /* 4 or 6 */
	__u8 match;        /* enum match_type */
	__u8 flags;        /* enum event_flags */
	__u8 staged;       /* enum verdict */
	__u8 point;        /* EVENT_TRACE: enum trace_point */
	__u8 pad;
};

/* metrics: per-CPU array, key = reason (0 forwarded) * 2 + (direction - 1); lost events at METRIC_LOST */
struct metric {
	__u64 packets;
	__u64 bytes;
};
#define METRIC_LOST 510
#define METRIC_MAX 512

/* config: array of one */
enum config_flags {
	CONFIG_TRACE = 1 << 0,      /* report connections that pass, too, not only judgements */
	CONFIG_MASQUERADE = 1 << 1, /* endpoints' packets leave for the world under node_ipv4 */
};
struct config {
	__u32 flags;
	__be32 node_ipv4;
	__u32 overlay_ifindex; /* the VXLAN device in collect-metadata mode; 0: natively routed */
	__be16 tunnel_port;    /* UDP; closed to endpoints and to senders who are no nodes. 0: none */
	__u16 nat_first;       /* the ports masqueraded flows get when their own is taken */
	__u16 nat_last;
	__u16 pad;
};

/* drop reasons, numbered as hubble numbers them */
enum drop_reason {
	DROP_INVALID_SRC_MAC = 130,
	DROP_INVALID_SRC_IP = 132,
	DROP_POLICY_DENIED = 133,       /* default deny */
	DROP_INVALID_PACKET = 134,
	DROP_CT_INVALID_HEADER = 135,
	DROP_CT_UNKNOWN_PROTO = 137,    /* ICMP of the other family */
	DROP_NO_TUNNEL_KEY = 147,
	DROP_NO_LOCAL_ENDPOINT = 152,
	DROP_CT_INSERT_FAILED = 155,
	DROP_EXTENSION_HEADER = 156,
	DROP_FRAGMENT = 157,            /* overlaps the first one */
	DROP_NO_TUNNEL_ENDPOINT = 160,
	DROP_NO_CONFIG = 165,
	DROP_UNSUPPORTED_L2 = 166,
	DROP_NAT_NO_MAPPING = 167,      /* every port tried is taken */
	DROP_NAT_UNSUPPORTED_PROTO = 168,
	DROP_ENCAP_PROHIBITED = 170,    /* an endpoint speaks to the tunnel port */
	DROP_UNKNOWN_SENDER = 172,      /* tunnelled by somebody who is no node */
	DROP_NO_FIRST_FRAGMENT = 175,
	DROP_FORBIDDEN_ICMP6 = 176,
	DROP_POLICY_DENY = 181,         /* an explicit deny clause */
	DROP_INVALID_VNI = 183,
	DROP_EP_NOT_READY = 203,
	DROP_PROXY_PUNT = 205,
};

#endif
