from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pyroaring import BitMap

from datapath.agent import checkpoint
from datapath.agent.checkpoint import ENDPOINTS_FILE, VIEW_FILE, Damaged, Journal
from datapath.agent.keeper import Keeper
from datapath.agent.known import Remembered
from datapath.agent.record import EndpointRecord, State, identity_labels, outer_name
from datapath.agent.view import Address, Update, View
from services.policy.clauses import (
    Action,
    Clause,
    Direction,
    LocalPolicy,
    NamedPort,
    PolicyRef,
    PortRange,
    RuleSource,
    Tier,
)
from services.policy.l7 import Auth, ProxyRule
from services.runtime.clock import SystemClock

WEB = PolicyRef("CiliumNetworkPolicy", "shop", "web")
RECORD = EndpointRecord(
    3,
    "shop",
    "web",
    ("k8s:app=web",),
    "/run/netns/x",
    "eth0",
    "tes1",
    State.READY,
    300,
    0x0A000001,
    ifindex=7,
    mac=b"\x02" * 6,
    host_mac=b"\x04" * 6,
    container="c1",
    network="pods",
    mtu=1400,
    routes=("10.0.0.0/8",),
)
CLAUSE = Clause(Direction.INGRESS, (2**63 + 5,), (PortRange(6, 80, 90),), Action.DENY, 17)
L7_CLAUSE = Clause(
    Direction.EGRESS,
    (2**63 + 5,),
    (),
    Action.ALLOW,
    18,
    (NamedPort(6, "http"),),
    ProxyRule("http", ('{"path":"/"}',), ("a.example",), "t", "o", "", 7),
    Auth.SPIRE,
    Tier.ADMIN,
    3,
)


def full_view() -> View:
    view = View()
    view.apply(
        [
            Update(
                9,
                groups=((2**63 + 5, BitMap([256, 70000])),),
                local_policies=(LocalPolicy(300, True, False, (CLAUSE, L7_CLAUSE), (WEB,), ()),),
                rules=(RuleSource(17, WEB, 1, "ingressDeny[2]", 44, "keep out"),),
                addresses=(Address("10.0.0.9", 256, "n2", "shop", "db"),),
            )
        ]
    )
    return view


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    known = (Remembered(("k8s:app=web",), 300, 1.5),)
    journal = Journal(4, 77, (RECORD,), known)
    view = full_view()
    checkpoint.write(tmp_path / ENDPOINTS_FILE, checkpoint.pack_journal(journal))
    checkpoint.write(tmp_path / VIEW_FILE, checkpoint.pack_view(view))
    assert checkpoint.load_journal(tmp_path) == journal
    read = checkpoint.load_view(tmp_path)
    assert read is not None
    assert read.revision == 9
    for part in ("locals", "groups", "rules", "addresses"):
        assert getattr(read, part) == getattr(view, part)


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.load_journal(tmp_path) is None
    assert checkpoint.load_view(tmp_path) is None


@pytest.mark.parametrize("cut", [0, 5, 19, 25, -1])
def test_any_torn_file_is_noticed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / ENDPOINTS_FILE
    checkpoint.write(path, checkpoint.pack_journal(Journal(4, 77, (RECORD,))))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Damaged):
        checkpoint.read(path)


def test_any_flipped_bit_is_noticed_and_the_file_set_aside(tmp_path: Path) -> None:
    path = tmp_path / ENDPOINTS_FILE
    checkpoint.write(path, checkpoint.pack_journal(Journal(4, 77, (RECORD,))))
    whole = path.read_bytes()
    for at in range(len(whole)):
        if at in (6, 7):
            continue  # alignment, without meaning
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(Damaged):
            checkpoint.read(path)
    assert checkpoint.load_journal(tmp_path) is None
    assert (tmp_path / "endpoints.corrupt").exists()


async def test_a_burst_of_saves_ends_with_the_newest_on_disk(tmp_path: Path) -> None:
    lease = 0

    def journal() -> Journal:
        return Journal(1, lease)

    keeper = Keeper(tmp_path, journal, View(), SystemClock(), lambda: 0.0)
    async with asyncio.TaskGroup() as group:
        for number in range(1, 30):
            lease = number
            group.create_task(keeper.save())
    assert checkpoint.load_journal(tmp_path) == Journal(1, 29)


def test_the_namespace_label_is_added_once() -> None:
    own = "k8s:io.kubernetes.pod.namespace=shop"
    assert identity_labels("shop", ("k8s:app=x",)) == ("k8s:app=x", own)
    other = "k8s:io.kubernetes.pod.namespace=other"
    assert identity_labels("shop", (other,)) == (other,)


def test_an_interface_name_fits_and_differs_by_node_and_endpoint() -> None:
    names = {outer_name(n, "ns", e) for n in ("n1", "n2") for e in ("a", "b" * 250)}
    assert len(names) == 4
    assert {len(name) for name in names} == {15}
