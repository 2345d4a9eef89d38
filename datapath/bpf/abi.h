/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What user space and the programs agree on: map keys and values, event records, verdicts.
 * datapath/maps/layout.py is its twin; tests/kernel compares both through BTF.
 * Addresses and ports are in network byte order, everything else in host order.
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

enum endpoint_flags {
	EP_READY = 1 << 0, /* policy realised; before that every packet is dropped with reason 203 */
};

enum peer_flags {
	PEER_HAS_PORTS = 1 << 0,
	PEER_HAS_RANGES = 1 << 1,
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
	RULE_FIRST_CLAUSE = 16,
};

/* The field of skb->mark in which from_endpoint notes what it hands to the stack; the other bits are
 * other users'. The kernel clears marks on the way out of a namespace, and so does from_endpoint. */
#define MARK_FIELD 0x00000f00
#define MARK_FROM_ENDPOINT 0x00000100

/* endpoints: hash, key = ifindex of the host side (u32) */
struct endpoint {
	__u32 id;
	__u32 identity;
	__u32 slot_in;
	__u32 slot_out;
	__u32 flags;
	__be32 ipv4;
	__u8 mac[6];      /* of the interface inside the namespace */
	__u8 host_mac[6]; /* of the host side */
};

/* local4: hash, key = IPv4 address (be32); delivery without the host stack */
struct local_endpoint {
	__u32 ifindex;
};

/* ipcache4: hash, key = IPv4 address (be32). ipcache4_prefix: LPM trie, key = struct prefix4 */
struct prefix4 {
	__u32 prefixlen;
	__be32 addr;
};
struct ipcache_entry {
	__u32 identity;
	__be32 tunnel; /* node to encapsulate to; 0 = local or natively routed */
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
	__u8 pad;
};

/* ct4: LRU hash. The tuple is ordered (addr, port) ascending in host order, so that one lookup
 * serves both directions. ICMP echo: the asker's port is the id, the other's is 8, so that asking
 * back is another flow and never passes as a reply. */
struct ct4_key {
	__be32 addr[2];
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
	__u8 pad;
};
struct ct_entry {
	__u64 last_seen;        /* coarse ktime ns */
	__u64 packets[2];       /* 0 forward, 1 reply */
	__u64 bytes[2];
	__u32 flags;
	__u32 src_identity;
	__u32 dst_identity;
	__u32 pad;
	struct ct_side side[2]; /* 0 ingress judge, 1 egress judge */
};

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
struct event {
	__u64 time_ns;     /* ktime (CLOCK_MONOTONIC) */
	__u32 endpoint;    /* id of the endpoint that judged */
	__u32 src_identity;
	__u32 dst_identity;
	__u32 rule_id;
	__u32 length;
	__be16 sport;
	__be16 dport;      /* ICMP: sport = type, dport = code */
	__u8 saddr[16];    /* IPv4: first four bytes, rest zero */
	__u8 daddr[16];
	__u8 type;         /* enum event_type */
	__u8 reason;       /* EVENT_DROP: hubble's drop code; else 0 */
	__u8 verdict;      /* enum verdict */
	__u8 direction;    /* enum direction */
	__u8 proto;
	__u8 tcp_flags;
	__u8 family;       /* 4 or 6 */
	__u8 match;        /* enum match_type */
};

/* metrics: per-CPU array, key = reason (0 forwarded) * 2 + (direction - 1); lost events at METRIC_LOST */
struct metric {
	__u64 packets;
	__u64 bytes;
};
#define METRIC_LOST 510
#define METRIC_MAX 512

/* config: array of one */
struct config {
	__u32 host_ifindex;  /* 0: none */
	__u32 flags;
	__be32 node_ipv4;
	__u32 pad;
};

/* drop reasons, numbered as hubble numbers them */
enum drop_reason {
	DROP_INVALID_SRC_MAC = 130,
	DROP_INVALID_SRC_IP = 132,
	DROP_POLICY_DENIED = 133,       /* default deny */
	DROP_INVALID_PACKET = 134,
	DROP_CT_INVALID_HEADER = 135,
	DROP_CT_UNKNOWN_PROTO = 137,
	DROP_UNSUPPORTED_L3 = 139,
	DROP_CT_INSERT_FAILED = 155,
	DROP_FRAGMENT = 157,
	DROP_NO_CONFIG = 165,
	DROP_UNSUPPORTED_L2 = 166,
	DROP_POLICY_DENY = 181,         /* an explicit deny clause */
	DROP_EP_NOT_READY = 203,
	DROP_PROXY_PUNT = 205,
};

#endif
