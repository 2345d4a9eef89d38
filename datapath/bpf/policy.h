/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Identity of an address, and the answer of a slot for an identity and a port. */
#ifndef TESSERA_POLICY_H
#define TESSERA_POLICY_H

#include "maps.h"
#include "parse.h"

#define IDENTITY_HOST 1
#define IDENTITY_WORLD 2

static __always_inline struct ipcache_entry *ipcache4_find(__be32 addr)
{
	struct ipcache_entry *entry = bpf_map_lookup_elem(&ipcache4, &addr);
	struct prefix4 prefix = { .prefixlen = 32, .addr = addr };

	return entry ? entry : bpf_map_lookup_elem(&ipcache4_prefix, &prefix);
}

static __always_inline struct ipcache_entry *ipcache6_find(const struct addr *addr)
{
	struct ipcache_entry *entry = bpf_map_lookup_elem(&ipcache6, addr);
	struct prefix6 prefix = { .prefixlen = 128, .addr = *addr };

	return entry ? entry : bpf_map_lookup_elem(&ipcache6_prefix, &prefix);
}

/* Whose address it is and how to get there; the world, natively, where nobody knows. */
static __always_inline void find_peer(const struct addr *addr, struct ipcache_entry *peer)
{
	struct ipcache_entry *found;

	found = is_mapped(addr) ? ipcache4_find(addr->w[3]) : ipcache6_find(addr);
	peer->identity = found ? found->identity : IDENTITY_WORLD;
	peer->tunnel = found ? found->tunnel : 0;
}

/* The same where the other end of the link is the host: it has every link-local address there. */
static __always_inline void find_on_link(const struct addr *addr, struct ipcache_entry *peer)
{
	find_peer(addr, peer);
	if (is_link_local6(addr))
		peer->identity = IDENTITY_HOST;
}

/* Interface of the endpoint of this node that has the address; 0: none has. */
static __always_inline __u32 local_ifindex(const struct addr *addr)
{
	struct local_endpoint *local;

	if (is_mapped(addr))
		local = bpf_map_lookup_elem(&local4, &addr->w[3]);
	else
		local = bpf_map_lookup_elem(&local6, addr);
	return local ? local->ifindex : 0;
}

struct answer {
	struct ct_side side;
	__u32 staged_rule_id;
	__u8 staged; /* enum verdict */
	__u8 flags;  /* enum peer_flags of the row that answered */
	__u8 match;
	__u8 reason; /* why it is dropped; 0: it passes */
};

static __always_inline struct policy_answer *port_row(const struct policy_peer *peer,
						      const struct packet *pkt)
{
	struct policy_port_key exact = {
		.class_id = peer->class_id,
		.dport = pkt->policy_port,
		.proto = pkt->proto,
	};
	struct policy_range_key range = {
		.prefixlen = 56,
		.class_id = peer->class_id,
		.proto = pkt->proto,
	};
	struct policy_answer *row = 0;

	if (peer->flags & PEER_HAS_PORTS)
		row = bpf_map_lookup_elem(&policy_port, &exact);
	if (!row && peer->flags & PEER_HAS_RANGES) {
		__builtin_memcpy(range.dport, &pkt->policy_port, sizeof(range.dport));
		row = bpf_map_lookup_elem(&policy_range, &range);
	}
	return row;
}

static __always_inline __u8 reason_of(__u8 verdict)
{
	switch (verdict) {
	case VERDICT_ALLOW:
		return 0;
	case VERDICT_DENY:
		return DROP_POLICY_DENY;
	case VERDICT_REDIRECT:
		return DROP_PROXY_PUNT; /* no proxy to hand it to yet */
	default:
		return DROP_POLICY_DENIED;
	}
}

static __always_inline void look_up(struct answer *answer, __u32 identity,
				    const struct packet *pkt)
{
	struct policy_peer_key key = { .slot = answer->side.slot, .identity = identity };
	struct policy_peer *peer = bpf_map_lookup_elem(&policy_peer, &key);
	bool everyone = !peer;
	struct policy_answer *row;

	if (everyone) {
		key.identity = 0;
		peer = bpf_map_lookup_elem(&policy_peer, &key);
	}
	if (!peer)
		return;
	row = port_row(peer, pkt);
	if (row) {
		answer->side.verdict = row->verdict;
		answer->side.rule_id = row->rule_id;
		answer->side.proxy_port = row->proxy_port;
		answer->staged_rule_id = row->staged_rule_id;
		answer->staged = row->staged;
		answer->flags = row->flags;
		answer->match = everyone ? MATCH_L4 : MATCH_L3_L4;
	} else {
		answer->side.verdict = peer->verdict;
		answer->side.rule_id = peer->rule_id;
		answer->side.proxy_port = peer->proxy_port;
		answer->staged_rule_id = peer->staged_rule_id;
		answer->staged = peer->staged;
		answer->flags = peer->flags;
		answer->match = everyone ? MATCH_ALL : MATCH_L3;
	}
}

/* What `slot` says of `pkt` from or to `identity`. The revision is read before the rows: a row
 * changed meanwhile leaves a verdict of an outdated revision behind, which is judged again. */
__noinline int judge(struct answer *answer, __u32 slot, __u32 identity, const struct packet *pkt)
{
	struct policy_slot *row;

	if (!answer || !pkt)
		return DROP_NO_CONFIG;
	__builtin_memset(answer, 0, sizeof(*answer));
	answer->side.slot = slot;
	if (slot == SLOT_OPEN) {
		answer->side.verdict = VERDICT_ALLOW;
		answer->side.rule_id = RULE_OPEN;
		answer->match = MATCH_ALL;
		return 0;
	}
	row = bpf_map_lookup_elem(&policy_slot, &slot);
	if (!row) {
		answer->reason = DROP_NO_CONFIG;
		return answer->reason;
	}
	answer->side.revision = *(volatile __u32 *)&row->revision;
	look_up(answer, identity, pkt);
	if (answer->side.verdict == VERDICT_NONE) {
		answer->side.rule_id = RULE_DEFAULT_DENY;
		answer->match = MATCH_NONE;
	}
	answer->reason = reason_of(answer->side.verdict);
	return answer->reason;
}

/* Whether no row of the slot was taken away while `answer` was made. */
static __always_inline bool still_stands(const struct answer *answer)
{
	__u32 slot = answer->side.slot;
	struct policy_slot *row;

	if (slot == SLOT_OPEN)
		return true;
	row = bpf_map_lookup_elem(&policy_slot, &slot);
	return !row || *(volatile __u32 *)&row->revision == answer->side.revision;
}

#endif
