/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Flows and the verdicts they carry. An entry exists only for a flow that every judge on its way
 * over this node allowed; a flow that is judged again and denied loses its entry, so that its
 * replies stop too. */
#ifndef TESSERA_CONNTRACK_H
#define TESSERA_CONNTRACK_H

#include "maps.h"
#include "parse.h"
#include "quoted.h"

#define SECOND 1000000000LL
#define TCP_ESTABLISHED_S 21600
#define TCP_SYN_S 60
#define TCP_CLOSING_S 10
#define UDP_ONE_WAY_S 60
#define UDP_BOTH_WAYS_S 180
#define ICMP_S 30

enum ct_state {
	CT_NEW = 0,
	CT_FORWARD = 1,
	CT_REPLY = 2,
	CT_RELATED = 3,
};

struct flow {
	struct ct_key key;
	__u32 source; /* index of the packet's source in the key */
	__u32 state;
	__u32 via_stack; /* CT_REPLY, CT_RELATED: the way back of a flow that came through the stack */
	__be32 tunnel;   /* likewise: the node the flow came from encapsulated */
};

/* Any order will do that both directions agree on. */
static __always_inline bool ct_source_is_second(const struct packet *pkt)
{
	for (int i = 3; i >= 0; i--)
		if (pkt->saddr.w[i] != pkt->daddr.w[i])
			return pkt->saddr.w[i] > pkt->daddr.w[i];
	return pkt->sport > pkt->dport;
}

static __always_inline void ct_key_of(struct flow *flow, const struct packet *pkt)
{
	__u32 at = ct_source_is_second(pkt);

	flow->source = at;
	if (at) {
		flow->key.addr[0] = pkt->daddr;
		flow->key.addr[1] = pkt->saddr;
	} else {
		flow->key.addr[0] = pkt->saddr;
		flow->key.addr[1] = pkt->daddr;
	}
	flow->key.port[0] = at ? pkt->dport : pkt->sport;
	flow->key.port[1] = at ? pkt->sport : pkt->dport;
	flow->key.proto = pkt->proto;
}

static __always_inline bool ct_closing(__u32 flags)
{
	return flags & CT_RST || (flags & CT_FIN_FWD && flags & CT_FIN_REV);
}

static __always_inline __s64 ct_timeout_s(__u32 flags, __u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		if (ct_closing(flags))
			return TCP_CLOSING_S;
		return flags & CT_REPLY_SEEN && !(flags & CT_SYN_ONLY) ? TCP_ESTABLISHED_S : TCP_SYN_S;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return ICMP_S;
	default:
		return flags & CT_REPLY_SEEN ? UDP_BOTH_WAYS_S : UDP_ONE_WAY_S;
	}
}

static __always_inline struct ct_entry *ct_fresh(const struct ct_key *key)
{
	struct ct_entry *entry = bpf_map_lookup_elem(&ct, key);
	__s64 idle;

	if (!entry)
		return 0;
	/* Signed: another CPU may have seen a packet later than this one looked at the clock. */
	idle = bpf_ktime_get_coarse_ns() - entry->last_seen;
	return idle > ct_timeout_s(entry->flags, key->proto) * SECOND ? 0 : entry;
}

