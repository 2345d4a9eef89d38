/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From bytes to a tuple. Nothing past the IP packet's own length is ever read as a header. */
#ifndef TESSERA_PARSE_H
#define TESSERA_PARSE_H

#include "fragment.h"
#include "packet.h"
#include "transport.h"

#define EXTENSION_HEADERS 8 /* more than a packet meant well has */
#define OPTION_BYTES 40

#define OPTION_END 0
#define OPTION_NOP 1
#define OPTION_LOOSE_ROUTE 131
#define OPTION_STRICT_ROUTE 137

struct l2l3 {
	struct ethhdr eth;
	struct iphdr ip;
} __attribute__((packed));

struct l2l3v6 {
	struct ethhdr eth;
	struct ipv6hdr ip;
} __attribute__((packed));

struct extension {
	__u8 next;
	__u8 length;
	__u8 type;
	__u8 segments_left;
};

struct fragment_head {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

/* A packet that names further stops has another destination than the one judged. */
__noinline int check_options(struct __sk_buff *skb, __u32 end)
{
	__u32 at = ETH_HLEN + IP_MIN_HEADER;

	for (int i = 0; i < OPTION_BYTES && at < end; i++) {
		__u8 option[2];

		if (bpf_skb_load_bytes(skb, at, option, 1) || option[0] == OPTION_END)
			return 0;
		if (option[0] == OPTION_NOP) {
			at += 1;
			continue;
		}
		if (option[0] == OPTION_LOOSE_ROUTE || option[0] == OPTION_STRICT_ROUTE)
			return DROP_INVALID_PACKET;
		if (bpf_skb_load_bytes(skb, at, option, 2) || option[1] < 2)
			return DROP_INVALID_PACKET;
		at += option[1];
	}
	return at > end ? DROP_INVALID_PACKET : 0;
}

/* 0 or a drop reason; what was learned before a refusal stays in `pkt`, for the event. */
__noinline int parse_ipv4(struct __sk_buff *skb, struct packet *pkt)
{
	struct l2l3 head;
	int reason;

	if (!pkt)
		return DROP_INVALID_PACKET;
	if (bpf_skb_load_bytes(skb, 0, &head, sizeof(head)))
		return DROP_INVALID_PACKET;
	pkt->family = 4;
	pkt->saddr = mapped(head.ip.saddr);
	pkt->daddr = mapped(head.ip.daddr);
	pkt->proto = head.ip.protocol;
	pkt->hops = head.ip.ttl;
	__builtin_memcpy(pkt->smac, head.eth.h_source, ETH_ALEN);

	__u32 present = skb->len - ETH_HLEN;
	__u32 total = bpf_ntohs(head.ip.tot_len);
	__u32 header = head.ip.ihl * 4;

	if (!total && skb->gso_size)
		total = present; /* a batch longer than the field can say (BIG TCP) */
	pkt->length = total;
	if (head.ip.version != 4 || header < IP_MIN_HEADER || total < header || total > present)
		return DROP_INVALID_PACKET;
	if (header > IP_MIN_HEADER) {
		reason = check_options(skb, ETH_HLEN + header);
		if (reason)
			return reason;
	}

	__u16 frag = bpf_ntohs(head.ip.frag_off);

	pkt->l4_offset = ETH_HLEN + header;
	pkt->fragment_id = head.ip.id;
	pkt->fragment_offset = (frag & IP_OFFSET_MASK) * 8;
	pkt->fragment_bytes = total - header;
	return parse_rest(skb, pkt, total - header, frag & IP_MORE_FRAGMENTS);
}

/* Walks to the transport header. `offset` and `end` count from the frame's start. */
__noinline int parse_extensions(struct __sk_buff *skb, struct packet *pkt, __u32 next, __u32 end)
{
	__u32 at = ETH_HLEN + sizeof(struct ipv6hdr);
	struct fragment_head piece;
	bool fragmented = false;
	bool more = false;

	if (!pkt)
		return DROP_INVALID_PACKET;
	for (int i = 0; i < EXTENSION_HEADERS; i++) {
		struct extension header;

		if (next == IPPROTO_FRAGMENT) {
			if (fragmented || at + sizeof(piece) > end ||
			    bpf_skb_load_bytes(skb, at, &piece, sizeof(piece)))
				return DROP_EXTENSION_HEADER;
			fragmented = true;
			at += sizeof(piece);
			more = piece.offset & bpf_htons(1);
			next = piece.next;
			pkt->fragment_id = piece.id;
			pkt->fragment_offset = bpf_ntohs(piece.offset) & ~7;
			pkt->fragment_bytes = end - at;
			if (pkt->fragment_offset)
				break; /* the rest of the chain is in the first piece */
			continue;
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_AH)
			break;
		if (next == IPPROTO_HOPOPTS && i)
			return DROP_EXTENSION_HEADER;
		if (at + sizeof(header) > end || bpf_skb_load_bytes(skb, at, &header, sizeof(header)))
			return DROP_EXTENSION_HEADER;
		/* Further stops: another destination than the one judged. */
		if (next == IPPROTO_ROUTING && header.segments_left)
			return DROP_EXTENSION_HEADER;
		at += next == IPPROTO_AH ? (header.length + 2) * 4 : (header.length + 1) * 8;
		next = header.next;
		if (at > end)
			return DROP_EXTENSION_HEADER;
	}
	switch (next) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_AH:
	case IPPROTO_FRAGMENT:
		if (!pkt->fragment_offset)
			return DROP_EXTENSION_HEADER; /* the chain is too long */
	}
	pkt->proto = next;
	pkt->l4_offset = at;
	return parse_rest(skb, pkt, end - at, more);
}

__noinline int parse_ipv6(struct __sk_buff *skb, struct packet *pkt)
{
	struct l2l3v6 head;

	if (!pkt)
		return DROP_INVALID_PACKET;
	if (bpf_skb_load_bytes(skb, 0, &head, sizeof(head)))
		return DROP_INVALID_PACKET;
	pkt->family = 6;
	__builtin_memcpy(&pkt->saddr, &head.ip.saddr, sizeof(pkt->saddr));
	__builtin_memcpy(&pkt->daddr, &head.ip.daddr, sizeof(pkt->daddr));
	pkt->proto = head.ip.nexthdr;
	pkt->hops = head.ip.hop_limit;
	__builtin_memcpy(pkt->smac, head.eth.h_source, ETH_ALEN);

	__u32 present = skb->len - ETH_HLEN;
	__u32 total = bpf_ntohs(head.ip.payload_len) + sizeof(head.ip);

	if (!head.ip.payload_len && skb->gso_size)
		total = present;
	pkt->length = total;
	if (head.ip.version != 6 || total > present)
		return DROP_INVALID_PACKET;
	/* An IPv4 address in disguise would be taken for it. */
	if (is_mapped(&pkt->saddr) || is_mapped(&pkt->daddr) || is_multicast6(&pkt->saddr))
		return DROP_INVALID_PACKET;
	return parse_extensions(skb, pkt, head.ip.nexthdr, ETH_HLEN + total);
}

#define NOT_JUDGED -1

/* 0, a drop reason, or NOT_JUDGED for address resolution, which neighbours at both ends make
 * powerless: they are permanent. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *pkt)
{
	if (is_of_vlan(skb))
		return DROP_UNSUPPORTED_L2;
	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
		return parse_ipv4(skb, pkt);
	case bpf_htons(ETH_P_IPV6):
		return parse_ipv6(skb, pkt);
	case bpf_htons(ETH_P_ARP):
		return NOT_JUDGED;
	default:
		return DROP_UNSUPPORTED_L2;
	}
}

#endif
