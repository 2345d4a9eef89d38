"""TCP between two workloads of one node: through our programs, through the host's stack alone, and
through what else a host filters with.

    python -m tests.bench.bench_traffic

    pair `ours`    client ── programs ── node ── programs ── server      (slots filled by hand)
    pair `bare`    client ── veth ── node's stack, routed ── veth ── server
                                     └── FORWARD: iptables, ipset, nftables

Of every list of allowed sources the client's is the last. All variants are measured once per round,
in an order that moves on by one each round; figures are medians, ratios those of each variant to
`bare` of the same round. Client and server share the processors with the packets' way.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path

from datapath.maps.layout import PeerFlags, PolicyPortKey, Verdict
from tests.bench import figures
from tests.fakes.kernel_node import SMALL, KernelNode, Workload, answer, peer
from tests.fakes.netns import Namespace

# Many short looks instead of few long ones: what else the machine does hits all variants alike.
ROUNDS = 15
MEASURES = {
    "new connections/s": ("crr", 300),
    "round trips/s": ("rr", 200),
    "Gbit/s": ("bulk", 300),
}
SCALE = {"Gbit/s": 1e9}
PORT = 8080
SLOT, CLASS = 7, 5
TCP = 6


@dataclass(frozen=True, slots=True)
class Pair:
    client: Namespace
    server: Namespace
    address: str
    """Of the server."""


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    pair: str
    apply: Callable[[], None]
    revoke: Callable[[], None]


def built() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tsr-bench-"))
    source = Path(__file__).with_name("traffic.c")
    compiler = shutil.which("cc") or shutil.which("clang-19") or "clang"
    subprocess.run([compiler, "-O2", "-Wall", "-o", folder / "traffic", source], check=True)
    return folder / "traffic"


def inside(ns: Namespace, *words: object) -> list[str]:
    return ["nice", "-n", "-19", "nsenter", f"--net={ns.path}", *map(str, words)]


@contextmanager
def served(tool: Path, ns: Namespace) -> Iterator[None]:
    argv = inside(ns, tool, "serve", PORT)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            subprocess.run(["kill", "--", f"-{server.pid}"], check=True)


def measured(tool: Path, pair: Pair, kind: str, ms: int) -> float:
    argv = inside(pair.client, tool, kind, pair.address, PORT, ms)
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30)
    return float(done.stdout)


# ------------------------------------------------------------------ the variants


class Ours:
    """The policy of the server's endpoint; 0 identities: none."""

    def __init__(self, node: KernelNode, client: Workload, server: Workload) -> None:
        self._node = node
        self._client = client
        self._server = server

    def allow(self, identities: int) -> None:
        rng = random.Random(identities)
        others = rng.sample(range(100_000, 1 << 24), identities - 1)
        row = peer(Verdict.NONE, class_id=CLASS, flags=PeerFlags.HAS_PORTS)
        rows = dict.fromkeys([*others, self._client.identity], row)
        ports = {
            PolicyPortKey(CLASS, PORT + more, TCP): answer(Verdict.ALLOW, 20) for more in range(3)
        }
        self._node.policy(SLOT, rows, ports)
        self._node.place(self._server, slot_in=SLOT)

    def open(self) -> None:
        self._node.place(self._server)
        table = self._node.tables.policy_peer
        table.delete_many([key for key, _ in table.items()])


class Filters:
    """Of the node's stack, for what is forwarded between the bare pair."""

    def __init__(self, ns: Namespace, client: str) -> None:
        self._ns = ns
        self._client = client

    def _run(self, *words: str, text: str = "") -> None:
        subprocess.run(inside(self._ns, *words), input=text, text=True, check=True)

    def _sources(self, count: int) -> list[str]:
        first = int(IPv4Address("10.200.0.1"))
        return [*(str(IPv4Address(first + number)) for number in range(count - 1)), self._client]

    def iptables(self, count: int) -> None:
        rules = [f"-A FORWARD -s {source}/32 -j ACCEPT" for source in self._sources(count)]
        self._restore(rules)

    def ipset(self, count: int) -> None:
        members = [f"add allowed {source}" for source in self._sources(count)]
        create = "create allowed hash:ip maxelem 1000000"
        self._run("ipset", "restore", text="\n".join([create, *members, ""]))
        self._restore(["-A FORWARD -m set --match-set allowed src -j ACCEPT"])

    def _restore(self, rules: Sequence[str]) -> None:
        head = ["*filter", ":FORWARD DROP [0:0]"]
        known = "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
        self._run("iptables-restore", text="\n".join([*head, known, *rules, "COMMIT", ""]))

    def nftables(self, count: int) -> None:
        elements = ", ".join(self._sources(count))
        self._run("nft", "-f", "-", text=f"""
            table ip bench {{
              set allowed {{ type ipv4_addr; elements = {{ {elements} }} }}
              chain forward {{
                type filter hook forward priority 0; policy drop;
                ct state established,related accept
                ip saddr @allowed accept
              }}
            }}""")  # fmt: skip

    def flush(self) -> None:
        self._run("iptables-restore", text="*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")
        self._run("nft", "flush", "ruleset")
        if shutil.which("ipset"):
            self._run("ipset", "destroy")


