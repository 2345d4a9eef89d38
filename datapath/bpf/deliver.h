/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Where packets go once they passed, and the mark that says what was checked on the way. */
#ifndef TESSERA_DELIVER_H
#define TESSERA_DELIVER_H

#include "judge.h"
#include "refuse.h"

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

/* Who sends through tunnels sends nothing beside them: anybody in the network can write an address
 * into a packet, and the tunnel is what vouches for it. */
static __always_inline bool is_untunnelled(const struct __sk_buff *skb,
					   const struct ipcache_entry *source)
{
	return source->tunnel && !from_own_endpoint(skb);
}

/* To the host or the network, noted as checked: to_endpoint believes a source that belongs to an
 * endpoint of this node only then. */
static __always_inline int to_stack(struct __sk_buff *skb)
{
	skb->mark = (skb->mark & ~MARK_FIELD) | MARK_FROM_ENDPOINT;
	return TC_ACT_OK;
}

/* Denied on its way out of an endpoint: its answer goes back in. */
static __always_inline int refuse_sender(struct __sk_buff *skb, const struct pass *pass)
{
	if (!pass->respond || refuse(skb, pass))
		return TC_ACT_SHOT;
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* Denied on its way to an endpoint: the answer goes where the packet came from, as if the endpoint
 * had sent it; from_endpoint knows it by its mark. */
static __always_inline int refuse_stack(struct __sk_buff *skb, const struct pass *pass)
{
	if (!pass->respond || refuse(skb, pass))
		return TC_ACT_SHOT;
	skb->mark = (skb->mark & ~MARK_FIELD) | MARK_REFUSAL;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

#endif
