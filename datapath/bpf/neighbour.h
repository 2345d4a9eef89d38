/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* IPv6 neighbour and router discovery at an endpoint. Its only neighbour is the gateway; links.py
 * makes that neighbour permanent at both ends, so nothing that is said here moves anybody's packets.
 * Still an endpoint that asks for its gateway is answered (it may have been set up by others), one
 * that speaks for another address is dropped, and so is who advertises routers. */
#ifndef TESSERA_NEIGHBOUR_H
#define TESSERA_NEIGHBOUR_H

#include "checksum.h"
#include "judge.h"

#define ON_LINK_HOPS 255 /* no router passes such a packet on with it (RFC 4861, 6.1) */
#define ADVERT_FLAGS 0xe0000000 /* from a router, solicited, override */
#define OPTION_TARGET_MAC 2

struct discovery {
	__u8 type;
	__u8 code;
	__be16 check;
	__be32 flags;
	struct addr target;
};

struct mac_option {
	__u8 type;
	__u8 length; /* of eight bytes */
	__u8 mac[ETH_ALEN];
};

/* The gateway's answer, in place of the question. */
struct advert {
	struct ethhdr eth;
	struct ipv6hdr ip;
	struct discovery said;
	struct mac_option option;
} __attribute__((packed));

static __always_inline bool is_gateway6(const struct addr *addr)
{
	return addr->w[0] == bpf_htonl(0xfe800000) && !addr->w[1] && !addr->w[2] &&
	       addr->w[3] == bpf_htonl(1);
}

/* What it takes to answer: the two ends' hardware addresses. */
static __always_inline int advertise(struct __sk_buff *skb, const struct packet *pkt,
				     const struct addr *gateway, const __u8 *mac, const __u8 *host_mac)
{
	struct discovery said = { .type = ICMP6_ADVERT, .flags = bpf_htonl(ADVERT_FLAGS) };
	struct mac_option option = { .type = OPTION_TARGET_MAC, .length = 1 };
	struct advert out = {};
	__be32 upper[2] = { bpf_htonl(sizeof(said) + sizeof(option)),
			    bpf_htonl(IPPROTO_ICMPV6) };
	__s64 sum;

	__builtin_memcpy(out.eth.h_dest, mac, ETH_ALEN);
	__builtin_memcpy(out.eth.h_source, host_mac, ETH_ALEN);
	out.eth.h_proto = bpf_htons(ETH_P_IPV6);
	out.ip.version = 6;
	out.ip.payload_len = bpf_htons(sizeof(said) + sizeof(option));
	out.ip.nexthdr = IPPROTO_ICMPV6;
	out.ip.hop_limit = ON_LINK_HOPS;
	__builtin_memcpy(&out.ip.saddr, gateway, sizeof(*gateway));
	__builtin_memcpy(&out.ip.daddr, &pkt->saddr, sizeof(pkt->saddr));
	said.target = *gateway;
	__builtin_memcpy(option.mac, host_mac, ETH_ALEN);
	sum = bpf_csum_diff(0, 0, (__be32 *)gateway, sizeof(*gateway), 0);
	sum = bpf_csum_diff(0, 0, (__be32 *)&pkt->saddr, sizeof(pkt->saddr), sum);
	sum = bpf_csum_diff(0, 0, upper, sizeof(upper), sum);
	sum = bpf_csum_diff(0, 0, (__be32 *)&said, sizeof(said), sum);
	sum = bpf_csum_diff(0, 0, (__be32 *)&option, sizeof(option), sum);
	said.check = fold(sum);
	out.said = said;
	out.option = option;
	if (bpf_skb_change_tail(skb, sizeof(out), 0) ||
	    bpf_skb_store_bytes(skb, 0, &out, sizeof(out), 0))
		return TC_ACT_SHOT;
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* From the link-local address to many: every system's chatter on a link, and this link has nobody
 * to hear it. */
static __always_inline bool is_chatter(const struct packet *pkt)
{
	return pkt->family == 6 && is_multicast6(&pkt->daddr) &&
	       (is_link_local6(&pkt->saddr) || is_zero(&pkt->saddr));
}

/* Frequent and nobody's fault: counted, not reported. */
static __always_inline int drop_quietly(struct __sk_buff *skb, __u32 reason, __u32 direction)
{
	count_packet(skb, reason, direction);
	return TC_ACT_SHOT;
}

static __always_inline bool is_listener_report(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_ICMPV6 &&
	       ((pkt->icmp_type >= ICMP6_LISTENER_QUERY && pkt->icmp_type <= ICMP6_LISTENER_DONE) ||
		pkt->icmp_type == ICMP6_LISTENER_REPORT_2);
}

/* From an endpoint; `pass` knows it. Answers, drops, or lets the host hear it. */
__noinline int discovery_from(struct __sk_buff *skb, const struct pass *pass)
{
	__u32 ifindex = skb->ifindex;
	struct endpoint *row = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct mac_option option = {};
	struct discovery said;
	__u32 at;

	if (!pass || !row)
		return TC_ACT_SHOT;
	if (is_listener_report(&pass->pkt) || pass->pkt.icmp_type == ICMP6_ROUTER_SOLICIT)
		return drop_quietly(skb, DROP_FORBIDDEN_ICMP6, DIR_EGRESS);
	at = pass->pkt.l4_offset;
	if (pass->pkt.hops != ON_LINK_HOPS || pass->pkt.icmp_code || pass->pkt.fragment ||
	    at - ETH_HLEN + sizeof(said) > pass->pkt.length ||
	    bpf_skb_load_bytes(skb, at, &said, sizeof(said)))
		return drop_at(skb, pass, SIDE_EGRESS, DROP_FORBIDDEN_ICMP6);
	if (pass->pkt.icmp_type == ICMP6_SOLICIT) {
		if (is_zero(&pass->pkt.saddr)) /* does anybody else have my address? */
			return drop_quietly(skb, DROP_FORBIDDEN_ICMP6, DIR_EGRESS);
		if (is_gateway6(&said.target))
			return advertise(skb, &pass->pkt, &said.target, row->mac, row->host_mac);
	}
	if (pass->pkt.icmp_type == ICMP6_ADVERT && !is_zero(&row->ipv6) &&
	    is_on_link6(&pass->pkt.daddr) &&
	    same_addr(&said.target, &row->ipv6) && same_addr(&pass->pkt.saddr, &row->ipv6) &&
	    at - ETH_HLEN + sizeof(said) + sizeof(option) == pass->pkt.length &&
	    !bpf_skb_load_bytes(skb, at + sizeof(said), &option, sizeof(option)) &&
	    option.type == OPTION_TARGET_MAC && option.length == 1 &&
	    same_mac(option.mac, row->mac))
		return TC_ACT_OK;
	return drop_at(skb, pass, SIDE_EGRESS, DROP_FORBIDDEN_ICMP6);
}

/* To an endpoint: the host may ask for it and answer it; hop limit and mark tell that it is the
 * host, as no router and no endpoint can send them. */
static __always_inline bool discovery_to_may_pass(const struct packet *pkt)
{
	return (pkt->icmp_type == ICMP6_SOLICIT || pkt->icmp_type == ICMP6_ADVERT) &&
	       pkt->hops == ON_LINK_HOPS && is_link_local6(&pkt->saddr);
}

#endif
