"""One suite for the kernel's tables and the ones in memory: what holds for one holds for both."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.loader import Datapath
from datapath.maps.conntrack import forget_address
from datapath.maps.flows import CtEntry, CtFlags, CtKey, CtSide
from datapath.maps.layout import (
    ConfigFlags,
    Event,
    IpcacheEntry,
    LocalEndpoint,
    NodeConfig,
    PolicyAnswer,
    PolicyPeer,
    PolicyPeerKey,
    PolicyRangeKey,
    PolicySlot,
    Prefix4,
    Verdict,
)
from datapath.maps.ring import MemoryRing
from datapath.maps.table import KernelTable
from datapath.maps.tables import Tables
from services.runtime.errors import Exhausted
from tests.fakes.kernel_node import SMALL, built_object, needs_kernel, peer


@pytest.fixture(params=["memory", pytest.param("kernel", marks=pytest.mark.kernel)])
def tables(request: pytest.FixtureRequest) -> Iterator[Tables]:
    if request.param == "memory":
        yield Tables.memory(SMALL)
        return
    needs_kernel()
    bpf_dir = Path(f"/sys/fs/bpf/tsr-test-{os.getpid()}-tables")
    datapath = Datapath.open(built_object(), bpf_dir, SMALL)
    yield datapath.tables
    datapath.cleanup()
    datapath.close()


def test_what_is_put_is_got(tables: Tables) -> None:
    rows = {address: IpcacheEntry(address + 1, 9) for address in range(1000)}
    tables.ipcache4.put_many(rows)
    assert tables.ipcache4.get(17) == IpcacheEntry(18, 9)
    assert tables.ipcache4.get(5000) is None
    assert dict(tables.ipcache4.items()) == rows
    assert tables.ipcache4.count() == 1000


def test_putting_again_replaces(tables: Tables) -> None:
    tables.local4.put_many([(1, LocalEndpoint(5)), (2, LocalEndpoint(6))])
    tables.local4.put_many({1: LocalEndpoint(7)})
    assert dict(tables.local4.items()) == {1: LocalEndpoint(7), 2: LocalEndpoint(6)}


def test_deleting_counts_what_was_there_and_ignores_the_rest(tables: Tables) -> None:
    tables.ipcache4.put_many({address: IpcacheEntry(1) for address in range(0, 100, 2)})
    assert tables.ipcache4.delete_many(range(100)) == 50
    assert tables.ipcache4.delete_many([]) == 0
    assert tables.ipcache4.delete_many([3]) == 0
    assert list(tables.ipcache4.items()) == []


def test_a_trie_of_prefixes_is_a_table_like_any_other(tables: Tables) -> None:
    rows = {Prefix4(8 + i, 10 << 24): IpcacheEntry(i) for i in range(20)}
    tables.ipcache4_prefix.put_many(rows)
    assert dict(tables.ipcache4_prefix.items()) == rows
    assert tables.ipcache4_prefix.delete_many([Prefix4(8, 10 << 24), Prefix4(9, 11 << 24)]) == 1


def test_a_trie_of_port_ranges_keeps_its_keys(tables: Tables) -> None:
    key = PolicyRangeKey(52, 6, 6, 8080)
    tables.policy_range.put_many({key: PolicyAnswer(1, 2, Verdict.ALLOW)})
    assert dict(tables.policy_range.items()) == {key: PolicyAnswer(1, 2, Verdict.ALLOW)}


def test_packed_rows_are_the_rows(tables: Tables) -> None:
    keys = [PolicyPeerKey(3, identity) for identity in range(50)]
    value = peer(Verdict.DENY, 77)
    tables.policy_peer.put_packed(b"".join(k.pack() for k in keys), value.pack() * 50, 50)
    assert dict(tables.policy_peer.items()) == dict.fromkeys(keys, value)
    tables.policy_peer.put_packed(b"", b"", 0)


def test_pages_hold_every_row_once_as_the_kernel_does(tables: Tables) -> None:
    rows = {PolicyPeerKey(2, identity): peer(Verdict.ALLOW, identity) for identity in range(20000)}
    tables.policy_peer.put_many(rows)
    found = {}
    for keys, values, count in tables.policy_peer.items_packed():
        assert (len(keys), len(values)) == (8 * count, PolicyPeer.LAYOUT.size * count)
        for at in range(count):
            key = PolicyPeerKey.unpack(keys[at * 8 : at * 8 + 8])
            size = PolicyPeer.LAYOUT.size
            found[key] = PolicyPeer.unpack(values[at * size : (at + 1) * size])
    assert found == rows
    assert not list(tables.ipcache4.items_packed())


def test_deleting_packed_counts_what_was_there_and_resets_an_array(tables: Tables) -> None:
    keys = [PolicyPeerKey(3, identity).pack() for identity in range(30)]
    tables.policy_peer.put_packed(b"".join(keys[::2]), peer(Verdict.ALLOW).pack() * 15, 15)
    assert tables.policy_peer.delete_packed(b"".join(keys), 30) == 15
    assert tables.policy_peer.delete_packed(b"", 0) == 0
    assert tables.policy_peer.count() == 0
    tables.policy_slot.put_many({7: PolicySlot(5)})
    tables.policy_slot.delete_packed((7).to_bytes(4, sys.byteorder), 1)
    assert tables.policy_slot.get(7) == PolicySlot(0)


def test_more_rows_than_one_call_carries(tables: Tables) -> None:
    rows = {PolicyPeerKey(1, identity): peer(Verdict.ALLOW) for identity in range(40000)}
    tables.policy_peer.put_many(rows)
    assert tables.policy_peer.count() == 40000
    assert dict(tables.policy_peer.items()) == rows
    assert tables.policy_peer.delete_many(rows) == 40000


def test_a_full_table_keeps_the_rows_that_fit(tables: Tables) -> None:
    with pytest.raises(Exhausted, match="raise \\[agent\\] endpoints_max"):
        tables.local4.put_many({address: LocalEndpoint(1) for address in range(1000)})
    assert tables.local4.count() == SMALL.endpoints_max


def test_every_slot_exists_and_deleting_resets_it(tables: Tables) -> None:
    assert tables.policy_slot.get(7) == PolicySlot(0)
    tables.policy_slot.put_many({7: PolicySlot(5)})
    assert tables.policy_slot.get(7) == PolicySlot(5)
    tables.policy_slot.delete_many([7])
    assert tables.policy_slot.get(7) == PolicySlot(0)


def test_flows_of_an_address_are_forgotten_and_no_others(tables: Tables) -> None:
    side = CtSide(0, 0, 1, 0, Verdict.ALLOW)
    entry = CtEntry(1, (1, 1), (9, 9), CtFlags(0), 5, 6, 0, side, side)
    rows = {CtKey((n, 100 + n % 4), (80, 4000), 6): entry for n in range(40)}
    tables.ct.put_many(rows)
    assert forget_address(tables.ct, 101) == 10
    assert {key.addr[1] for key, _ in tables.ct.items()} == {100, 102, 103}


def test_the_node_config_is_row_0(tables: Tables) -> None:
    tables.config.put_many({0: NodeConfig(ConfigFlags.TRACE, 2, 3)})
    assert tables.config.get(0) == NodeConfig(ConfigFlags.TRACE, 2, 3)
    assert tables.config.max_entries == 1


@pytest.mark.kernel
def test_without_batch_calls_rows_go_one_by_one(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(tables.ipcache4, KernelTable):
        pytest.skip("memory has no batches")
    monkeypatch.setattr("datapath.bpfcall.MAP_UPDATE_BATCH", 9999)
    monkeypatch.setattr("datapath.bpfcall.MAP_DELETE_BATCH", 9999)
    monkeypatch.setattr("datapath.bpfcall.MAP_LOOKUP_BATCH", 9999)
    rows = {address: IpcacheEntry(address) for address in range(100)}
    tables.ipcache4.put_many(rows)
    assert dict(tables.ipcache4.items()) == rows
    assert tables.ipcache4.count() == 100
    assert tables.ipcache4.delete_many(range(200)) == 100


def test_a_memory_ring_gives_the_oldest_first() -> None:
    first = Event(*[1] * 9, bytes(16), bytes(16), *[2] * 12)
    second = first._replace(time_ns=3)
    ring = MemoryRing([first])
    ring.put(second)
    assert list(ring.drain(1)) == [first]
    assert list(ring.drain(10)) == [second]
    assert not ring.drain(10)
