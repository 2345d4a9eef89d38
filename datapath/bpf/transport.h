/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Transport headers. Nothing past the IP packet's own length is ever read as one. */
#ifndef TESSERA_TRANSPORT_H
#define TESSERA_TRANSPORT_H

#include "packet.h"

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

static __always_inline int parse_udp(struct __sk_buff *skb, struct packet *pkt, __u32 room)
{
	struct udp_head udp;

	if (room < sizeof(udp) || bpf_skb_load_bytes(skb, pkt->l4_offset, &udp, sizeof(udp)))
		return DROP_CT_INVALID_HEADER;
	__u32 length = bpf_ntohs(udp.length);

	/* A first fragment announces more than it carries. */
	if (length < sizeof(udp) || (length > room && !pkt->fragment))
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

static __always_inline __u8 icmp4_kind(__u8 type)
{
	switch (type) {
	case ICMP_ECHO:
		return KIND_ECHO;
	case ICMP_ECHO_REPLY:
		return KIND_ECHO_REPLY;
	case ICMP_UNREACHABLE:
	case ICMP_TIME_EXCEEDED:
	case ICMP_PARAMETER_PROBLEM:
		return KIND_ICMP_ERROR;
	default:
		return KIND_UNTRACKED;
	}
}

static __always_inline __u8 icmp6_kind(__u8 type)
{
	switch (type) {
	case ICMP6_ECHO:
		return KIND_ECHO;
	case ICMP6_ECHO_REPLY:
		return KIND_ECHO_REPLY;
	default:
		return type >= ICMP6_UNREACHABLE && type <= ICMP6_PARAMETER_PROBLEM ? KIND_ICMP_ERROR :
										      KIND_UNTRACKED;
	}
}

static __always_inline void echo_ports(struct packet *pkt, __be16 id)
{
	if (pkt->kind == KIND_ECHO) {
		pkt->sport = id;
		pkt->dport = bpf_htons(ECHO_PORT);
	} else if (pkt->kind == KIND_ECHO_REPLY) {
		pkt->sport = bpf_htons(ECHO_PORT);
		pkt->dport = id;
	}
}

static __always_inline int parse_icmp(struct __sk_buff *skb, struct packet *pkt, __u32 room)
{
	struct icmp_head icmp;

	if ((pkt->proto == IPPROTO_ICMP) != (pkt->family == 4))
		return DROP_CT_UNKNOWN_PROTO;
	if (room < sizeof(icmp) || bpf_skb_load_bytes(skb, pkt->l4_offset, &icmp, sizeof(icmp)))
		return DROP_CT_INVALID_HEADER;
	pkt->icmp_type = icmp.type;
	pkt->icmp_code = icmp.code;
	pkt->policy_port = bpf_htons(icmp.type);
	pkt->kind = pkt->family == 4 ? icmp4_kind(icmp.type) : icmp6_kind(icmp.type);
	echo_ports(pkt, icmp.id);
	return 0;
}

/* `room`: bytes from l4_offset to the end of the IP packet. 0 or a drop reason. */
static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *pkt, __u32 room)
{
	switch (pkt->proto) {
	case IPPROTO_TCP:
		return parse_tcp(skb, pkt, room);
	case IPPROTO_UDP:
		return parse_udp(skb, pkt, room);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return parse_icmp(skb, pkt, room);
	case IPPROTO_SCTP:
		return parse_sctp(skb, pkt, room);
	default:
		return 0; /* judged and tracked by addresses and protocol alone */
	}
}

#endif
