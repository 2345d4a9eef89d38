/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* One packet before its judges: the egress judge at its source, the ingress judge at its
 * destination, each asked on the node where it is. */
#ifndef TESSERA_JUDGE_H
#define TESSERA_JUDGE_H

#include "conntrack.h"
#include "events.h"
#include "maps.h"
#include "policy.h"

#define SIDE_INGRESS 0
#define SIDE_EGRESS 1

/* What of an endpoint's row decides, copied: the kernel may give the row's memory to another
 * endpoint while a program holds a pointer to it. */
struct judging {
	__u32 ifindex; /* 0: not judged here */
	__u32 endpoint;
	__u32 slot;
	__u32 flags; /* enum endpoint_flags */
};

/* One packet on its way through one program. */
struct pass {
	struct packet pkt;
	struct flow flow;
	__u32 src_identity;
	__u32 dst_identity;
	struct judging by[2];
	__u32 begins_with;  /* enum ct_flags of a flow this packet opens */
	__be32 from_tunnel; /* node that encapsulated it */
	__u32 respond;      /* it was denied, and its sender is to be told */
	__u32 news;         /* it began a flow, or brought one to a new state */
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
	pass->by[side].flags = row ? row->flags : 0;
	if (side == SIDE_EGRESS)
		pass->src_identity = identity;
	else
		pass->dst_identity = identity;
}

/* Where the node itself is one end; nothing where it has no row. */
static __always_inline void judged_by_host(struct pass *pass, __u32 side)
{
	__u32 ifindex = HOST_IFINDEX;
	struct endpoint *row = bpf_map_lookup_elem(&endpoints, &ifindex);

	if (row)
		judged_by(pass, side, ifindex, row);
}

static __always_inline void set_scene(struct scene *scene, const struct pass *pass, __u32 side)
{
	scene->endpoint = pass->by[side].endpoint;
	scene->src_identity = pass->src_identity;
	scene->dst_identity = pass->dst_identity;
	scene->direction = side == SIDE_EGRESS ? DIR_EGRESS : DIR_INGRESS;
}

/* Counts and reports a drop that is nobody's verdict. */
__noinline int drop_at(struct __sk_buff *skb, const struct pass *pass, __u32 side, __u32 reason)
{
	struct outcome outcome = {};
	struct scene scene;

	outcome.type = EVENT_DROP;
	outcome.reason = reason;
	if (!pass || side > SIDE_EGRESS)
		return TC_ACT_SHOT;
	set_scene(&scene, pass, side);
	count_packet(skb, outcome.reason, scene.direction);
	emit(&pass->pkt, &scene, &outcome);
	return TC_ACT_SHOT;
}

/* Reports that a packet passes, and where to: of a flow its first packet, its first answer and what
 * closes it, so that no flow costs more than a handful of records. */
__noinline int trace(const struct pass *pass, __u32 side, __u32 point)
{
	struct outcome outcome = {};
	struct config *node = config_row();
	struct scene scene;

	if (!pass || side > SIDE_EGRESS || !node || !(node->flags & CONFIG_TRACE))
		return 0;
	set_scene(&scene, pass, side);
	outcome.type = EVENT_TRACE;
	outcome.point = point;
	if (pass->flow.state == CT_REPLY)
		outcome.flags = EVENT_REPLY;
	return emit(&pass->pkt, &scene, &outcome);
}

static __always_inline void trace_news(const struct pass *pass, __u32 side, __u32 point)
{
	if (pass->news)
		trace(pass, side, point);
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

static __always_inline bool is_denial(__u8 reason)
{
	return reason == DROP_POLICY_DENIED || reason == DROP_POLICY_DENY;
}

/* Lets what is denied pass where the endpoint or the row is audited. */
static __always_inline void audit(struct answer *answer, const struct judging *by)
{
	if (!is_denial(answer->reason) || !(by->flags & EP_AUDIT || answer->flags & PEER_AUDIT))
		return;
	answer->reason = 0;
	answer->side.verdict = VERDICT_ALLOW;
	/* A row's audit ends with the row, which the slot's revision tells; an endpoint's does not. */
	answer->side.audited = !(answer->flags & PEER_AUDIT);
}

/* Asks one judge; its answer is in `into` when it allows. 0 or the reason it was dropped for. */
__noinline int ask(struct __sk_buff *skb, struct pass *pass, __u32 side, struct ct_side *into)
{
	struct outcome outcome = {};
	struct answer answer;
	struct scene scene;

	if (!pass || !into || side > SIDE_EGRESS)
		return DROP_NO_CONFIG;
	judge_by_current(&answer, &pass->by[side], side,
			 side == SIDE_EGRESS ? pass->dst_identity : pass->src_identity, &pass->pkt);
	set_scene(&scene, pass, side);
	outcome.type = EVENT_VERDICT;
	outcome.rule_id = answer.side.rule_id;
	outcome.verdict = answer.side.verdict;
	outcome.match = answer.match;
	if (answer.flags & PEER_STAGED) {
		outcome.flags = EVENT_STAGED;
		outcome.staged = answer.staged;
		outcome.staged_rule_id = answer.staged_rule_id;
	}
	if (answer.reason) {
		audit(&answer, &pass->by[side]);
		if (!answer.reason)
			outcome.flags |= EVENT_AUDIT;
	}
	emit(&pass->pkt, &scene, &outcome);
	if (!answer.reason) {
		*into = answer.side;
		return 0;
	}
	if (pass->flow.state == CT_FORWARD)
		bpf_map_delete_elem(&ct, &pass->flow.key);
	if (is_denial(answer.reason))
		pass->respond = pass->by[side].flags & EP_RESPOND || answer.flags & PEER_RESPOND;
	outcome.type = EVENT_DROP;
	outcome.reason = answer.reason;
	count_packet(skb, outcome.reason, scene.direction);
	emit(&pass->pkt, &scene, &outcome);
	return answer.reason;
}

static __always_inline bool believed(const struct pass *pass, const struct ct_entry *entry,
				     bool same, __u32 side)
{
	const struct judging *by = &pass->by[side];

	if (!by->ifindex)
		return true;
	return same && ct_believed(&entry->side[side], by->slot, by->flags & EP_AUDIT);
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
		pass->news = ct_count(tracked, &pass->pkt, false);
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
	if (pass->from_tunnel)
		entry.tunnel = pass->from_tunnel;
	pass->news = ct_count(&entry, &pass->pkt, false) || !tracked;
	if (!bpf_map_update_elem(&ct, &pass->flow.key, &entry, BPF_ANY))
		return 0;
	drop_at(skb, pass, pass->by[SIDE_EGRESS].ifindex ? SIDE_EGRESS : SIDE_INGRESS,
		DROP_CT_INSERT_FAILED);
	return DROP_CT_INSERT_FAILED;
}

/* 0: the packet passes and is counted; else it was dropped and reported. `strict`: an endpoint sent
 * it, which may report errors only of what was sent to itself; not another node or the host. */
__noinline int judge_packet(struct __sk_buff *skb, struct pass *pass, bool strict)
{
	struct ct_entry *tracked;
	int reason = 0;

	if (!pass)
		return DROP_NO_CONFIG;
	tracked = ct_look_up(skb, &pass->flow, &pass->pkt, strict);
	if (pass->flow.state == CT_REPLY && tracked)
		pass->news = ct_count(tracked, &pass->pkt, true);
	else if (pass->flow.state != CT_RELATED)
		reason = judge_forward(skb, pass, tracked);
	if (!reason)
		count_forwarded(skb, pass);
	return reason;
}

#endif