/* A packet that opens a flow although its tuple is tracked. */
static __always_inline bool ct_opens_anew(const struct packet *pkt, __u32 flags, bool forward)
{
	if (pkt->kind == KIND_ECHO)
		return !forward;
	if (pkt->proto != IPPROTO_TCP || (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return false;
	/* Ports used again after a close; or the answering side of a live connection asks for one
	 * of its own, which the connection must not vouch for. */
	return ct_closing(flags) || (!forward && flags & CT_REPLY_SEEN);
}

/* The flow an ICMP error belongs to goes into `flow`. `strict`: only what was sent to the error's
 * source; else a router on the way may report. */
__noinline int ct_related(struct __sk_buff *skb, struct flow *flow, const struct packet *pkt,
			  bool strict)
{
	struct packet quoted = {};
	struct ct_entry *entry;

	if (!flow || !pkt || pkt->fragment || !parse_quoted(skb, pkt, &quoted))
		return false;
	if (!same_addr(&quoted.saddr, &pkt->daddr) ||
	    (strict && !same_addr(&quoted.daddr, &pkt->saddr)))
		return false;
	ct_key_of(flow, &quoted);
	entry = ct_fresh(&flow->key);
	if (!entry)
		return false;
	flow->state = CT_RELATED;
	flow->via_stack = entry->flags & CT_VIA_STACK;
	flow->tunnel = entry->tunnel;
	return true;
}

/* The entry, not for CT_NEW and CT_RELATED. `strict`: see ct_related. */
static __always_inline struct ct_entry *ct_look_up(struct __sk_buff *skb, struct flow *flow,
						   const struct packet *pkt, bool strict)
{
	struct ct_entry *entry;
	bool forward;

	flow->state = CT_NEW;
	if (pkt->kind == KIND_ICMP_ERROR)
		ct_related(skb, flow, pkt, strict);
	if (pkt->kind >= KIND_ICMP_ERROR)
		return 0;
	ct_key_of(flow, pkt);
	entry = ct_fresh(&flow->key);
	if (!entry)
		return 0;
	forward = !!(entry->flags & CT_INITIATOR_1) == flow->source;
	if (ct_opens_anew(pkt, entry->flags, forward) || (forward && pkt->kind == KIND_ECHO_REPLY))
		return 0;
	flow->state = forward ? CT_FORWARD : CT_REPLY;
	if (!forward) {
		flow->via_stack = entry->flags & CT_VIA_STACK;
		flow->tunnel = entry->tunnel;
	}
	return entry;
}

/* Whether a verdict of this side may be used without asking again. `audit`: what is denied passes
 * at this judge. */
static __always_inline bool ct_believed(const struct ct_side *side, __u32 slot, bool audit)
{
	struct policy_slot *row;

	if (side->verdict != VERDICT_ALLOW || side->slot != slot || (side->audited && !audit))
		return false;
	if (slot == SLOT_OPEN)
		return true;
	row = bpf_map_lookup_elem(&policy_slot, &slot);
	return row && row->revision == side->revision;
}

static __always_inline __u32 ct_new_flags(const struct packet *pkt, bool reply)
{
	__u32 flags = reply ? CT_REPLY_SEEN : 0;

	if (pkt->proto != IPPROTO_TCP)
		return flags;
	if (pkt->tcp_flags & TCP_FIN)
		flags |= reply ? CT_FIN_REV : CT_FIN_FWD;
	if (pkt->tcp_flags & TCP_RST)
		flags |= CT_RST;
	return flags;
}

/* Whether the flow came to a new state: answered, closed from one side, reset. Atomic: the two
 * directions of a flow run on different CPUs. */
static __always_inline bool ct_count(struct ct_entry *entry, const struct packet *pkt, bool reply)
{
	__u32 flags = ct_new_flags(pkt, reply);
	bool news = (entry->flags & flags) != flags;

	entry->last_seen = bpf_ktime_get_coarse_ns();
	__sync_fetch_and_add(&entry->packets[reply], 1);
	__sync_fetch_and_add(&entry->bytes[reply], pkt->length);
	if (news)
		__sync_fetch_and_or(&entry->flags, flags);
	if (entry->flags & CT_SYN_ONLY && !reply && !(pkt->tcp_flags & TCP_SYN))
		__sync_fetch_and_and(&entry->flags, ~CT_SYN_ONLY);
	return news;
}

static __always_inline void ct_begin(struct ct_entry *entry, const struct flow *flow,
				     const struct packet *pkt, __u32 flags)
{
	entry->flags = flags | (flow->source ? CT_INITIATOR_1 : 0);
	if (pkt->proto == IPPROTO_TCP && (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		entry->flags |= CT_SYN_ONLY;
	entry->flags |= ct_new_flags(pkt, false);
}

#endif
