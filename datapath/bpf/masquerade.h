/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Endpoints' IPv4 packets leave for the world under the node's address. Two rows per flow, what
 * leaves and what comes back; ports come from a pool that the node's own sockets must not use. A
 * port is taken from a flow that conntrack has forgotten, never from one that lives. */
#ifndef TESSERA_MASQUERADE_H
#define TESSERA_MASQUERADE_H

#include "conntrack.h"
#include "judge.h"
#include "overlay.h"
#include "parse.h"

#define PORTS_TRIED 32
#define IDENTITY_REMOTE_NODE 6
#define IDENTITY_KUBE_APISERVER 7
#define SCOPE_NODE_LOCAL 1 /* top byte of identities made for addresses outside of the cluster */
#define SCOPE_REMOTE_NODE 2

#define TCP_CHECK 16
#define UDP_CHECK 6
#define ICMP_CHECK 2
#define ICMP_ID 4

/* The ends of a flow as `nat` names them. */
static __always_inline void nat_key_of(struct nat_key *key, const struct packet *pkt, bool out)
{
	bool echo = pkt->proto == IPPROTO_ICMP;

	key->local = out ? pkt->saddr.w[3] : pkt->daddr.w[3];
	key->remote = out ? pkt->daddr.w[3] : pkt->saddr.w[3];
	key->port = out ? pkt->sport : pkt->dport;
	key->remote_port = echo ? 0 : out ? pkt->dport : pkt->sport;
	key->proto = pkt->proto;
	key->direction = out ? NAT_OUT : NAT_IN;
}

/* The nodes of a cluster know its endpoints by their addresses, unless these hide in tunnels. */
static __always_inline bool leaves_cluster(__u32 identity, const struct config *node)
{
	switch (identity >> 24) {
	case SCOPE_NODE_LOCAL:
		return true;
	case SCOPE_REMOTE_NODE:
		return node->overlay_ifindex;
	}
	switch (identity) {
	case IDENTITY_WORLD:
	case IDENTITY_WORLD_IPV4:
		return true;
	case IDENTITY_REMOTE_NODE:
	case IDENTITY_KUBE_APISERVER:
		return node->overlay_ifindex;
	default:
		return false;
	}
}

static __always_inline bool is_excluded(__be32 destination)
{
	struct prefix4 prefix = { .prefixlen = 32, .addr = destination };

	return bpf_map_lookup_elem(&masquerade_exclude4, &prefix);
}

/* Whether the endpoint's flow that holds a port is over. */
static __always_inline bool nat_is_stale(const struct nat_key *in, const struct nat_entry *holder)
{
	struct packet pkt = {};
	struct flow flow = {};

	pkt.saddr = mapped(holder->addr);
	pkt.daddr = mapped(in->remote);
	pkt.sport = holder->port;
	pkt.dport = in->proto == IPPROTO_ICMP ? bpf_htons(ECHO_PORT) : in->remote_port;
	pkt.proto = in->proto;
	ct_key_of(&flow, &pkt);
	return !ct_fresh(&flow.key);
}

/* Makes `in` lead to `back`, if nobody's living flow has it. */
__noinline int nat_claim(const struct nat_key *in, const struct nat_entry *back)
{
	struct nat_entry *holder;

	if (!in || !back)
		return false;
	if (!bpf_map_update_elem(&nat, in, back, BPF_NOEXIST))
		return true;
	holder = bpf_map_lookup_elem(&nat, in);
	if (holder && holder->addr == back->addr && holder->port == back->port)
		return true;
	return holder && nat_is_stale(in, holder) && !bpf_map_update_elem(&nat, in, back, BPF_ANY);
}

