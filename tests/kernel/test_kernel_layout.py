"""layout.py against the built object's BTF, so that neither can drift."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import shutil
import struct
import subprocess
from typing import Any

import pytest

from datapath.maps import flows, layout
from datapath.maps.tables import CODECS, CONFIG_KEYS, Sizes
from services.flows.flow import DROP_REASONS
from services.policy import clauses
from services.runtime.config import AgentConfig
from tests.fakes.kernel_node import built_object

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def btf() -> list[dict[str, Any]]:
    if not shutil.which("bpftool"):
        pytest.skip("needs bpftool")
    command = ["bpftool", "-j", "btf", "dump", "file", str(built_object())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    types: list[dict[str, Any]] = json.loads(done.stdout)["types"]
    return types


def struct_of(btf: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [t for t in btf if t["kind"] == "STRUCT" and t["name"] == name]
    return found


def enum_of(btf: list[dict[str, Any]], name: str) -> dict[str, int]:
    (found,) = [t for t in btf if t["kind"] == "ENUM" and t["name"] == name]
    return {value["name"]: value["val"] for value in found["values"]}


# struct of abi.h, its record here, the fields in order with a distinct value each.
ROWS: list[tuple[str, Any]] = [
    (
        "endpoint",
        layout.Endpoint(
            1, 2, 3, 4, layout.EndpointFlags.READY, 0x0A000001, b"abcdef", b"ghijkl", 0xFD << 120
        ),
    ),
    ("local_endpoint", layout.LocalEndpoint(1)),
    ("prefix4", layout.Prefix4(24, 0x0A000000)),
    ("prefix6", layout.Prefix6(24, 0xFD << 120)),
    ("node", layout.Node(6)),
    ("ipcache_entry", layout.IpcacheEntry(1, 0x0A000001)),
    ("policy_slot", layout.PolicySlot(1)),
    ("policy_peer_key", layout.PolicyPeerKey(1, 2)),
    (
        "policy_peer",
        layout.PolicyPeer(
            1, 2, 3, layout.Verdict.DENY, layout.PeerFlags.HAS_RANGES, 4, layout.Verdict.ALLOW
        ),
    ),
    ("policy_port_key", layout.PolicyPortKey(1, 0x1234, 6)),
    ("policy_range_key", layout.PolicyRangeKey(56, 1, 6, 0x1234)),
    (
        "policy_answer",
        layout.PolicyAnswer(
            1, 0x1234, layout.Verdict.ALLOW, layout.PeerFlags.STAGED, 2, layout.Verdict.DENY
        ),
    ),
    ("control_key", layout.ControlKey(0xFD << 120, 22, 6, 1)),
    ("ct_key", flows.CtKey((0xFFFF0A000001, 0xFFFF0A000002), (80, 4000), 6)),
    ("nat_key", flows.NatKey(1, 2, 3, 4, 6, flows.NatDirection.IN)),
    ("nat_entry", flows.NatEntry(1, 2)),
    (
        "ct_entry",
        flows.CtEntry(
            1,
            (2, 3),
            (4, 5),
            flows.CtFlags.RST,
            6,
            7,
            0x0A000001,
            flows.CtSide(8, 9, 10, 11, layout.Verdict.ALLOW),
            flows.CtSide(12, 13, 14, 15, layout.Verdict.NONE),
        ),
    ),
    ("ct_side", flows.CtSide(1, 2, 3, 4, layout.Verdict.DENY, audited=True)),
    ("metric", layout.Metric(1, 2)),
    ("config", layout.NodeConfig(layout.ConfigFlags.TRACE, 0x0A000001, 3, 4789, 5, 6)),
]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_a_row_has_the_structs_size_and_survives_the_trip(
    btf: list[dict[str, Any]], name: str, row: Any
) -> None:
    packed = row.pack()
    assert len(packed) == struct_of(btf, name)["size"]
    assert type(row).unpack(packed) == row


# Members whose bytes a Python field of another name holds, or that are padding.
NAMES = {"last_seen": "last_seen_ns", "bytes": "octets"}


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_fields_come_in_the_structs_order_at_its_offsets(
    btf: list[dict[str, Any]], name: str, row: Any
) -> None:
    members = [m for m in struct_of(btf, name)["members"] if m["name"] != "pad"]
    fields = [field.name for field in dataclasses.fields(row)]
    if name == "ct_entry":
        assert fields[-2:] == ["ingress", "egress"]
        fields[-2:] = ["side"]
    assert [NAMES.get(m["name"], m["name"]) for m in members] == fields
    assert offsets_of(type(row).LAYOUT.format) >= {m["bits_offset"] // 8 for m in members}


def offsets_of(format_: str) -> set[int]:
    """Where each item of a struct format starts."""
    at, offsets = 0, set()
    for count, code in re.findall(r"(\d*)([A-Za-z])", format_):
        number = int(count or 1)
        if code == "s":
            offsets.add(at)
            at += number
            continue
        for _ in range(number):
            offsets.add(at)
            at += struct.calcsize("=" + code)
    return offsets


def test_the_event_record_is_the_kernels(btf: list[dict[str, Any]]) -> None:
    event = struct_of(btf, "event")
    assert layout.EVENT_LAYOUT.size == event["size"]
    names = [m["name"] for m in event["members"]]
    assert [f.removesuffix("_be") for f in layout.Event._fields] == names
    offsets = {m["bits_offset"] // 8 for m in event["members"]}
    assert offsets_of(layout.EVENT_LAYOUT.format) == offsets


@pytest.mark.parametrize(
    ("name", "prefix", "twin"),
    [
        ("verdict", "VERDICT_", layout.Verdict),
        ("endpoint_flags", "EP_", layout.EndpointFlags),
        ("peer_flags", "PEER_", layout.PeerFlags),
        ("ct_flags", "CT_", flows.CtFlags),
        ("event_type", "EVENT_", layout.EventType),
        ("match_type", "MATCH_", layout.MatchType),
        ("trace_point", "TRACE_", layout.TracePoint),
        ("event_flags", "EVENT_", layout.EventFlags),
        ("config_flags", "CONFIG_", layout.ConfigFlags),
        ("nat_direction", "NAT_", flows.NatDirection),
        ("drop_reason", "DROP_", layout.DropReason),
        ("direction", "DIR_", clauses.Direction),
    ],
)
def test_enumerators_agree(
    btf: list[dict[str, Any]], name: str, prefix: str, twin: type[enum.IntEnum]
) -> None:
    kernel = {key.removeprefix(prefix): value for key, value in enum_of(btf, name).items()}
    assert kernel == {member.name: member.value for member in twin}


def test_every_reason_has_a_name_in_flows() -> None:
    assert {reason.value for reason in layout.DropReason} <= DROP_REASONS.keys()


def test_rule_numbers_agree(btf: list[dict[str, Any]]) -> None:
    assert enum_of(btf, "reserved_rule") == {
        "RULE_NONE": clauses.RULE_NONE,
        "RULE_OPEN": clauses.RULE_OPEN,
        "RULE_DEFAULT_DENY": clauses.RULE_DEFAULT_DENY,
        "RULE_ALLOW_LOCALHOST": clauses.RULE_ALLOW_LOCALHOST,
        "RULE_DEFAULT_ALLOW": clauses.RULE_DEFAULT_ALLOW,
        "RULE_CONTROL_CHANNEL": clauses.RULE_CONTROL_CHANNEL,
        "RULE_FIRST_CLAUSE": clauses.FIRST_CLAUSE_RULE,
    }


def test_every_map_of_the_object_is_typed(btf: list[dict[str, Any]]) -> None:
    (section,) = [t for t in btf if t["kind"] == "DATASEC" and t["name"] == ".maps"]
    names = {next(t["name"] for t in btf if t["id"] == v["type_id"]) for v in section["vars"]}
    assert names == {*CODECS, "events", "fragments"}  # no table: nobody else reads fragments
    assert set(CONFIG_KEYS) <= names


def test_every_size_is_a_key_of_the_agents_configuration_with_its_default() -> None:
    config = AgentConfig()
    sizes = {field.name: getattr(Sizes(), field.name) for field in dataclasses.fields(Sizes)}
    assert {name: getattr(config, name, None) for name in sizes} == sizes
