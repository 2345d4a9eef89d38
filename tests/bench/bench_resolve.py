"""Policy resolution, beside a naive implementation and at the size of large clusters.

Naive: every rule is asked about every identity, and of the clauses that match deny goes before
allow before default deny. Both judge one endpoint that all rules select, towards all identities;
rule r admits app=a(r % 100) to TCP 1000 + r.

Large clusters run in processes of their own, for their memory to be told apart.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from identity.labels import K8S, NAMESPACE_KEY, Labels
from identity.numbers import NumericIdentity
from identity.selector import Operator, Requirement, Selector
from services.policy.clauses import Action, Direction, PolicyRef, PortRange, RuleId
from services.policy.compile import compile_direction
from services.policy.groups import group_id
from services.policy.model import EndpointPeer, Policy, PolicyClause, Position, Rule, Stance
from services.policy.parse import parse
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.runtime import garbage
from tests.bench import figures

TCP = 6
FIRST = 1000
SIZES = tuple((rules, identities) for identities in (1_000, 10_000) for rules in (10, 100, 1_000))
NAIVE_SELECTORS = 50  # of 10,000: the whole takes minutes


def labels(i: int) -> Labels:
    return Labels.parse([f"k8s:app=a{i % 100}", f"k8s:pod=p{i}", f"k8s:{NAMESPACE_KEY}=ns{i % 50}"])


def crowd(count: int) -> dict[NumericIdentity, Labels]:
    return {NumericIdentity(FIRST + i): labels(i) for i in range(count)}


def has(key: str, *values: str) -> Requirement:
    return Requirement(K8S, key, Operator.IN, values)


def clause(direction: Direction, peer: Selector, *ports: PortRange) -> PolicyClause:
    peers, wanted = (EndpointPeer(peer),), ports or None
    return PolicyClause(direction, Action.ALLOW, 0, peers, wanted, Position(1, 1))


def policy(ref: PolicyRef, subject: Selector, *clauses: PolicyClause) -> Policy:
    sides = {c.direction for c in clauses}
    ingress, egress = (
        Stance.DEFAULT_DENY if side in sides else Stance.UNTOUCHED for side in Direction
    )
    return Policy(ref, (Rule(subject, False, ingress, egress, clauses),))


def rule(r: int) -> Policy:
    peer, port = Selector((has("app", f"a{r % 100}"),)), PortRange(TCP, 1000 + r, 1000 + r)
    ref = PolicyRef("CiliumClusterwideNetworkPolicy", "", f"r{r}")
    return policy(ref, Selector.EVERYTHING, clause(Direction.INGRESS, peer, port))


def resolver(identities: Mapping[NumericIdentity, Labels]) -> Resolver:
    made = Resolver(ResolverSettings())
    made.set_identities(identities)
    return made


def enter(made: Resolver, policies: list[Policy]) -> None:
    base = 16
    for each in policies:
        made.set_policy(each, RuleId(base))
        base += rule_count(each)


def seconds(do: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


# ------------------------------------------------------------------ beside the naive one

Flat = tuple[str, str, int]  # what a naive rule is: key, value, port


def naive(identities: Mapping[int, Mapping[str, str]], rules: list[Flat]) -> dict[int, list[int]]:
    opened: dict[int, list[int]] = {}
    for number, held in identities.items():
        ports = [port for key, value, port in rules if held.get(key) == value]
        if ports:
            opened[number] = ports
    return opened


def tessera(made: Resolver, policies: list[Policy]) -> int:
    """How many peers there are answers for."""
    enter(made, policies)
    compiled = compile_direction(made.local_policy(NumericIdentity(FIRST)), Direction.INGRESS)
    assert compiled is not None
    found = compiled.partition(lambda group: made.group(group).members)
    return sum(len(members) for members in found.values())


def beside_naive(rounds: int, sizes: tuple[tuple[int, int], ...]) -> None:
    for rules, count in sizes:
        identities = crowd(count)
        flat = {n: {label.key: label.value for label in held} for n, held in identities.items()}
        policies = [rule(r) for r in range(rules)]
        plain = [("app", f"a{r % 100}", 1000 + r) for r in range(rules)]
        rows: dict[str, list[float]] = {"tessera": [], "naive": []}
        for _ in range(rounds):
            made = resolver(identities)
            rows["tessera"].append(seconds(lambda: tessera(made, policies)))  # noqa: B023
            rows["naive"].append(seconds(lambda: naive(flat, plain)))  # noqa: B023
        figures.table(f"resolve {rules} rules x {count} identities, one endpoint", rows)
        if (rules, count) == sizes[-1]:
            one_identity(rounds, made, flat, plain)


def one_identity(
    rounds: int,
    made: Resolver,
    flat: Mapping[int, Mapping[str, str]],
    plain: list[Flat],
) -> None:
    number = NumericIdentity(FIRST + len(flat))
    held = {number: labels(len(flat))}
    known = {label.key: label.value for label in held[number]}

    def incremental() -> None:
        made.set_identities(held)
        made.remove_identities([number])

    def again() -> None:
        naive({**flat, number: known}, plain)
        naive(flat, plain)

    rows: dict[str, list[float]] = {"tessera": [], "naive": []}
    for n in range(rounds * 5):
        rows["tessera"].append(seconds(incremental))
        if n % 5 == 0:
            rows["naive"].append(seconds(again))
    figures.table(f"one identity added and removed at {len(flat)} x {len(plain)} rules", rows)


# ------------------------------------------------------------------ large clusters


def manifest(each: Policy) -> str:
    """A NetworkPolicy of `namespaces` or `crowded` as somebody would write it."""
    (spec,) = each.rules
    where = each.ref.namespace
    lines = [
        "apiVersion: networking.k8s.io/v1",
        "kind: NetworkPolicy",
        f"metadata:\n  name: {each.ref.name}\n  namespace: {where}",
        f"spec:\n  podSelector:{_match_labels(spec.subject, '    ')}",
        f"  policyTypes: [{', '.join(sorted({_side(c) for c in spec.clauses}))}]",
    ]
    for c in spec.clauses:
        side = "from" if c.direction is Direction.INGRESS else "to"
        (peer,) = c.peers or ()
        assert isinstance(peer, EndpointPeer)
        pods = _match_labels(peer.selector, "            ")
        lines.append(f"  {_side(c).lower()}:\n    - {side}:\n        - podSelector:{pods}")
        for port in c.ports or ():
            lines.append(f"      ports:\n        - protocol: TCP\n          port: {port.lo}")
    return "\n".join(lines) + "\n"


def _side(c: PolicyClause) -> str:
    return "Ingress" if c.direction is Direction.INGRESS else "Egress"


def _match_labels(selector: Selector, indent: str) -> str:
    own = [r for r in selector.requirements if r.key != NAMESPACE_KEY]
    entries = "".join(f"\n{indent}  {r.key}: {r.values[0]}" for r in own)
    return f"\n{indent}matchLabels:{entries}" if own else " {}"


def namespaced(name: str, namespace: str, app: str | None, *peers: str) -> Policy:
    """Peers: the first one in, the second one out."""
    here = has(NAMESPACE_KEY, namespace)
    subject = Selector((has("app", app), here) if app else (here,))
    web = PortRange(TCP, 80, 80)
    clauses = [
        clause(direction, Selector((has("app", peer), here)), web)
        for direction, peer in zip(Direction, peers, strict=False)
    ]
    return policy(PolicyRef("NetworkPolicy", namespace, name), subject, *clauses)


def pod(namespace: str, app: str) -> Labels:
    return Labels.parse([f"k8s:app={app}", f"k8s:{NAMESPACE_KEY}={namespace}"])


def namespaces(scale: int) -> tuple[dict[NumericIdentity, Labels], Iterator[Policy]]:
    """25,000 namespaces of four pods, no two alike, and three policies."""
    count = 25_000 // scale
    pods = (pod(f"ns{n}", f"a{k}") for n in range(count) for k in range(4))
    policies = (
        namespaced(f"p{k}", f"ns{n}", f"a{k}", f"a{k + 1}", f"a{(k + 2) % 4}")
        for n in range(count)
        for k in range(3)
    )
    return dict(zip(map(NumericIdentity, range(FIRST, 1 << 24)), pods, strict=False)), policies


def crowded(scale: int) -> tuple[dict[NumericIdentity, Labels], Iterator[Policy]]:
    """One namespace, 10,000 pods, no two alike; each of 10,000 policies selects all of them."""
    count = 10_000 // scale
    pods = (pod("ns0", f"a{n}") for n in range(count))
    policies = (namespaced(f"p{n}", "ns0", None, f"a{n}") for n in range(count))
    return dict(zip(map(NumericIdentity, range(FIRST, 1 << 24)), pods, strict=False)), policies


def selectors(scale: int) -> tuple[dict[NumericIdentity, Labels], Iterator[Policy]]:
    """100,000 identities; 10,000 policies, each admits peers by a selector of its own."""
    count = 10_000 // scale

    def peer(s: int) -> Selector:
        own = [f"p{10 * s + n}" for n in range(10)] if s % 2 else [f"p{10 * s}"]
        app = Requirement(K8S, "app", Operator.IN, (f"a{10 * s % 100}",))
        return Selector((has("pod", *own),) if s % 2 else (has("pod", *own), app))

    made = (
        policy(
            PolicyRef("CiliumClusterwideNetworkPolicy", "", f"s{s}"),
            Selector((has("app", f"a{s % 100}"),)),
            clause(Direction.INGRESS, peer(s)),
        )
        for s in range(count)
    )
    return crowd(100_000 // scale), made


WORKLOADS = {"namespaces": namespaces, "crowded": crowded, "selectors": selectors}
ON_A_NODE = 110  # endpoints


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def parsed(text: str) -> Policy:
    read = parse(text.encode(), "bench", "default")
    assert not read.refused, read.problems
    return read.policies[0].policy


def measure(name: str, *, with_parsing: bool, scale: int) -> dict[str, float]:
    """Runs in a child; seconds by what was done, and `MB ...`."""
    out: dict[str, float] = {}
    empty = resident_mb()
    identities, made_of = WORKLOADS[name](scale)
    policies = list(made_of)
    if with_parsing:
        texts = [manifest(each) for each in policies]
        read: list[Policy] = []
        out["parse"] = seconds(lambda: read.extend(map(parsed, texts)))
        assert [p.rules[0].subject for p in read] == [p.rules[0].subject for p in policies]
        policies = read
        del texts
    gc.collect()
    given = resident_mb()
    made = Resolver(ResolverSettings())
    cpu = time.process_time()
    with garbage.building():  # as policyd does while it reads the store's listing
        out["identities"] = seconds(lambda: made.set_identities(identities))
        out["policies"] = seconds(lambda: enter(made, policies))
    out["resolve"] = out["identities"] + out["policies"]
    out["resolve, CPU time"] = time.process_time() - cpu
    first = sorted(identities)[:ON_A_NODE]
    out["MB input"], out["MB resolver"] = given - empty, resident_mb() - given
    one = NumericIdentity(max(identities) + 1)
    same = identities[first[0]]
    out["one identity"] = statistics.median(
        seconds(lambda: (made.set_identities({one: same}), made.remove_identities([one])))
        for _ in range(5)
    )
    out["local policies of a node"] = seconds(lambda: [made.local_policy(n) for n in first])
    if name == "selectors":
        out["naive, all selectors"] = naive_selectors(identities, policies)
        peer = Selector.EVERYTHING
        for each in policies[:NAIVE_SELECTORS]:
            (wanted,) = each.rules[0].clauses[0].peers or ()
            assert isinstance(wanted, EndpointPeer)
            peer = wanted.selector
        assert list(made.group(group_id(str(peer))).members) == sorted(
            n for n, held in identities.items() if peer.matches(held)
        )
    return out


def naive_selectors(identities: Mapping[NumericIdentity, Labels], policies: list[Policy]) -> float:
    """Extrapolated from the first few selectors."""
    few = [each.rules[0].clauses[0].peers or () for each in policies[:NAIVE_SELECTORS]]
    chosen = [peer.selector for peers in few for peer in peers if isinstance(peer, EndpointPeer)]
    took = seconds(
        lambda: [{n for n, held in identities.items() if s.matches(held)} for s in chosen]
    )
    return took * len(policies) / len(chosen)


def in_child(name: str, *, with_parsing: bool, scale: int) -> dict[str, float]:
    words = [sys.executable, "-m", "tests.bench.bench_resolve", name, str(int(with_parsing))]
    done = subprocess.run([*words, str(scale)], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def large(rounds: int, scale: int) -> None:
    for name in WORKLOADS:
        for with_parsing in (False, True) if name != "selectors" else (False,):
            runs = 1 if with_parsing else rounds
            found = [in_child(name, with_parsing=with_parsing, scale=scale) for _ in range(runs)]
            how = "from manifests" if with_parsing else "from parsed policies"
            title = (WORKLOADS[name].__doc__ or name).partition("\n")[0]
            print(f"\n{title} {how}, n={runs}, 1/{scale} of it   [{figures.load()}]")
            for key in found[0]:
                middle = statistics.median(run[key] for run in found)
                memory = key.startswith("MB")
                print(f"  {key:26} {middle if memory else middle * 1000:12.3f}", end="")
                print(" MB" if memory else " ms", flush=True)


def main(
    rounds: int = 7,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    large_rounds: int = 3,
    scale: int = 1,
) -> None:
    beside_naive(rounds, sizes)
    large(large_rounds, scale)


if __name__ == "__main__":
    workload, parsing, divisor = sys.argv[1:]
    json.dump(measure(workload, with_parsing=parsing == "1", scale=int(divisor)), sys.stdout)