/* The port `pkt` leaves under; 0: none was to be had. */
__noinline int nat_port(const struct packet *pkt, __be32 address, __u32 pool)
{
	__u32 first = pool & 0xffff, count = (pool >> 16) - first + 1;
	struct nat_key out = {}, in = {};
	struct nat_entry forth = {}, back = {};
	struct nat_entry *known;
	__u32 offset;

	if (!pkt)
		return 0;
	nat_key_of(&out, pkt, true);
	in = out;
	in.direction = NAT_IN;
	in.local = address;
	back.addr = out.local;
	back.port = out.port;
	known = bpf_map_lookup_elem(&nat, &out);
	if (known && known->addr == address) {
		in.port = known->port;
		if (nat_claim(&in, &back))
			return in.port;
	}
	offset = bpf_ntohs(out.port) - first;
	if (offset >= count)
		offset = bpf_get_prandom_u32() % count;
	for (int i = 0; i < PORTS_TRIED; i++) {
		in.port = bpf_htons(first + offset);
		if (nat_claim(&in, &back)) {
			forth.addr = address;
			forth.port = in.port;
			bpf_map_update_elem(&nat, &out, &forth, BPF_ANY);
			return in.port;
		}
		offset = bpf_get_prandom_u32() % count;
	}
	return 0;
}

static __always_inline __u32 check_at(__u8 proto)
{
	return proto == IPPROTO_TCP ? TCP_CHECK : proto == IPPROTO_UDP ? UDP_CHECK : ICMP_CHECK;
}

/* Writes one end's address anew in the IPv4 header at `ip`; not 0: it could not. */
static __always_inline int translate_address(struct __sk_buff *skb, __u32 ip, bool source,
					     __be32 old, __be32 new)
{
	__u32 at = source ? __builtin_offsetof(struct iphdr, saddr) :
			    __builtin_offsetof(struct iphdr, daddr);

	return bpf_l3_csum_replace(skb, ip + __builtin_offsetof(struct iphdr, check), old, new,
				   sizeof(old)) ||
	       bpf_skb_store_bytes(skb, ip + at, &new, sizeof(new), 0);
}

/* Writes one end's address and port anew, checksums included. `source`: which end. */
__noinline int translate(struct __sk_buff *skb, const struct packet *pkt,
			 const struct nat_entry *to, bool source)
{
	__u32 port_at, check;
	__be32 old_addr;
	__be16 old_port;
	__u64 flags;

	if (!pkt || !to)
		return -1;
	old_addr = source ? pkt->saddr.w[3] : pkt->daddr.w[3];
	old_port = source ? pkt->sport : pkt->dport;
	if (translate_address(skb, ETH_HLEN, source, old_addr, to->addr))
		return -1;
	if (pkt->fragment == FRAGMENT_LATER)
		return 0;
	check = pkt->l4_offset + check_at(pkt->proto);
	flags = pkt->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	if (pkt->proto != IPPROTO_ICMP &&
	    bpf_l4_csum_replace(skb, check, old_addr, to->addr,
				flags | BPF_F_PSEUDO_HDR | sizeof(old_addr)))
		return -1;
	if (bpf_l4_csum_replace(skb, check, old_port, to->port, flags | sizeof(old_port)))
		return -1;
	port_at = pkt->l4_offset +
		  (pkt->proto == IPPROTO_ICMP ? ICMP_ID : source ? 0 : sizeof(old_port));
	return bpf_skb_store_bytes(skb, port_at, &to->port, sizeof(to->port), 0);
}

/* Whether an endpoint answers somebody who asked it by its own address. */
static __always_inline bool is_answer(struct __sk_buff *skb, struct pass *pass)
{
	ct_look_up(skb, &pass->flow, &pass->pkt, false);
	return pass->flow.state == CT_REPLY || pass->flow.state == CT_RELATED;
}

