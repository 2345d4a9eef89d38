"""Per-packet cost of the programs by number of policy peers, through BPF_PROG_TEST_RUN.

    python -m tests.bench.bench_policy_lookup

Prints, per size, the ns of a packet of a known flow and of one that is judged anew each time (an
ICMP type that is not tracked; its event is written, or lost once the ring is full). Needs root.
Figures of one run on one machine compare only with each other.
"""

from __future__ import annotations

import platform
import random
import statistics

from datapath.maps.layout import PeerFlags, PolicyPeerKey, PolicyPortKey, PolicySlot, Verdict
from tests.fakes.kernel_node import KernelNode, Workload, answer, peer
from tests.fakes.packets import ipv4_packet, udp_packet

SIZES = (10, 1_000, 16_000)
ROUNDS = 7
REPEAT = 200_000
UDP, ICMP = 17, 1
TIMESTAMP = 13
FROM_ENDPOINT = 0x100


def nanoseconds(node: KernelNode, w: Workload, packet: bytes) -> float:
    def once() -> int:
        # As if it had come from `asking` through the stack: unmarked, its source would be forged.
        done = node.run(w, packet, program="to_endpoint", mark=FROM_ENDPOINT, repeat=REPEAT)
        return done.duration_ns

    return statistics.median(once() for _ in range(ROUNDS))


def fill(node: KernelNode, peers: int, seed: int) -> None:
    rng = random.Random(seed)
    identities = rng.sample(range(256, 1 << 24), peers)
    row = peer(Verdict.NONE, class_id=5, flags=PeerFlags.HAS_PORTS)
    rows = {PolicyPeerKey(7, identity): row for identity in [*identities, 1002]}
    node.tables.policy_peer.put_many(rows)
    node.tables.policy_port.put_many(
        {
            PolicyPortKey(5, 53, UDP): answer(Verdict.ALLOW, 20),
            PolicyPortKey(5, TIMESTAMP, ICMP): answer(Verdict.ALLOW, 21),
        }
    )
    node.tables.policy_slot.put_many({7: PolicySlot(peers)})


def main() -> None:
    print(platform.release(), platform.machine(), "python", platform.python_version())
    node = KernelNode.start("bench")
    try:
        judged, asking = node.add("10.78.0.11", 1001), node.add("10.78.0.12", 1002)
        node.place(judged)
        open_slot = nanoseconds(node, judged, udp_packet(asking, judged, 4000, 53))
        print(f"no policy, known flow: {open_slot:.0f} ns")
        for peers in SIZES:
            node.reset()
            fill(node, peers, seed=peers)
            node.place(judged, slot_in=7)
            known = nanoseconds(node, judged, udp_packet(asking, judged, 4000, 53))
            anew = ipv4_packet(asking, judged, ICMP, bytes([TIMESTAMP]) + bytes(19))
            print(
                f"{peers:6} peers: known flow {known:.0f} ns, "
                f"judged anew {nanoseconds(node, judged, anew):.0f} ns"
            )
    finally:
        node.stop()


if __name__ == "__main__":
    main()
