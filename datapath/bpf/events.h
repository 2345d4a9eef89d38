/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What user space is told: counters for every packet, a record for every decision and drop. */
#ifndef TESSERA_EVENTS_H
#define TESSERA_EVENTS_H

#include "maps.h"
#include "packet.h"

static __always_inline struct config *config_row(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&config, &key);
}

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
	__u32 staged_rule_id;
	__u8 type;
	__u8 reason;
	__u8 verdict;
	__u8 match;
	__u8 flags;
	__u8 staged;
	__u8 point;
	__u8 pad;
};

static __always_inline void event_ports(struct event *event, const struct packet *pkt)
{
	if (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6) {
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
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		count(METRIC_LOST, 0);
		return 0;
	}
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
	event->flags = outcome->flags;
	event->staged = outcome->staged;
	event->staged_rule_id = outcome->staged_rule_id;
	event->point = outcome->point;
	event->pad = 0;
	event->length = pkt->length;
	event_ports(event, pkt);
	__builtin_memcpy(event->saddr, &pkt->saddr, sizeof(event->saddr));
	__builtin_memcpy(event->daddr, &pkt->daddr, sizeof(event->daddr));
	event->proto = pkt->proto;
	event->tcp_flags = pkt->tcp_flags;
	event->family = pkt->family;
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

#endif
