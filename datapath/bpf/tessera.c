// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* The programs on the host side of every endpoint's veth.
 *
 *   namespace                     host side of the veth
 *   ┌─────────┐   ingress   ┌───────────────┐  other endpoint here: judged for it too, then
 *   │ workload├────────────►│ from_endpoint ├──────────────► straight into its namespace
 *   │         │             └───────┬───────┘
 *   │         │                     └──────────► stack: host, network
 *   │         │   egress    ┌───────────────┐
 *   │         │◄────────────┤  to_endpoint  │◄────────────── stack: host, network
 *   └─────────┘             └───────────────┘
 *
 * A connection passes if the egress judge at its source and the ingress judge at its destination
 * allow it. Its first packet asks both that are on this node; later ones use what the tracked flow
 * carries, as long as neither the slot, its revision nor an identity has changed.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "maps.h"
#include "parse.h"
#include "events.h"
#include "policy.h"
#include "conntrack.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define SIDE_INGRESS 0
#define SIDE_EGRESS 1

/* One packet on its way through one program. */
struct pass {
	struct packet pkt;
	struct flow flow;
	__u32 src_identity;
	__u32 dst_identity;
	const struct endpoint *source;      /* NULL: not judged here */
	const struct endpoint *destination; /* NULL: not judged here */
};

static __always_inline void set_scene(struct scene *scene, const struct pass *pass, __u32 side)
{
	const struct endpoint *judge = side == SIDE_EGRESS ? pass->source : pass->destination;

	scene->endpoint = judge ? judge->id : 0;
	scene->src_identity = pass->src_identity;
	scene->dst_identity = pass->dst_identity;
	scene->direction = side == SIDE_EGRESS ? DIR_EGRESS : DIR_INGRESS;
}

static __always_inline int drop_at(struct __sk_buff *skb, const struct pass *pass, __u32 side,
				   __u8 reason)
{
	struct scene scene;

	set_scene(&scene, pass, side);
	return drop(skb, &pass->pkt, &scene, reason, RULE_NONE, VERDICT_NONE);
}

static __always_inline void count_forwarded(struct __sk_buff *skb, const struct pass *pass)
{
	if (pass->source)
		count_packet(skb, 0, DIR_EGRESS);
	if (pass->destination)
		count_packet(skb, 0, DIR_INGRESS);
}

static __always_inline bool same_identities(const struct pass *pass)
{
	return pass->flow.entry->src_identity == pass->src_identity &&
	       pass->flow.entry->dst_identity == pass->dst_identity;
}

/* Asks one judge; its answer is in `entry` when it allows. */
static __noinline int ask(struct __sk_buff *skb, const struct pass *pass, __u32 side,
			  struct ct_side *into)
{
	const struct endpoint *judging = side == SIDE_EGRESS ? pass->source : pass->destination;
	struct outcome outcome = { .type = EVENT_VERDICT };
	struct answer answer;
	struct scene scene;

	if (!judging)
		return 0;
	judge(&answer, side == SIDE_EGRESS ? judging->slot_out : judging->slot_in,
	      side == SIDE_EGRESS ? pass->dst_identity : pass->src_identity, &pass->pkt);
	set_scene(&scene, pass, side);
	outcome.rule_id = answer.side.rule_id;
	outcome.verdict = answer.side.verdict;
	outcome.match = answer.match;
	emit(&pass->pkt, &scene, &outcome);
	if (!answer.reason) {
		*into = answer.side;
		return 0;
	}
	if (pass->flow.state == CT_FORWARD)
		bpf_map_delete_elem(&ct4, &pass->flow.key);
	drop(skb, &pass->pkt, &scene, answer.reason, answer.side.rule_id, answer.side.verdict);
	return answer.reason;
}

static __always_inline bool believed(const struct pass *pass, bool same, __u32 side)
{
	const struct endpoint *judging = side == SIDE_EGRESS ? pass->source : pass->destination;

	if (!judging)
		return true;
	return same && ct_believed(&pass->flow.entry->side[side],
				   side == SIDE_EGRESS ? judging->slot_out : judging->slot_in);
}

/* Judges a packet that opens a flow or goes forward in one. 0 or the reason it was dropped for.
 *
 * A changed entry is written as a whole: an element of an LRU map may be given to another flow
 * while a program holds a pointer to it, and that flow must not inherit a verdict. */
