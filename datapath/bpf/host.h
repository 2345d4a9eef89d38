/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node's own devices: the host firewall, and the door to the world. Only what the node itself
 * sends or gets is judged here; what passes through is judged at its endpoint. Without a row for
 * the node (HOST_IFINDEX) nothing of its own is. */
#ifndef TESSERA_HOST_H
#define TESSERA_HOST_H

#include "deliver.h"
#include "judge.h"
#include "masquerade.h"
#include "neighbour.h"
#include "overlay.h"
#include "parse.h"

static __always_inline bool is_exempt(const struct addr *peer, __be16 port, __u8 proto,
				      __u32 direction)
{
	struct control_key key = {};

	key.port = port;
	key.proto = proto;
	key.direction = direction;
	if (bpf_map_lookup_elem(&control, &key))
		return true;
	key.peer = *peer;
	return bpf_map_lookup_elem(&control, &key);
}

/* The control channel, whoever began it: judged by ports alone, so that no lost flow and no policy
 * stops it. */
__noinline int is_control(const struct packet *pkt, __u32 side)
{
	if (!pkt)
		return false;
	if (side == SIDE_INGRESS)
		return is_exempt(&pkt->saddr, pkt->dport, pkt->proto, DIR_INGRESS) ||
		       is_exempt(&pkt->saddr, pkt->sport, pkt->proto, DIR_EGRESS);
	return is_exempt(&pkt->daddr, pkt->dport, pkt->proto, DIR_EGRESS) ||
	       is_exempt(&pkt->daddr, pkt->sport, pkt->proto, DIR_INGRESS);
}

/* What keeps the link alive. */
static __always_inline bool is_link_talk(const struct packet *pkt)
{
	return is_listener_report(pkt) || (is_discovery(pkt) && pkt->hops == ON_LINK_HOPS);
}

static __always_inline bool is_node(const struct addr *addr)
{
	return is_mapped(addr) && bpf_map_lookup_elem(&nodes, &addr->w[3]);
}

/* Node devices carry what is not IP, too, and that is not ours to judge. */
static __always_inline bool is_ip(const struct __sk_buff *skb)
{
	return !is_of_vlan(skb) && (skb->protocol == bpf_htons(ETH_P_IP) ||
				    skb->protocol == bpf_htons(ETH_P_IPV6));
}

/* A tag inside one that names no VLAN: the stack takes both off and would hand over what stands
 * behind them as the device's own. */
static __always_inline bool is_hidden(const struct __sk_buff *skb)
{
	return skb->vlan_present && !is_of_vlan(skb) &&
	       (skb->protocol == bpf_htons(ETH_P_8021Q) || skb->protocol == bpf_htons(ETH_P_8021AD));
}

/* The answer goes back where the packet came from; to_netdev knows it by its mark. */
static __always_inline int refuse_network(struct __sk_buff *skb, const struct pass *pass)
{
	if (!pass->respond || refuse(skb, pass))
		return TC_ACT_SHOT;
	skb->mark = (skb->mark & ~MARK_FIELD) | MARK_REFUSAL;
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int judge_host(struct __sk_buff *skb, struct pass *pass, __u32 side)
{
	if (is_control(&pass->pkt, side)) {
		count_packet(skb, 0, side == SIDE_EGRESS ? DIR_EGRESS : DIR_INGRESS);
		return TC_ACT_OK;
	}
	if (judge_packet(skb, pass, false))
		return side == SIDE_INGRESS ? refuse_network(skb, pass) : TC_ACT_SHOT;
	trace_news(pass, side, side == SIDE_EGRESS ? TRACE_TO_NETWORK : TRACE_TO_HOST);
	return TC_ACT_OK;
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	struct config *node = config_row();
	struct ipcache_entry peer;
	struct pass pass = {};
	int reason;

	if (is_hidden(skb))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_UNSUPPORTED_L2);
	if (!is_ip(skb) || !node)
		return TC_ACT_OK;
	reason = parse(skb, &pass.pkt);
	find_peer(&pass.pkt.saddr, &peer);
	pass.src_identity = peer.identity;
	if (peer.identity == IDENTITY_HOST || peer.tunnel || local_ifindex(&pass.pkt.saddr))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_INVALID_SRC_IP);
	if (!reason && pass.pkt.fragment == FRAGMENT_FIRST)
		fragment_remember(&pass.pkt);
	if (!reason && node->flags & CONFIG_MASQUERADE && unmasquerade(skb, &pass.pkt, node))
		return TC_ACT_OK;
	find_on_link(&pass.pkt.daddr, &peer);
	if (peer.identity != IDENTITY_HOST)
		return TC_ACT_OK;
	pass.dst_identity = IDENTITY_HOST;
	if (!reason && is_tunnelled(&pass.pkt, node))
		return is_node(&pass.pkt.saddr) ?
			       TC_ACT_OK :
			       drop_at(skb, &pass, SIDE_INGRESS, DROP_UNKNOWN_SENDER);
	judged_by_host(&pass, SIDE_INGRESS);
	if (!pass.by[SIDE_INGRESS].ifindex)
		return TC_ACT_OK;
	if (reason)
		return drop_at(skb, &pass, SIDE_INGRESS, reason);
	if (is_link_talk(&pass.pkt))
		return TC_ACT_OK;
	return judge_host(skb, &pass, SIDE_INGRESS);
}

SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
	struct config *node = config_row();
	struct ipcache_entry peer;
	struct pass pass = {};
	int reason;

	if (!is_ip(skb) || !node || (skb->mark & MARK_FIELD) == MARK_REFUSAL)
		return TC_ACT_OK;
	if (from_own_endpoint(skb))
		return node->flags & CONFIG_MASQUERADE ? masquerade(skb, &pass, node) : TC_ACT_OK;
	judged_by_host(&pass, SIDE_EGRESS);
	if (!pass.by[SIDE_EGRESS].ifindex)
		return TC_ACT_OK;
	reason = parse(skb, &pass.pkt);
	find_on_link(&pass.pkt.saddr, &peer);
	if (peer.identity != IDENTITY_HOST)
		return TC_ACT_OK; /* passes through */
	find_peer(&pass.pkt.daddr, &peer);
	pass.dst_identity = peer.identity;
	if (reason)
		return drop_at(skb, &pass, SIDE_EGRESS, reason);
	if (pass.pkt.fragment == FRAGMENT_FIRST)
		fragment_remember(&pass.pkt);
	if (is_link_talk(&pass.pkt) || (is_tunnelled(&pass.pkt, node) && is_node(&pass.pkt.daddr)))
		return TC_ACT_OK;
	return judge_host(skb, &pass, SIDE_EGRESS);
}

#endif
