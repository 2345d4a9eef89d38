/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Telling who was denied, so that he fails at once instead of waiting: a reset for TCP, for
 * everything else ICMP's "administratively prohibited". The answer takes the denied packet's place
 * and quotes its beginning; it is never larger than the quote and its headers, and nothing is
 * answered that could be answered in turn. */
#ifndef TESSERA_REFUSE_H
#define TESSERA_REFUSE_H

#include "checksum.h"
#include "judge.h"

#define ANSWER_HOPS 64
#define QUOTE4 28 /* header and eight bytes (RFC 792) */
#define QUOTE6 48
#define ICMP_PROHIBITED 13 /* RFC 1812, 5.2.7.1 */
#define ICMP6_PROHIBITED 1 /* RFC 4443, 3.1 */

struct icmp_refusal4 {
	struct icmp_head icmp;
	__u8 quote[QUOTE4];
};

struct icmp_refusal6 {
	struct icmp_head icmp;
	__u8 quote[QUOTE6];
};

static __always_inline bool may_be_answered(const struct packet *pkt)
{
	__be32 to = pkt->daddr.w[3];

	if (pkt->fragment == FRAGMENT_LATER || pkt->kind == KIND_ICMP_ERROR ||
	    pkt->tcp_flags & TCP_RST || is_zero(&pkt->saddr))
		return false;
	if (pkt->family == 4) /* no options, and no answer to what went to many */
		return pkt->l4_offset == ETH_HLEN + IP_MIN_HEADER &&
		       (to & bpf_htonl(0xf0000000)) != bpf_htonl(0xe0000000) && ~to;
	return pkt->l4_offset == ETH_HLEN + sizeof(struct ipv6hdr) && !is_multicast6(&pkt->daddr);
}

static __always_inline int store_ip4(struct __sk_buff *skb, const struct packet *pkt, __u8 proto,
				     __u32 payload)
{
	struct iphdr ip = {};

	ip.version = 4;
	ip.ihl = 5;
	ip.tot_len = bpf_htons(sizeof(ip) + payload);
	ip.frag_off = bpf_htons(0x4000);
	ip.ttl = ANSWER_HOPS;
	ip.protocol = proto;
	ip.saddr = pkt->daddr.w[3];
	ip.daddr = pkt->saddr.w[3];
	ip.check = fold(bpf_csum_diff(0, 0, (__be32 *)&ip, sizeof(ip), 0));
	return bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int store_ip6(struct __sk_buff *skb, const struct packet *pkt, __u8 proto,
				     __u32 payload)
{
	struct ipv6hdr ip = {};

	ip.version = 6;
	ip.payload_len = bpf_htons(payload);
	ip.nexthdr = proto;
	ip.hop_limit = ANSWER_HOPS;
	__builtin_memcpy(&ip.saddr, &pkt->daddr, sizeof(ip.saddr));
	__builtin_memcpy(&ip.daddr, &pkt->saddr, sizeof(ip.daddr));
	return bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int store_ip(struct __sk_buff *skb, const struct packet *pkt, __u8 proto,
				    __u32 payload)
{
	return pkt->family == 4 ? store_ip4(skb, pkt, proto, payload) :
				  store_ip6(skb, pkt, proto, payload);
}

/* RFC 9293, 3.10.7.1. */
__noinline int refuse_tcp(struct __sk_buff *skb, const struct packet *pkt)
{
	struct tcp_head in, out = {};
	__u32 sent;

	if (!pkt || bpf_skb_load_bytes(skb, pkt->l4_offset, &in, sizeof(in)))
		return -1;
	sent = pkt->length - (pkt->l4_offset - ETH_HLEN) - (in.doff >> 4) * 4;
	sent += !!(in.flags & TCP_SYN) + !!(in.flags & TCP_FIN);
	out.sport = in.dport;
	out.dport = in.sport;
	out.doff = sizeof(out) / 4 << 4;
	out.flags = TCP_RST;
	if (in.flags & TCP_ACK) {
		out.seq = in.ack;
	} else {
		out.flags |= TCP_ACK;
		out.ack = bpf_htonl(bpf_ntohl(in.seq) + sent);
	}
	out.check = fold(bpf_csum_diff(0, 0, (__be32 *)&out, sizeof(out),
				       pseudo_header(pkt, IPPROTO_TCP, sizeof(out))));
	if (bpf_skb_change_tail(skb, pkt->l4_offset + sizeof(out), 0))
		return -1;
	return store_ip(skb, pkt, IPPROTO_TCP, sizeof(out)) ||
	       bpf_skb_store_bytes(skb, pkt->l4_offset, &out, sizeof(out),
				   BPF_F_RECOMPUTE_CSUM);
}

__noinline int refuse_icmp4(struct __sk_buff *skb, const struct packet *pkt)
{
	struct icmp_refusal4 out = {};

	if (!pkt || pkt->length < QUOTE4 || bpf_skb_load_bytes(skb, ETH_HLEN, out.quote, QUOTE4))
		return -1;
	out.icmp.type = ICMP_UNREACHABLE;
	out.icmp.code = ICMP_PROHIBITED;
	out.icmp.check = fold(bpf_csum_diff(0, 0, (__be32 *)&out, sizeof(out), 0));
	if (bpf_skb_change_tail(skb, pkt->l4_offset + sizeof(out), 0))
		return -1;
	return store_ip(skb, pkt, IPPROTO_ICMP, sizeof(out)) ||
	       bpf_skb_store_bytes(skb, pkt->l4_offset, &out, sizeof(out),
				   BPF_F_RECOMPUTE_CSUM);
}

__noinline int refuse_icmp6(struct __sk_buff *skb, const struct packet *pkt)
{
	struct icmp_refusal6 out = {};

	if (!pkt || pkt->length < QUOTE6 || bpf_skb_load_bytes(skb, ETH_HLEN, out.quote, QUOTE6))
		return -1;
	out.icmp.type = ICMP6_UNREACHABLE;
	out.icmp.code = ICMP6_PROHIBITED;
	out.icmp.check = fold(bpf_csum_diff(0, 0, (__be32 *)&out, sizeof(out),
					    pseudo_header(pkt, IPPROTO_ICMPV6, sizeof(out))));
	if (bpf_skb_change_tail(skb, pkt->l4_offset + sizeof(out), 0))
		return -1;
	return store_ip(skb, pkt, IPPROTO_ICMPV6, sizeof(out)) ||
	       bpf_skb_store_bytes(skb, pkt->l4_offset, &out, sizeof(out),
				   BPF_F_RECOMPUTE_CSUM);
}

/* Turns a denied packet into its answer, hardware addresses exchanged; 0, or it cannot be. */
__noinline int refuse(struct __sk_buff *skb, const struct pass *pass)
{
	__u8 macs[2 * ETH_ALEN];
	int failed;

	if (!pass || !pass->respond || !may_be_answered(&pass->pkt) ||
	    bpf_skb_load_bytes(skb, ETH_ALEN, macs, ETH_ALEN) ||
	    bpf_skb_load_bytes(skb, 0, macs + ETH_ALEN, ETH_ALEN))
		return -1;
	if (pass->pkt.proto == IPPROTO_TCP)
		failed = refuse_tcp(skb, &pass->pkt);
	else if (pass->pkt.family == 4)
		failed = refuse_icmp4(skb, &pass->pkt);
	else
		failed = refuse_icmp6(skb, &pass->pkt);
	return failed || bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
}

#endif
