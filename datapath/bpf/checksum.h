/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Internet checksums (RFC 1071). */
#ifndef TESSERA_CHECKSUM_H
#define TESSERA_CHECKSUM_H

#include "packet.h"

static __always_inline __u16 fold(__u64 sum)
{
	for (int i = 0; i < 4; i++)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Of what lies below the transport header. The ends' order does not matter to a sum. */
static __always_inline __s64 pseudo_header(const struct packet *pkt, __u8 proto, __u32 length)
{
	__be32 upper[2];
	__s64 sum;

	upper[0] = bpf_htonl(length);
	upper[1] = bpf_htonl(proto);
	sum = bpf_csum_diff(0, 0, upper, sizeof(upper), 0);
	if (pkt->family == 4) {
		sum = bpf_csum_diff(0, 0, (__be32 *)&pkt->saddr.w[3], 4, sum);
		return bpf_csum_diff(0, 0, (__be32 *)&pkt->daddr.w[3], 4, sum);
	}
	sum = bpf_csum_diff(0, 0, (__be32 *)pkt->saddr.w, sizeof(pkt->saddr), sum);
	return bpf_csum_diff(0, 0, (__be32 *)pkt->daddr.w, sizeof(pkt->daddr), sum);
}

#endif
