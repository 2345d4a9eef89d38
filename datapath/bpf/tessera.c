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
#include "deliver.h"
#include "host.h"
#include "judge.h"
#include "neighbour.h"
#include "overlay.h"
#include "parse.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* Whether the source is an endpoint's own; 0 or a drop reason. */
static __always_inline int check_source(const struct packet *pkt, const struct endpoint *row)
{
	if (!same_mac(pkt->smac, row->mac))
		return DROP_INVALID_SRC_MAC;
	if (pkt->family == 4)
		return pkt->saddr.w[3] == row->ipv4 ? 0 : DROP_INVALID_SRC_IP;
	return !is_zero(&row->ipv6) && same_addr(&pkt->saddr, &row->ipv6) ? 0 : DROP_INVALID_SRC_IP;
}

static __always_inline int drop_not_ready(struct __sk_buff *skb, const struct pass *pass, __u32 side)
{
	__u32 direction = side == SIDE_EGRESS ? DIR_EGRESS : DIR_INGRESS;

	return is_chatter(&pass->pkt) ? drop_quietly(skb, DROP_EP_NOT_READY, direction) :
					drop_at(skb, pass, side, DROP_EP_NOT_READY);
}

/* To the host, the network or another node. */
static __always_inline int leave(struct __sk_buff *skb, struct pass *pass)
{
	struct config *node = config_row();
	struct ipcache_entry peer;
	__be32 tunnel;
	int reason;

	find_on_link(&pass->pkt.daddr, &peer);
	pass->dst_identity = peer.identity;
	if (is_tunnelled(&pass->pkt, node))
		return drop_at(skb, pass, SIDE_EGRESS, DROP_ENCAP_PROHIBITED);
	if (peer.identity == IDENTITY_HOST)
		judged_by_host(pass, SIDE_INGRESS);
	if (judge_packet(skb, pass, true))
		return refuse_sender(skb, pass);
	/* Answers go where the flow came from, though nobody said yet where that address is. */
	tunnel = peer.tunnel ? peer.tunnel : pass->flow.tunnel;
	if (!tunnel || !node || !node->overlay_ifindex) {
		trace_news(pass, SIDE_EGRESS,
			   peer.identity == IDENTITY_HOST ? TRACE_TO_HOST : TRACE_TO_STACK);
		return to_stack(skb);
	}
	reason = set_tunnel(skb, tunnel, pass->src_identity);
	if (reason)
		return drop_at(skb, pass, SIDE_EGRESS, reason);
	trace_news(pass, SIDE_EGRESS, TRACE_TO_OVERLAY);
	return bpf_redirect(node->overlay_ifindex, 0);
}

SEC("tc")
int from_endpoint(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct endpoint *source = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct pass pass = {};
	int reason;

	if ((skb->mark & MARK_FIELD) == MARK_REFUSAL)
		return to_stack(skb);
	judged_by(&pass, SIDE_EGRESS, ifindex, source);
	reason = parse(skb, &pass.pkt);
	if (reason == NOT_JUDGED)
		return TC_ACT_OK;
	if (!source || !(source->flags & EP_READY))
		return drop_not_ready(skb, &pass, SIDE_EGRESS);
	if (reason)
		return drop_at(skb, &pass, SIDE_EGRESS, reason);
	if (is_discovery(&pass.pkt) || is_listener_report(&pass.pkt))
		return discovery_from(skb, &pass);
	reason = check_source(&pass.pkt, source);
	if (reason && is_chatter(&pass.pkt))
		return drop_quietly(skb, reason, DIR_EGRESS);
	if (reason)
		return drop_at(skb, &pass, SIDE_EGRESS, reason);
	if (pass.pkt.fragment == FRAGMENT_FIRST)
		fragment_remember(&pass.pkt);
	if (same_addr(&pass.pkt.saddr, &pass.pkt.daddr)) {
		count_packet(skb, 0, DIR_EGRESS);
		return deliver(skb, source, ifindex);
	}

	ifindex = local_ifindex(&pass.pkt.daddr);
	if (!ifindex)
		return leave(skb, &pass);

	struct endpoint *destination = bpf_map_lookup_elem(&endpoints, &ifindex);

	judged_by(&pass, SIDE_INGRESS, ifindex, destination);
	if (!destination || !(destination->flags & EP_READY))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_EP_NOT_READY);
	if (judge_packet(skb, &pass, true))
		return refuse_sender(skb, &pass);
	/* The host translated the flow's addresses on its way here and must do so on its way back. */
	if (pass.flow.via_stack) {
		trace_news(&pass, SIDE_EGRESS, TRACE_TO_STACK);
		return to_stack(skb);
	}
	trace_news(&pass, SIDE_INGRESS, TRACE_TO_ENDPOINT);
	return deliver(skb, destination, ifindex);
}

SEC("tc")
int to_endpoint(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct endpoint *destination = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct ipcache_entry peer;
	struct pass pass = {};
	int reason;

	judged_by(&pass, SIDE_INGRESS, ifindex, destination);
	reason = parse(skb, &pass.pkt);
	if (reason == NOT_JUDGED)
		return TC_ACT_OK;
	if (!destination || !(destination->flags & EP_READY))
		return drop_not_ready(skb, &pass, SIDE_INGRESS);
	if (reason)
		return drop_at(skb, &pass, SIDE_INGRESS, reason);
	if (is_discovery(&pass.pkt) && !from_own_endpoint(skb) && discovery_to_may_pass(&pass.pkt))
		return TC_ACT_OK;
	if (is_discovery(&pass.pkt) || is_listener_report(&pass.pkt))
		return drop_quietly(skb, DROP_FORBIDDEN_ICMP6, DIR_INGRESS);
	if (from_own_endpoint(skb))
		pass.begins_with = CT_VIA_STACK;
	else if (local_ifindex(&pass.pkt.saddr))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_INVALID_SRC_IP);
	if (pass.pkt.fragment == FRAGMENT_FIRST)
		fragment_remember(&pass.pkt);
	find_on_link(&pass.pkt.saddr, &peer);
	pass.src_identity = peer.identity;
	if (is_untunnelled(skb, &peer))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_INVALID_SRC_IP);
	if (peer.identity == IDENTITY_HOST && !from_own_endpoint(skb))
		judged_by_host(&pass, SIDE_EGRESS);
	if (judge_packet(skb, &pass, false))
		return refuse_stack(skb, &pass);
	trace_news(&pass, SIDE_INGRESS, TRACE_TO_ENDPOINT);
	return TC_ACT_OK;
}
