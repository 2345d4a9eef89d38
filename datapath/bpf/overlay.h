/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Between nodes that do not route each other's endpoints: VXLAN, one device for all peers, the
 * source's identity as the network identifier. What a tunnel says is believed of nodes alone. */
#ifndef TESSERA_OVERLAY_H
#define TESSERA_OVERLAY_H

#include <linux/if_packet.h>

#include "deliver.h"
#include "judge.h"
#include "neighbour.h"
#include "parse.h"
#include "refuse.h"

#define TUNNEL_TTL 64
#define IDENTITY_WORLD_IPV4 9
#define IDENTITY_WORLD_IPV6 10

static __always_inline bool is_tunnelled(const struct packet *pkt, const struct config *node)
{
	return node && node->tunnel_port && pkt->proto == IPPROTO_UDP &&
	       pkt->dport == node->tunnel_port;
}

/* 0 or a drop reason. */
__noinline int set_tunnel(struct __sk_buff *skb, __be32 to, __u32 identity)
{
	struct bpf_tunnel_key key = {};

	key.tunnel_id = identity;
	key.remote_ipv4 = bpf_ntohl(to);
	key.tunnel_ttl = TUNNEL_TTL;
	return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX) ?
		       DROP_NO_TUNNEL_ENDPOINT : 0;
}

/* Who speaks, by what his node says: 0 where it cannot be. No node speaks for the world. */
static __always_inline __u32 identity_of_vni(__u32 vni, const struct node *sender)
{
	switch (vni) {
	case IDENTITY_HOST:
		return sender->identity;
	case IDENTITY_WORLD:
	case IDENTITY_WORLD_IPV4:
	case IDENTITY_WORLD_IPV6:
		return 0;
	default:
		return vni;
	}
}

/* Fills in who sent what a tunnel brought; 0 or a drop reason. */
__noinline int unwrap(struct __sk_buff *skb, struct pass *pass)
{
	struct bpf_tunnel_key key = {};
	struct ipcache_entry peer;
	struct node *sender;

	if (!pass || bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		return DROP_NO_TUNNEL_KEY;
	pass->from_tunnel = bpf_htonl(key.remote_ipv4);
	sender = bpf_map_lookup_elem(&nodes, &pass->from_tunnel);
	if (!sender)
		return DROP_UNKNOWN_SENDER;
	pass->src_identity = identity_of_vni(key.tunnel_id, sender);
	if (!pass->src_identity)
		return DROP_INVALID_VNI;
	find_peer(&pass->pkt.saddr, &peer);
	if (peer.identity == IDENTITY_HOST || local_ifindex(&pass->pkt.saddr) ||
	    is_link_local6(&pass->pkt.saddr))
		return DROP_INVALID_SRC_IP;
	return is_discovery(&pass->pkt) ? DROP_FORBIDDEN_ICMP6 : 0;
}

/* To an endpoint of this node, or to the node itself. */
SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	struct endpoint *destination;
	struct ipcache_entry peer;
	struct pass pass = {};
	__u32 ifindex;
	int reason;

	/* Drops are the network's affair until an endpoint is found. */
	reason = parse(skb, &pass.pkt);
	if (reason == NOT_JUDGED)
		reason = DROP_UNSUPPORTED_L2;
	if (!reason)
		reason = unwrap(skb, &pass);
	if (reason)
		return drop_at(skb, &pass, SIDE_INGRESS, reason);
	if (pass.pkt.fragment == FRAGMENT_FIRST)
		fragment_remember(&pass.pkt);
	ifindex = local_ifindex(&pass.pkt.daddr);
	if (!ifindex) {
		find_peer(&pass.pkt.daddr, &peer);
		if (peer.identity != IDENTITY_HOST)
			return drop_at(skb, &pass, SIDE_INGRESS, DROP_NO_LOCAL_ENDPOINT);
		pass.dst_identity = IDENTITY_HOST;
		judged_by_host(&pass, SIDE_INGRESS);
		if (judge_packet(skb, &pass, false))
			return TC_ACT_SHOT;
		trace_news(&pass, SIDE_INGRESS, TRACE_TO_HOST);
		return bpf_skb_change_type(skb, PACKET_HOST) ? TC_ACT_SHOT : TC_ACT_OK;
	}
	destination = bpf_map_lookup_elem(&endpoints, &ifindex);
	judged_by(&pass, SIDE_INGRESS, ifindex, destination);
	if (!destination || !(destination->flags & EP_READY))
		return drop_at(skb, &pass, SIDE_INGRESS, DROP_EP_NOT_READY);
	if (judge_packet(skb, &pass, false)) {
		if (!pass.respond || refuse(skb, &pass) ||
		    set_tunnel(skb, pass.from_tunnel, pass.dst_identity))
			return TC_ACT_SHOT;
		return bpf_redirect(skb->ifindex, 0);
	}
	if (bpf_skb_change_type(skb, PACKET_HOST))
		return TC_ACT_SHOT;
	trace_news(&pass, SIDE_INGRESS, TRACE_TO_ENDPOINT);
	return deliver(skb, destination, ifindex);
}

/* What the stack routes into the device, the host's own packets above all, has no tunnel yet. What
 * from_endpoint sends has one. */
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = {};
	struct ipcache_entry peer;
	struct pass pass = {};
	int reason;

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0) && key.tunnel_id)
		return TC_ACT_OK;
	reason = parse(skb, &pass.pkt);
	if (reason == NOT_JUDGED)
		reason = DROP_UNSUPPORTED_L2;
	if (reason)
		return drop_at(skb, &pass, SIDE_EGRESS, reason);
	if (is_chatter(&pass.pkt)) /* the device's own */
		return drop_quietly(skb, DROP_NO_TUNNEL_ENDPOINT, DIR_EGRESS);
	find_peer(&pass.pkt.saddr, &peer);
	pass.src_identity = peer.identity;
	if (peer.identity != IDENTITY_HOST &&
	    !(from_own_endpoint(skb) && local_ifindex(&pass.pkt.saddr)))
		return drop_at(skb, &pass, SIDE_EGRESS, DROP_INVALID_SRC_IP);
	find_peer(&pass.pkt.daddr, &peer);
	pass.dst_identity = peer.identity;
	if (!peer.tunnel)
		return drop_at(skb, &pass, SIDE_EGRESS, DROP_NO_TUNNEL_ENDPOINT);
	reason = set_tunnel(skb, peer.tunnel, pass.src_identity);
	return reason ? drop_at(skb, &pass, SIDE_EGRESS, reason) : TC_ACT_OK;
}

#endif