/* An endpoint's packet on its way out of the node. */
__noinline int masquerade(struct __sk_buff *skb, struct pass *pass, const struct config *node)
{
	struct ipcache_entry peer;
	struct nat_entry under = {};
	int reason;

	if (!node || !pass || skb->protocol != bpf_htons(ETH_P_IP))
		return TC_ACT_OK;
	reason = parse(skb, &pass->pkt);
	pass->by[SIDE_EGRESS].ifindex = local_ifindex(&pass->pkt.saddr);
	if (!pass->by[SIDE_EGRESS].ifindex)
		return TC_ACT_OK; /* the host translated it */
	find_peer(&pass->pkt.daddr, &peer);
	if (!leaves_cluster(peer.identity, node) || is_excluded(pass->pkt.daddr.w[3]))
		return TC_ACT_OK;
	pass->dst_identity = peer.identity;
	find_peer(&pass->pkt.saddr, &peer);
	pass->src_identity = peer.identity;
	if (reason)
		return drop_at(skb, pass, SIDE_EGRESS, reason);
	if (is_answer(skb, pass))
		return TC_ACT_OK;
	switch (pass->pkt.proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
		break;
	case IPPROTO_ICMP:
		if (pass->pkt.kind == KIND_ECHO)
			break;
		/* fallthrough */
	default:
		return drop_at(skb, pass, SIDE_EGRESS, DROP_NAT_UNSUPPORTED_PROTO);
	}
	under.addr = node->node_ipv4;
	under.port = nat_port(&pass->pkt, under.addr, (__u32)node->nat_last << 16 | node->nat_first);
	if (!under.port)
		return drop_at(skb, pass, SIDE_EGRESS, DROP_NAT_NO_MAPPING);
	return translate(skb, &pass->pkt, &under, true) ? TC_ACT_SHOT : TC_ACT_OK;
}

/* An ICMP error about a masqueraded packet: what it quotes is what the sender must know it by. */
__noinline int unmasquerade_error(struct __sk_buff *skb, const struct packet *pkt)
{
	struct packet quoted = {};
	struct nat_key key = {};
	struct nat_entry to = {};
	struct nat_entry *back;
	__u8 version_length;
	__u32 inner, at;
	__be16 port;

	if (!pkt || !parse_quoted(skb, pkt, &quoted))
		return false;
	nat_key_of(&key, &quoted, true);
	key.direction = NAT_IN;
	inner = pkt->l4_offset + sizeof(struct icmp_head);
	back = bpf_map_lookup_elem(&nat, &key);
	if (!back || bpf_skb_load_bytes(skb, inner, &version_length, 1))
		return false;
	to = *back;
	port = quoted.sport;
	at = inner + (version_length & 0xf) * 4 + (quoted.proto == IPPROTO_ICMP ? ICMP_ID : 0);
	/* The quoted header's checksum makes up for its address; only the port shows in ICMP's. */
	return !translate_address(skb, inner, true, quoted.saddr.w[3], to.addr) &&
	       !bpf_l4_csum_replace(skb, pkt->l4_offset + ICMP_CHECK, port, to.port, sizeof(port)) &&
	       !bpf_skb_store_bytes(skb, at, &to.port, sizeof(to.port), 0) &&
	       !translate_address(skb, ETH_HLEN, false, pkt->daddr.w[3], to.addr);
}

/* Whether `pkt`, addressed to the node, was an answer to a masqueraded flow; then it is the
 * endpoint's now. */
__noinline int unmasquerade(struct __sk_buff *skb, const struct packet *pkt,
			    const struct config *node)
{
	struct nat_key key = {};
	struct nat_entry *back;
	struct nat_entry to;
	__u32 port;

	if (!pkt || !node || pkt->family != 4 || pkt->daddr.w[3] != node->node_ipv4)
		return false;
	if (pkt->kind == KIND_ICMP_ERROR && pkt->fragment == FRAGMENT_NONE)
		return unmasquerade_error(skb, pkt);
	port = bpf_ntohs(pkt->dport);
	if (port < node->nat_first || port > node->nat_last || pkt->kind == KIND_ECHO ||
	    pkt->kind >= KIND_ICMP_ERROR)
		return false;
	nat_key_of(&key, pkt, false);
	back = bpf_map_lookup_elem(&nat, &key);
	if (!back)
		return false;
	to = *back;
	return !translate(skb, pkt, &to, false);
}

#endif
