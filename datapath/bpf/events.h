/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What user space is told: counters for every packet, a record for every decision and drop. */
#ifndef TESSERA_EVENTS_H
#define TESSERA_EVENTS_H

#include "maps.h"
#include "parse.h"

static __always_inline void count(__u32 key, __u32 bytes)
{
	struct metric *metric = bpf_map_lookup_elem(&metrics, &key);

	if (!metric)
		return;
	metric->packets++; /* per CPU, and a program is not interrupted by itself */
	metric->bytes += bytes;
}

static __always_inline void count_packet(struct __sk_buff *skb, __u32 reason, __u32 direction)
{
	count(reason * 2 + direction - 1, skb->len);
}

/* Who talks to whom at which judge; what an event says besides the packet itself. */
struct scene {
	__u32 endpoint;
	__u32 src_identity;
	__u32 dst_identity;
	__u32 direction;
};

struct outcome {
	__u32 rule_id;
	__u8 type;
	__u8 reason;
	__u8 verdict;
	__u8 match;
};

static __always_inline struct event *event_reserve(void)
{
	struct event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event)
		count(METRIC_LOST, 0);
	return event;
}

static __always_inline void event_ports(struct event *event, const struct packet *pkt)
{
	if (pkt->family == 4 && pkt->proto == IPPROTO_ICMP) {
		event->sport = bpf_htons(pkt->icmp_type);
		event->dport = bpf_htons(pkt->icmp_code);
	} else {
		event->sport = pkt->sport;
		event->dport = pkt->dport;
	}
}

/* The reader drains on a timer: waking it per record costs more than the record. */
__noinline int emit(const struct packet *pkt, const struct scene *scene,
		    const struct outcome *outcome)
{
	struct event *event;

	if (!pkt || !scene || !outcome)
		return 0;
	event = event_reserve();
	if (!event)
		return 0;
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->endpoint = scene->endpoint;
	event->src_identity = scene->src_identity;
	event->dst_identity = scene->dst_identity;
	event->direction = scene->direction;
	event->rule_id = outcome->rule_id;
	event->type = outcome->type;
	event->reason = outcome->reason;
	event->verdict = outcome->verdict;
	event->match = outcome->match;
	event->length = pkt->length;
	event_ports(event, pkt);
	__builtin_memcpy(event->saddr, &pkt->saddr, sizeof(pkt->saddr));
	__builtin_memcpy(event->daddr, &pkt->daddr, sizeof(pkt->daddr));
	event->proto = pkt->proto;
	event->tcp_flags = pkt->tcp_flags;
	event->family = pkt->family;
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

static __always_inline int drop(struct __sk_buff *skb, const struct packet *pkt,
				const struct scene *scene, __u8 reason, __u32 rule_id,
				__u8 verdict)
{
	struct outcome outcome = {
		.type = EVENT_DROP,
		.reason = reason,
		.rule_id = rule_id,
		.verdict = verdict,
	};

	count_packet(skb, reason, scene->direction);
	emit(pkt, scene, &outcome);
	return TC_ACT_SHOT;
}

/* IPv6 is not spoken yet. Neighbour and router discovery is frequent and nobody's fault: counted,
 * not reported. */
__noinline int drop_ipv6(struct __sk_buff *skb, const struct scene *scene)
{
	struct ipv6hdr ip = {};
	struct event *event;

	if (!scene)
		return TC_ACT_SHOT;
	count_packet(skb, DROP_UNSUPPORTED_L3, scene->direction);
	bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip));
	if (ip.daddr.in6_u.u6_addr8[0] == 0xff)
		return TC_ACT_SHOT;
	event = event_reserve();
	if (!event)
		return TC_ACT_SHOT;
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->endpoint = scene->endpoint;
	event->src_identity = scene->src_identity;
	event->dst_identity = scene->dst_identity;
	event->direction = scene->direction;
	event->type = EVENT_DROP;
	event->reason = DROP_UNSUPPORTED_L3;
	event->length = skb->len - ETH_HLEN;
	__builtin_memcpy(event->saddr, &ip.saddr, sizeof(event->saddr));
	__builtin_memcpy(event->daddr, &ip.daddr, sizeof(event->daddr));
	event->proto = ip.nexthdr;
	event->family = 6;
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return TC_ACT_SHOT;
}

#endif