def variants(ours: Ours, filters: Filters) -> list[Variant]:
    def nothing() -> None: ...

    found = [
        Variant("bare", "bare", nothing, nothing),
        Variant("ours, open", "ours", ours.open, nothing),
    ]
    for count in (10, 1_000, 10_000):
        found.append(
            Variant(f"ours, {count:,} identities", "ours", _with(ours.allow, count), ours.open)
        )
    for count in (10, 1_000, 5_000):
        name = f"iptables, {count:,} sources"
        found.append(Variant(name, "bare", _with(filters.iptables, count), filters.flush))
    if shutil.which("ipset"):
        found.append(Variant("ipset, 5,000", "bare", _with(filters.ipset, 5_000), filters.flush))
    found.append(Variant("nft set, 5,000", "bare", _with(filters.nftables, 5_000), filters.flush))
    return found


def _with(work: Callable[[int], None], count: int) -> Callable[[], None]:
    return lambda: work(count)


# ------------------------------------------------------------------ the machine


def bare_pair(node: KernelNode, cleanup: ExitStack) -> Pair:
    made = []
    for number, subnet in enumerate(("10.79.1", "10.79.2"), 1):
        ns = Namespace.create("tsr-bench")
        cleanup.callback(ns.delete)
        outer = f"bare{number}"
        words = f"ip -n {node.ns.name} link add {outer} type veth peer name eth0 netns {ns.name}"
        subprocess.run(words.split(), check=True)
        node.ns.ip(f"addr add {subnet}.1/24 dev {outer}")
        node.ns.ip(f"link set {outer} up")
        ns.ip(f"addr add {subnet}.2/24 dev eth0")
        ns.ip("link set eth0 up")
        ns.ip(f"route add default via {subnet}.1")
        made.append(ns)
    return Pair(*made, "10.79.2.2")


def main(rounds: int = ROUNDS) -> None:
    tool = built()
    node = KernelNode.start("bench-traffic", sizes=replace(SMALL, ct_max=131072))
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, tool.parent)
        cleanup.callback(node.stop)
        client, server = node.add("10.78.0.11", 1001), node.add("10.78.0.12", 1002)
        pairs = {"ours": Pair(client.ns, server.ns, server.ip), "bare": bare_pair(node, cleanup)}
        for pair in pairs.values():
            cleanup.enter_context(served(tool, pair.server))
        chosen = variants(Ours(node, client, server), Filters(node.ns, "10.79.1.2"))
        found: dict[str, dict[str, list[float]]] = {
            measure: {variant.name: [] for variant in chosen} for measure in MEASURES
        }
        for number in range(rounds):
            for variant in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
                variant.apply()
                for measure, (kind, ms) in MEASURES.items():
                    rate = measured(tool, pairs[variant.pair], kind, ms)
                    found[measure][variant.name].append(rate / SCALE.get(measure, 1))
                variant.revoke()
        for measure, rates in found.items():
            _tell(measure, rates)


def _tell(measure: str, rates: dict[str, list[float]]) -> None:
    width = max(map(len, rates))
    print(f"\n{measure}   [{figures.load()}]\n  {'':{width}}  {'median':>10} {'ratio':>6}")
    for name, found in rates.items():
        ratios = [one / bare for one, bare in zip(found, rates["bare"], strict=True)]
        print(
            f"  {name:{width}}  {statistics.median(found):10,.2f} {statistics.median(ratios):6.2f}"
        )


if __name__ == "__main__":
    main()
