"""What the programs answer, read from the tables in Python (datapath/bpf/policy.h)."""

from __future__ import annotations

from datapath.maps.layout import (
    SLOT_OPEN,
    PeerFlags,
    PolicyPeerKey,
    PolicyPortKey,
    PolicyRangeKey,
    Prefix4,
    Verdict,
)
from datapath.maps.tables import Tables

IDENTITY_WORLD = 2
RULE_OPEN = 1
RULE_DEFAULT_DENY = 2


def judge(tables: Tables, slot: int, identity: int, proto: int, port: int) -> tuple[Verdict, int]:
    """(verdict, rule id) of `slot` for a packet from or to `identity`."""
    if slot == SLOT_OPEN:
        return Verdict.ALLOW, RULE_OPEN
    peer = tables.policy_peer.get(PolicyPeerKey(slot, identity))
    if peer is None:
        peer = tables.policy_peer.get(PolicyPeerKey(slot, 0))
    assert peer is not None, f"slot {slot} has no row for everyone"
    answer = None
    if peer.flags & PeerFlags.HAS_PORTS:
        answer = tables.policy_port.get(PolicyPortKey(peer.class_id, port, proto))
    if answer is None and peer.flags & PeerFlags.HAS_RANGES:
        for bits in range(16, -1, -1):
            masked = port >> 16 - bits << 16 - bits
            answer = tables.policy_range.get(
                PolicyRangeKey(40 + bits, peer.class_id, proto, masked)
            )
            if answer is not None:
                break
    found = answer or peer
    if found.verdict is Verdict.NONE:
        return Verdict.NONE, RULE_DEFAULT_DENY
    return found.verdict, found.rule_id


def identity_of(tables: Tables, address: int) -> int:
    exact = tables.ipcache4.get(address)
    if exact is not None:
        return exact.identity
    for bits in range(32, -1, -1):
        masked = address >> 32 - bits << 32 - bits
        row = tables.ipcache4_prefix.get(Prefix4(bits, masked))
        if row is not None:
            return row.identity
    return IDENTITY_WORLD
