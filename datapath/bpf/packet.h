/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the programs know of a packet, and the headers they read it from. */
#ifndef TESSERA_PACKET_H
#define TESSERA_PACKET_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* Functions that are neither static nor inline are verified once, for any argument, and not once
 * for every state their callers reach them in; hence their checks for NULL. */

#ifndef IPPROTO_SCTP
#define IPPROTO_SCTP 132
#endif
#ifndef IPPROTO_ICMPV6
#define IPPROTO_ICMPV6 58
#endif

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12

#define ICMP6_UNREACHABLE 1
#define ICMP6_PARAMETER_PROBLEM 4 /* the last of the errors */
#define ICMP6_FIRST_INFORMATION 128
#define ICMP6_ECHO 128
#define ICMP6_ECHO_REPLY 129
#define ICMP6_LISTENER_QUERY 130
#define ICMP6_LISTENER_DONE 132
#define ICMP6_ROUTER_SOLICIT 133
#define ICMP6_ROUTER_ADVERT 134
#define ICMP6_SOLICIT 135
#define ICMP6_ADVERT 136
#define ICMP6_REDIRECT 137
#define ICMP6_LISTENER_REPORT_2 143

/* The port of an echo's answering side in its tuple, whatever the family. */
#define ECHO_PORT 8

#define VLAN_ID 0x0fff /* 0: a priority alone, and the device's own packet (IEEE 802.1Q) */

#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET_MASK 0x1fff
#define IP_MIN_HEADER sizeof(struct iphdr)

enum packet_kind {
	KIND_TRACKED = 0,    /* either direction of a flow, told apart by who began it */
	KIND_ECHO = 1,       /* always the forward direction */
	KIND_ECHO_REPLY = 2, /* only ever the reply direction */
	KIND_ICMP_ERROR = 3, /* may belong to the flow it quotes */
	KIND_UNTRACKED = 4,
};

enum fragment_part {
	FRAGMENT_NONE = 0,
	FRAGMENT_FIRST = 1, /* carries the transport header */
	FRAGMENT_LATER = 2, /* what it says of transport is what the first one said */
};

struct packet {
	struct addr saddr;
	struct addr daddr;
	__be16 sport; /* of the connection tuple */
	__be16 dport;
	__be16 policy_port;
	__u8 proto;
	__u8 kind;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 tcp_flags;
	__u8 family;
	__u32 l4_offset;
	__u32 length; /* of the IP packet */
	__u32 fragment_id;
	__u16 fragment_offset; /* bytes */
	__u16 fragment_bytes;
	__u8 fragment; /* enum fragment_part */
	__u8 hops;     /* TTL, hop limit */
	__u8 smac[ETH_ALEN];
};

struct tcp_head {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__u8 doff; /* upper half */
	__u8 flags;
	__be16 window;
	__be16 check;
	__be16 urgent;
};

struct udp_head {
	__be16 sport;
	__be16 dport;
	__be16 length;
	__be16 check;
};

struct icmp_head {
	__u8 type;
	__u8 code;
	__be16 check;
	__be16 id;
	__be16 seq;
};

static __always_inline struct addr mapped(__be32 ipv4)
{
	return (struct addr){ { 0, 0, bpf_htonl(0xffff), ipv4 } };
}

static __always_inline bool is_mapped(const struct addr *addr)
{
	return !addr->w[0] && !addr->w[1] && addr->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_zero(const struct addr *addr)
{
	return !(addr->w[0] | addr->w[1] | addr->w[2] | addr->w[3]);
}

static __always_inline bool is_multicast6(const struct addr *addr)
{
	return *(const __u8 *)addr == 0xff;
}

static __always_inline bool is_link_local6(const struct addr *addr)
{
	return (addr->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* No router passes on what goes there. */
static __always_inline bool is_on_link6(const struct addr *addr)
{
	return is_link_local6(addr) ||
	       (addr->w[0] & bpf_htonl(0xffff0000)) == bpf_htonl(0xff020000);
}

static __always_inline bool same_addr(const struct addr *a, const struct addr *b)
{
	return a->w[3] == b->w[3] && a->w[2] == b->w[2] && a->w[1] == b->w[1] && a->w[0] == b->w[0];
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	__u8 differ = 0;

	/* clang 14 makes a call of memcmp, and there is nobody to answer it. */
	for (int i = 0; i < ETH_ALEN; i++)
		differ |= a[i] ^ b[i];
	return !differ;
}

static __always_inline bool is_of_vlan(const struct __sk_buff *skb)
{
	return skb->vlan_present && skb->vlan_tci & VLAN_ID;
}

/* Discovery of neighbours and routers: about the link, not about a flow. */
static __always_inline bool is_discovery(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_ICMPV6 && pkt->icmp_type >= ICMP6_ROUTER_SOLICIT &&
	       pkt->icmp_type <= ICMP6_REDIRECT;
}

#endif