static __always_inline int judge_forward(struct __sk_buff *skb, struct pass *pass)
{
	struct ct_entry entry = {};
	bool same = pass->flow.entry && same_identities(pass);
	bool egress = believed(pass, same, SIDE_EGRESS);
	bool ingress = believed(pass, same, SIDE_INGRESS);
	int reason;

	if (egress && ingress && pass->flow.entry) {
		ct_count(pass->flow.entry, &pass->pkt, false);
		return 0;
	}
	if (pass->flow.entry)
		entry = *pass->flow.entry;
	else
		ct_begin(&entry, &pass->flow, &pass->pkt);
	if (!same) /* a side that is judged in another program must notice the change, too */
		__builtin_memset(entry.side, 0, sizeof(entry.side));
	if (!egress) {
		reason = ask(skb, pass, SIDE_EGRESS, &entry.side[SIDE_EGRESS]);
		if (reason)
			return reason;
	}
	if (!ingress) {
		reason = ask(skb, pass, SIDE_INGRESS, &entry.side[SIDE_INGRESS]);
		if (reason)
			return reason;
	}
	if (pass->pkt.kind >= KIND_ECHO_REPLY)
		return 0;
	entry.src_identity = pass->src_identity;
	entry.dst_identity = pass->dst_identity;
	ct_count(&entry, &pass->pkt, false);
	if (!bpf_map_update_elem(&ct4, &pass->flow.key, &entry, BPF_ANY))
		return 0;
	drop_at(skb, pass, pass->source ? SIDE_EGRESS : SIDE_INGRESS, DROP_CT_INSERT_FAILED);
	return DROP_CT_INSERT_FAILED;
}

/* 0: the packet passes and is counted; else it was dropped and reported. */
static __always_inline int judge_packet(struct __sk_buff *skb, struct pass *pass, __be32 own)
{
	int reason = 0;

	ct_look_up(skb, &pass->flow, &pass->pkt, own);
	if (pass->flow.state == CT_REPLY)
		ct_count(pass->flow.entry, &pass->pkt, true);
	else if (pass->flow.state != CT_RELATED)
		reason = judge_forward(skb, pass);
	if (!reason)
		count_forwarded(skb, pass);
	return reason;
}

/* Into the namespace without the stack: from there the packet does not pass to_endpoint. */
static __always_inline int deliver(struct __sk_buff *skb, const struct endpoint *to, __u32 ifindex)
{
	__u8 macs[2 * ETH_ALEN];

	__builtin_memcpy(macs, to->mac, ETH_ALEN);
	__builtin_memcpy(macs + ETH_ALEN, to->host_mac, ETH_ALEN);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return TC_ACT_SHOT;
	return bpf_redirect_peer(ifindex, 0);
}

/* What is not IPv4. -1: it is. */
static __always_inline int not_ipv4(struct __sk_buff *skb, const struct pass *pass, __u32 side)
{
	struct scene scene;

	if (skb->vlan_present)
		return drop_at(skb, pass, side, DROP_UNSUPPORTED_L2);
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return -1;
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return TC_ACT_OK;
	if (skb->protocol != bpf_htons(ETH_P_IPV6))
		return drop_at(skb, pass, side, DROP_UNSUPPORTED_L2);
	set_scene(&scene, pass, side);
	return drop_ipv6(skb, &scene);
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return !__builtin_memcmp(a, b, ETH_ALEN);
}

SEC("tc")
int from_endpoint(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct endpoint *source = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct local_endpoint *local;
	struct pass pass = { .source = source };
	int reason, act;

	pass.src_identity = source ? source->identity : 0;
	act = not_ipv4(skb, &pass, SIDE_EGRESS);
	if (act >= 0)
		return act;
	reason = parse_ipv4(skb, &pass.pkt);
	if (!source || !(source->flags & EP_READY))
		return drop_at(skb, &pass, SIDE_EGRESS, DROP_EP_NOT_READY);
	if (reason)
		return drop_at(skb, &pass, SIDE_EGRESS, reason);
	if (!same_mac(pass.pkt.smac, source->mac))
		return drop_at(skb, &pass, SIDE_EGRESS, DROP_INVALID_SRC_MAC);
	if (pass.pkt.saddr != source->ipv4)
		return drop_at(skb, &pass, SIDE_EGRESS, DROP_INVALID_SRC_IP);
	if (pass.pkt.daddr == source->ipv4) {
		count_packet(skb, 0, DIR_EGRESS);
		return deliver(skb, source, ifindex);
	}

	local = bpf_map_lookup_elem(&local4, &pass.pkt.daddr);
	if (!local) {
		pass.dst_identity = identity_of(pass.pkt.daddr);
		return judge_packet(skb, &pass, source->ipv4) ? TC_ACT_SHOT : TC_ACT_OK;
	}
	ifindex = local->ifindex;

	struct endpoint *destination = bpf_map_lookup_elem(&endpoints, &ifindex);

	if (!destination || !(destination->flags & EP_READY)) {
		pass.destination = destination;
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_EP_NOT_READY);
	}
	pass.destination = destination;
	pass.dst_identity = destination->identity;
	if (judge_packet(skb, &pass, source->ipv4))
		return TC_ACT_SHOT;
	return deliver(skb, destination, ifindex);
}

SEC("tc")
int to_endpoint(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct endpoint *destination = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct pass pass = { .destination = destination };
	int reason, act;

	pass.dst_identity = destination ? destination->identity : 0;
	act = not_ipv4(skb, &pass, SIDE_INGRESS);
	if (act >= 0)
		return act;
	reason = parse_ipv4(skb, &pass.pkt);
	if (!destination || !(destination->flags & EP_READY))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_EP_NOT_READY);
	if (reason)
		return drop_at(skb, &pass, SIDE_INGRESS, reason);
	pass.src_identity = identity_of(pass.pkt.saddr);
	return judge_packet(skb, &pass, 0) ? TC_ACT_SHOT : TC_ACT_OK;
}
