/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What an ICMP error quotes: the tuple the packet it is about had, as its sender saw it. */
#ifndef TESSERA_QUOTED_H
#define TESSERA_QUOTED_H

#include "packet.h"
#include "transport.h"

#define QUOTED_EXTENSIONS 4

static __always_inline bool quoted_transport(struct __sk_buff *skb, struct packet *quoted,
					     __u32 at)
{
	struct icmp_head l4;

	switch (quoted->proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		return !bpf_skb_load_bytes(skb, at, &quoted->sport, 2) &&
		       !bpf_skb_load_bytes(skb, at + 2, &quoted->dport, 2);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		if ((quoted->proto == IPPROTO_ICMP) != (quoted->family == 4))
			return false;
		if (bpf_skb_load_bytes(skb, at, &l4, sizeof(l4)))
			return false;
		quoted->kind = quoted->family == 4 ? icmp4_kind(l4.type) : icmp6_kind(l4.type);
		echo_ports(quoted, l4.id);
		return quoted->kind == KIND_ECHO || quoted->kind == KIND_ECHO_REPLY;
	default:
		return true;
	}
}

static __always_inline bool quoted_ipv4(struct __sk_buff *skb, struct packet *quoted, __u32 at)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
		return false;
	if (ip.version != 4 || ip.ihl < 5 || bpf_ntohs(ip.frag_off) & IP_OFFSET_MASK)
		return false;
	quoted->family = 4;
	quoted->saddr = mapped(ip.saddr);
	quoted->daddr = mapped(ip.daddr);
	quoted->proto = ip.protocol;
	return quoted_transport(skb, quoted, at + ip.ihl * 4);
}

static __always_inline bool quoted_ipv6(struct __sk_buff *skb, struct packet *quoted, __u32 at)
{
	struct ipv6hdr ip;
	__u8 next;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 6)
		return false;
	quoted->family = 6;
	__builtin_memcpy(&quoted->saddr, &ip.saddr, sizeof(quoted->saddr));
	__builtin_memcpy(&quoted->daddr, &ip.daddr, sizeof(quoted->daddr));
	if (is_mapped(&quoted->saddr) || is_mapped(&quoted->daddr))
		return false;
	at += sizeof(ip);
	next = ip.nexthdr;
	for (int i = 0; i < QUOTED_EXTENSIONS; i++) {
		__u8 header[4];

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING &&
		    next != IPPROTO_DSTOPTS && next != IPPROTO_FRAGMENT)
			break;
		if (bpf_skb_load_bytes(skb, at, header, sizeof(header)))
			return false;
		if (next == IPPROTO_FRAGMENT && (header[2] || header[3] & ~7))
			return false; /* its ports are in another packet */
		at += next == IPPROTO_FRAGMENT ? 8 : (header[1] + 1) * 8;
		next = header[0];
	}
	quoted->proto = next;
	return quoted_transport(skb, quoted, at);
}

/* False: none to be had. */
__noinline int parse_quoted(struct __sk_buff *skb, const struct packet *pkt,
			    struct packet *quoted)
{
	if (!pkt || !quoted)
		return false;

	__u32 at = pkt->l4_offset + sizeof(struct icmp_head);

	return pkt->family == 4 ? quoted_ipv4(skb, quoted, at) : quoted_ipv6(skb, quoted, at);
}

#endif
