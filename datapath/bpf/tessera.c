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

/* What of an endpoint's row decides, copied: the kernel may give the row's memory to another
 * endpoint while a program holds a pointer to it. */
struct judging {
	__u32 ifindex; /* 0: not judged here */
	__u32 endpoint;
	__u32 slot;
};

/* One packet on its way through one program. */
struct pass {
	struct packet pkt;
	struct flow flow;
	__u32 src_identity;
	__u32 dst_identity;
	struct judging by[2];
	__u32 begins_with; /* enum ct_flags of a flow this packet opens */
};

static __always_inline __u32 slot_of(const struct endpoint *row, __u32 side)
{
	return side == SIDE_EGRESS ? row->slot_out : row->slot_in;
}

/* `row` may be NULL: nobody knows the endpoint, but events say at which interface. */
static __always_inline void judged_by(struct pass *pass, __u32 side, __u32 ifindex,
				      const struct endpoint *row)
{
	__u32 identity = row ? row->identity : 0;

	pass->by[side].ifindex = ifindex;
	pass->by[side].endpoint = row ? row->id : 0;
	pass->by[side].slot = row ? slot_of(row, side) : 0;
	if (side == SIDE_EGRESS)
		pass->src_identity = identity;
	else
		pass->dst_identity = identity;
}

static __always_inline void set_scene(struct scene *scene, const struct pass *pass, __u32 side)
{
	scene->endpoint = pass->by[side].endpoint;
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
	if (pass->by[SIDE_EGRESS].ifindex)
		count_packet(skb, 0, DIR_EGRESS);
	if (pass->by[SIDE_INGRESS].ifindex)
		count_packet(skb, 0, DIR_INGRESS);
}

/* How often policy may change while one packet is judged; beyond, it is dropped. */
#define LOOKS 8

/* An answer counts if, after the slot's rows were read, the endpoint's row names the slot and the
 * slot has the revision it had before. User space points to new rows first, by another slot or by a
 * revision, and takes the old ones away at once: a packet that came before may find some of them
 * gone and others not, which is not what any policy said. */
static __always_inline void judge_by_current(struct answer *answer, const struct judging *by,
					     __u32 side, __u32 peer, const struct packet *pkt)
{
	__u32 slot = by->slot, ifindex = by->ifindex;
	struct endpoint *row;

	for (int i = 0; i < LOOKS; i++) {
		judge(answer, slot, peer, pkt);
		row = bpf_map_lookup_elem(&endpoints, &ifindex);
		if (!row)
			break;
		if (slot_of(row, side) == slot && still_stands(answer))
			return;
		slot = slot_of(row, side);
	}
	__builtin_memset(answer, 0, sizeof(*answer));
	answer->reason = DROP_EP_NOT_READY;
}

/* Asks one judge; its answer is in `into` when it allows. 0 or the reason it was dropped for. */
__noinline int ask(struct __sk_buff *skb, const struct pass *pass, __u32 side, struct ct_side *into)
{
	struct outcome outcome = { .type = EVENT_VERDICT };
	struct answer answer;
	struct scene scene;

	if (!pass || !into || side > SIDE_EGRESS)
		return DROP_NO_CONFIG;
	judge_by_current(&answer, &pass->by[side], side,
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

static __always_inline bool believed(const struct pass *pass, const struct ct_entry *entry,
				     bool same, __u32 side)
{
	if (!pass->by[side].ifindex)
		return true;
	return same && ct_believed(&entry->side[side], pass->by[side].slot);
}

/* Judges a packet that opens a flow or goes forward in one. 0 or the reason it was dropped for.
 *
 * A changed entry is written as a whole: an element of an LRU map may be given to another flow
 * while a program holds a pointer to it, and that flow must not inherit a verdict. */
static __always_inline int judge_forward(struct __sk_buff *skb, struct pass *pass,
					 struct ct_entry *tracked)
{
	struct ct_entry entry = {};
	bool same = tracked && tracked->src_identity == pass->src_identity &&
		    tracked->dst_identity == pass->dst_identity;
	bool egress = believed(pass, tracked, same, SIDE_EGRESS);
	bool ingress = believed(pass, tracked, same, SIDE_INGRESS);
	int reason;

	if (egress && ingress && tracked) {
		ct_count(tracked, &pass->pkt, false);
		return 0;
	}
	if (tracked)
		entry = *tracked;
	else
		ct_begin(&entry, &pass->flow, &pass->pkt, pass->begins_with);
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
	drop_at(skb, pass, pass->by[SIDE_EGRESS].ifindex ? SIDE_EGRESS : SIDE_INGRESS,
		DROP_CT_INSERT_FAILED);
	return DROP_CT_INSERT_FAILED;
}

/* 0: the packet passes and is counted; else it was dropped and reported. `own`: the address of the
 * endpoint that sent it, 0: another node or the host did. */
__noinline int judge_packet(struct __sk_buff *skb, struct pass *pass, __be32 own)
{
	struct ct_entry *tracked;
	int reason = 0;

	if (!pass)
		return DROP_NO_CONFIG;
	tracked = ct_look_up(skb, &pass->flow, &pass->pkt, own);
	if (pass->flow.state == CT_REPLY && tracked)
		ct_count(tracked, &pass->pkt, true);
	else if (pass->flow.state != CT_RELATED)
		reason = judge_forward(skb, pass, tracked);
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

static __always_inline bool from_own_endpoint(const struct __sk_buff *skb)
{
	return (skb->mark & MARK_FIELD) == MARK_FROM_ENDPOINT;
}

/* To the host or the network, noted as checked: to_endpoint believes a source that belongs to an
 * endpoint of this node only then. */
static __always_inline int to_stack(struct __sk_buff *skb)
{
	skb->mark = (skb->mark & ~MARK_FIELD) | MARK_FROM_ENDPOINT;
	return TC_ACT_OK;
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
	struct pass pass = {};
	int reason, act;

	judged_by(&pass, SIDE_EGRESS, ifindex, source);
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
		return judge_packet(skb, &pass, pass.pkt.saddr) ? TC_ACT_SHOT : to_stack(skb);
	}
	ifindex = local->ifindex;

	struct endpoint *destination = bpf_map_lookup_elem(&endpoints, &ifindex);

	judged_by(&pass, SIDE_INGRESS, ifindex, destination);
	if (!destination || !(destination->flags & EP_READY))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_EP_NOT_READY);
	if (judge_packet(skb, &pass, pass.pkt.saddr))
		return TC_ACT_SHOT;
	/* The host translated the flow's addresses on its way here and must do so on its way back. */
	if (pass.flow.via_stack)
		return to_stack(skb);
	return deliver(skb, destination, ifindex);
}

SEC("tc")
int to_endpoint(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct endpoint *destination = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct pass pass = {};
	int reason, act;

	judged_by(&pass, SIDE_INGRESS, ifindex, destination);
	act = not_ipv4(skb, &pass, SIDE_INGRESS);
	if (act >= 0)
		return act;
	reason = parse_ipv4(skb, &pass.pkt);
	if (!destination || !(destination->flags & EP_READY))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_EP_NOT_READY);
	if (reason)
		return drop_at(skb, &pass, SIDE_INGRESS, reason);
	if (from_own_endpoint(skb))
		pass.begins_with = CT_VIA_STACK;
	else if (bpf_map_lookup_elem(&local4, &pass.pkt.saddr))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_INVALID_SRC_IP);
	pass.src_identity = identity_of(pass.pkt.saddr);
	return judge_packet(skb, &pass, 0) ? TC_ACT_SHOT : TC_ACT_OK;
}
