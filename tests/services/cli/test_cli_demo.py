import socket
from pathlib import Path

from services.cli.demo import evidence, scenario, traffic
from services.cli.demo.evidence import Shot
from services.cli.demo.netns import Netns
from services.cli.demo.scenario import Probe, Seen
from services.cli.demo.traffic import Sent, Station, Talk
from services.flows.flow import Flow, Judge, Party
from services.policy.parse import parse

PROBE = Probe("shop/frontend", "shop/db", 5432, "TCP", Seen.DROPPED)
HERE = Station(Netns())


def flow(verdict, direction, rule, *, port=4000, proto="TCP", to=5432):
    return Flow(
        "2026-01-02T03:04:05Z", verdict, direction,
        Party("10.0.0.1", port, 300), Party("10.0.0.2", to, 301), proto, "SYN",
        133 if verdict == "DROPPED" else 0, "POLICY_DENIED" if verdict == "DROPPED" else "",
        2, rule, Judge(1),
    )  # fmt: skip


def shot(seen, probe=PROBE, port=4000):
    return Shot(probe, Sent("10.0.0.1", port, seen), "10.0.0.2")


def test_a_drop_is_explained_by_the_flow_of_that_very_connection():
    flows = [
        flow("FORWARDED", "EGRESS", "open"),
        flow("DROPPED", "INGRESS", "default deny: selected by CiliumNetworkPolicy shop/db"),
        flow("DROPPED", "INGRESS", "another", port=4001),
    ]
    row = evidence.row(shot(Seen.DROPPED), flows)
    assert row.right
    assert row.reason == "ingress POLICY_DENIED"
    assert row.rule == "default deny: selected by CiliumNetworkPolicy shop/db"


def test_silence_without_a_recorded_drop_is_not_taken_for_one():
    row = evidence.row(shot(Seen.DROPPED), [flow("FORWARDED", "EGRESS", "open")])
    assert not row.right
    assert "EGRESS FORWARDED" in row.reason


def test_a_pass_names_the_rule_of_each_end():
    probe = Probe("shop/api", "shop/db", 5432, "TCP", Seen.FORWARDED)
    flows = [flow("FORWARDED", "INGRESS", "in"), flow("FORWARDED", "EGRESS", "out")]
    row = evidence.row(shot(Seen.FORWARDED, probe), flows)
    assert (row.right, row.rule) == (True, "out; in")
    assert row.to_dict() == {
        "from": "shop/api", "to": "shop/db", "port": 5432, "proto": "TCP", "expected": "FORWARDED",
        "seen": "FORWARDED", "reason": "egress and ingress allowed", "rule": "out; in",
    }  # fmt: skip


def test_a_connection_that_passes_against_expectation_is_wrong_however_well_explained():
    assert not evidence.row(shot(Seen.FORWARDED), [flow("FORWARDED", "EGRESS", "x")]).right


def test_an_icmp_flow_is_found_without_ports():
    probe = Probe("a", "b", 0, "ICMP", Seen.FORWARDED)
    flows = [flow("FORWARDED", "INGRESS", "ping", port=0, proto="ICMP", to=0)]
    assert evidence.row(shot(Seen.FORWARDED, probe, port=0), flows).right


async def test_tcp_and_udp_echoes_come_back_and_a_closed_port_is_refused():
    free = _free_port()
    async with traffic.listening([Station(Netns(), tcp=(free,), udp=(free,))]):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with Talk(HERE, kind) as talk:
                first = await talk.open("127.0.0.1", free, 5.0)
                again = await talk.ask(5.0)
            assert (first.seen, again.seen) == (Seen.FORWARDED, Seen.FORWARDED)
            assert first.source_ip == "127.0.0.1"
            assert first.source_port == again.source_port != 0
    with Talk(HERE, socket.SOCK_STREAM) as talk:
        assert (await talk.open("127.0.0.1", free, 5.0)).seen is Seen.REFUSED


async def test_silence_is_a_drop():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        with Talk(HERE, socket.SOCK_DGRAM) as talk:
            assert (await talk.open(*mute.getsockname(), 0.1)).seen is Seen.DROPPED


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_probe_names_somebody_who_listens_there():
    listeners = {one.ref: one for one in scenario.WORKLOADS}
    for probe in (*scenario.PROBES, scenario.STREAM):
        if probe.target == scenario.STATION:
            assert probe.port in scenario.STATION_TCP
        elif probe.proto != "ICMP":
            target = listeners[probe.target]
            assert probe.port in (target.tcp if probe.proto == "TCP" else target.udp)


def test_no_two_probes_could_be_taken_for_each_other():
    ends = [(probe.source, probe.target, probe.port, probe.proto) for probe in scenario.PROBES]
    assert len(set(ends)) == len(ends)


def test_the_manifests_are_accepted_as_an_operator_would_apply_them():
    applied = [
        (namespace, file) for namespace, files in scenario.manifests().items() for file in files
    ]
    assert len(applied) == 12
    for namespace, file in applied:
        parsed = parse(file.text, file.source, namespace)
        assert not parsed.refused, parsed.problems
        assert parsed.policies


def test_a_policy_chooses_the_namespace_it_is_applied_in():
    for namespace, files in scenario.manifests().items():
        for file in files:
            problems = parse(file.text, file.source, namespace).problems
            assert not [one for one in problems if "is not the policy's own" in one.message]


def test_the_seed_policies_are_applied_exactly_as_they_are():
    seed = Path(__file__).parents[2] / "policies" / "seed"
    ours = {file.source: file.text for files in scenario.manifests().values() for file in files}
    for path in seed.iterdir():
        assert ours[path.name] == path.read_bytes()
