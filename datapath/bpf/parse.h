/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From bytes to a tuple. Nothing past the IP total length is ever read as a header. */
#ifndef TESSERA_PARSE_H
#define TESSERA_PARSE_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* A function here that is neither static nor inline is verified once, for any argument, and not once
 * for every state its callers reach it in; hence its checks for NULL. */

#ifndef IPPROTO_SCTP
#define IPPROTO_SCTP 132
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

struct packet {
	__be32 saddr;
	__be32 daddr;
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
	__u8 smac[ETH_ALEN];
	__u8 pad[2];
};

struct l2l3 {
	struct ethhdr eth;
	struct iphdr ip;
} __attribute__((packed));

struct tcp_head {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__u8 doff; /* upper half */
	__u8 flags;
	__be16 window;
	__be32 check_urgent;
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

#define SCTP_COMMON_HEADER 12

static __always_inline int parse_tcp(struct __sk_buff *skb, struct packet *pkt, __u32 room)
{
	struct tcp_head tcp;

	if (room < sizeof(tcp) || bpf_skb_load_bytes(skb, pkt->l4_offset, &tcp, sizeof(tcp)))
		return DROP_CT_INVALID_HEADER;
	__u32 size = (tcp.doff >> 4) * 4;

	if (size < sizeof(tcp) || size > room)
		return DROP_CT_INVALID_HEADER;
	pkt->sport = tcp.sport;
	pkt->dport = tcp.dport;
	pkt->policy_port = tcp.dport;
	pkt->tcp_flags = tcp.flags;
	return 0;
}

static __always_inline int parse_udp(struct __sk_buff *skb, struct packet *pkt, __u32 room,
				     bool fragment)
{
	struct udp_head udp;

	if (room < sizeof(udp) || bpf_skb_load_bytes(skb, pkt->l4_offset, &udp, sizeof(udp)))
		return DROP_CT_INVALID_HEADER;
	__u32 length = bpf_ntohs(udp.length);

	/* A first fragment announces more than it carries. */
	if (length < sizeof(udp) || (length > room && !fragment))
		return DROP_CT_INVALID_HEADER;
	pkt->sport = udp.sport;
	pkt->dport = udp.dport;
	pkt->policy_port = udp.dport;
	return 0;
}

static __always_inline int parse_sctp(struct __sk_buff *skb, struct packet *pkt, __u32 room)
{
	__be16 ports[2];

	if (room < SCTP_COMMON_HEADER || bpf_skb_load_bytes(skb, pkt->l4_offset, ports, sizeof(ports)))
		return DROP_CT_INVALID_HEADER;
	pkt->sport = ports[0];
	pkt->dport = ports[1];
	pkt->policy_port = ports[1];
	return 0;
}

static __always_inline int parse_icmp(struct __sk_buff *skb, struct packet *pkt, __u32 room)
{
	struct icmp_head icmp;

	if (room < sizeof(icmp) || bpf_skb_load_bytes(skb, pkt->l4_offset, &icmp, sizeof(icmp)))
		return DROP_CT_INVALID_HEADER;
	pkt->icmp_type = icmp.type;
	pkt->icmp_code = icmp.code;
	pkt->policy_port = bpf_htons(icmp.type);
	switch (icmp.type) {
	case ICMP_ECHO:
		pkt->kind = KIND_ECHO;
		pkt->sport = icmp.id;
		pkt->dport = bpf_htons(ICMP_ECHO);
		break;
	case ICMP_ECHO_REPLY:
		pkt->kind = KIND_ECHO_REPLY;
		pkt->sport = bpf_htons(ICMP_ECHO);
		pkt->dport = icmp.id;
		break;
	case ICMP_UNREACHABLE:
	case ICMP_TIME_EXCEEDED:
	case ICMP_PARAMETER_PROBLEM:
		pkt->kind = KIND_ICMP_ERROR;
		break;
	default:
		pkt->kind = KIND_UNTRACKED;
	}
	return 0;
}

static __always_inline int parse_l4(struct __sk_buff *skb, struct packet *pkt, __u32 room,
				    bool fragment)
{
	switch (pkt->proto) {
	case IPPROTO_TCP:
		return parse_tcp(skb, pkt, room);
	case IPPROTO_UDP:
		return parse_udp(skb, pkt, room, fragment);
	case IPPROTO_ICMP:
		return parse_icmp(skb, pkt, room);
	case IPPROTO_SCTP:
		return parse_sctp(skb, pkt, room);
	default:
		return 0; /* judged and tracked by addresses and protocol alone */
	}
}

/* 0 or a drop reason; what was learned before a refusal stays in `pkt`, for the event. */
__noinline int parse_ipv4(struct __sk_buff *skb, struct packet *pkt)
{
	struct l2l3 head;

	if (!pkt)
		return DROP_INVALID_PACKET;
	if (bpf_skb_load_bytes(skb, 0, &head, sizeof(head)))
		return DROP_INVALID_PACKET;
	pkt->family = 4;
	pkt->saddr = head.ip.saddr;
	pkt->daddr = head.ip.daddr;
	pkt->proto = head.ip.protocol;
	__builtin_memcpy(pkt->smac, head.eth.h_source, ETH_ALEN);

	__u32 present = skb->len - ETH_HLEN;
	__u32 total = bpf_ntohs(head.ip.tot_len);
	__u32 header = head.ip.ihl * 4;

	if (!total && skb->gso_size)
		total = present; /* a batch longer than the field can say (BIG TCP) */
	pkt->length = total;
	if (head.ip.version != 4 || header < IP_MIN_HEADER || total < header || total > present)
		return DROP_INVALID_PACKET;

	__u16 frag = bpf_ntohs(head.ip.frag_off);

	if (frag & IP_OFFSET_MASK)
		return DROP_FRAGMENT; /* its ports are in another packet */
	pkt->l4_offset = ETH_HLEN + header;
	return parse_l4(skb, pkt, total - header, frag & IP_MORE_FRAGMENTS);
}

/* The tuple a packet quoted by an ICMP error had, as its sender saw it; false: none to be had. */
static __always_inline bool parse_quoted(struct __sk_buff *skb, const struct packet *pkt,
					 struct packet *quoted)
{
	__u32 offset = pkt->l4_offset + sizeof(struct icmp_head);
	struct iphdr ip;
	struct icmp_head l4;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return false;
	if (ip.version != 4 || ip.ihl < 5 || bpf_ntohs(ip.frag_off) & IP_OFFSET_MASK)
		return false;
	quoted->saddr = ip.saddr;
	quoted->daddr = ip.daddr;
	quoted->proto = ip.protocol;
	offset += ip.ihl * 4;
	switch (ip.protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		return !bpf_skb_load_bytes(skb, offset, &quoted->sport, 2) &&
		       !bpf_skb_load_bytes(skb, offset + 2, &quoted->dport, 2);
	case IPPROTO_ICMP:
		if (bpf_skb_load_bytes(skb, offset, &l4, sizeof(l4)))
			return false;
		if (l4.type != ICMP_ECHO && l4.type != ICMP_ECHO_REPLY)
			return false;
		quoted->sport = l4.type == ICMP_ECHO ? l4.id : bpf_htons(ICMP_ECHO);
		quoted->dport = l4.type == ICMP_ECHO ? bpf_htons(ICMP_ECHO) : l4.id;
		return true;
	default:
		return true;
	}
}

#endif
