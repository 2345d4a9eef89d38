/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Datagrams in pieces: the first one is judged by its ports and remembered, the later ones by what
 * it said. A piece that comes before the first is dropped, and so is one that would write over it:
 * the receiver must not see other ports than the judge. Pieces after the first may overlap each
 * other; that changes no header, and the receiver's stack drops them. */
#ifndef TESSERA_FRAGMENT_H
#define TESSERA_FRAGMENT_H

#include "maps.h"
#include "packet.h"
#include "transport.h"

#define FRAGMENT_LIFE_NS 60000000000LL /* as long as a receiver waits at most (RFC 8200, 4.5) */

static __always_inline void fragment_key_of(struct fragment_key *key, const struct packet *pkt,
					    __u8 proto)
{
	key->saddr = pkt->saddr;
	key->daddr = pkt->daddr;
	key->id = pkt->fragment_id;
	key->proto = pkt->family == 4 ? proto : 0;
}

/* A piece whose offset and length no sender makes. */
static __always_inline bool fragment_is_odd(const struct packet *pkt, bool more)
{
	__u32 end = (__u32)pkt->fragment_offset + pkt->fragment_bytes;

	return !pkt->fragment_bytes || end > 0xffff || (more && pkt->fragment_bytes % 8);
}

static __always_inline int fragment_recall(struct packet *pkt)
{
	struct fragment_key key = {};
	struct fragment *first;

	fragment_key_of(&key, pkt, pkt->proto);
	first = bpf_map_lookup_elem(&fragments, &key);
	if (!first || (__s64)(bpf_ktime_get_coarse_ns() - first->seen) > FRAGMENT_LIFE_NS)
		return DROP_NO_FIRST_FRAGMENT;
	if (pkt->fragment_offset < first->bytes)
		return DROP_FRAGMENT;
	pkt->sport = first->sport;
	pkt->dport = first->dport;
	pkt->policy_port = first->policy_port;
	pkt->proto = first->proto;
	pkt->kind = first->kind == KIND_ICMP_ERROR ? KIND_UNTRACKED : first->kind; /* quotes nothing */
	pkt->icmp_type = first->icmp_type;
	pkt->icmp_code = first->icmp_code;
	return 0;
}

/* Called when the source is known to be who it says. */
__noinline int fragment_remember(const struct packet *pkt)
{
	struct fragment_key key = {};
	struct fragment first = {};

	if (!pkt)
		return 0;
	fragment_key_of(&key, pkt, pkt->proto);
	first.seen = bpf_ktime_get_coarse_ns();
	first.sport = pkt->sport;
	first.dport = pkt->dport;
	first.policy_port = pkt->policy_port;
	first.bytes = pkt->fragment_bytes;
	first.proto = pkt->proto;
	first.kind = pkt->kind;
	first.icmp_type = pkt->icmp_type;
	first.icmp_code = pkt->icmp_code;
	bpf_map_update_elem(&fragments, &key, &first, BPF_ANY);
	return 0;
}

/* The rest of an IP packet, whole or a piece of one, from l4_offset on. 0 or a drop reason. */
static __always_inline int parse_rest(struct __sk_buff *skb, struct packet *pkt, __u32 room,
				      bool more)
{
	if (!more && !pkt->fragment_offset)
		return parse_transport(skb, pkt, room);
	if (fragment_is_odd(pkt, more))
		return DROP_INVALID_PACKET;
	if (pkt->fragment_offset) {
		pkt->fragment = FRAGMENT_LATER;
		return fragment_recall(pkt);
	}
	pkt->fragment = FRAGMENT_FIRST;
	return parse_transport(skb, pkt, room);
}

#endif
