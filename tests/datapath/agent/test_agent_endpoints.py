"""Lifecycles on memory tables: a fake machine and control plane, no kernel."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address

import pytest

from datapath.agent.addressing import Given
from datapath.agent.endpoints import Endpoints, Wanted
from datapath.agent.enforcement import Enforcement
from datapath.agent.record import EndpointRecord, State
from datapath.agent.relabel import Relabel
from datapath.agent.session import Granted
from datapath.agent.view import Update, View
from datapath.links import Existing, VethInfo
from datapath.maps.tables import Tables
from services.policy.clauses import LocalPolicy
from services.runtime.clock import SystemClock
from services.runtime.errors import Conflict, Exhausted, Invalid, NotFound, Retry, TesseraError


class FakeIdentities:
    def __init__(self) -> None:
        self.references: set[int] = set()
        self.announced: dict[str, int] = {}
        self.numbers: dict[tuple[str, ...], int] = {}
        self.fails: dict[str, TesseraError] = {}
        self.held_back: dict[str, asyncio.Event] = {}
        self.shift = 0

    def _check(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]

    async def allocate(self, labels):
        await asyncio.sleep(0)
        self._check("allocate")
        number = self.numbers.setdefault(labels, 1000 + len(self.numbers)) + self.shift
        self.references.add(number)
        await asyncio.sleep(0)
        return number

    async def refer(self, sets):
        return {labels: Granted(await self.allocate(labels), 1) for labels in sets}

    async def live(self):
        self._check("live")

    async def release(self, identities):
        await asyncio.sleep(0)
        self._check("release")
        self.references -= set(identities)
        await asyncio.sleep(0)

    async def announce(self, items):
        self._check("announce")
        self.announced |= {item.ip: item.identity for item in items}

    async def withdraw(self, ips):
        self._check("withdraw")
        for ip in ips:
            if ip in self.held_back:
                await self.held_back[ip].wait()
            self.announced.pop(ip, None)


class FakeAddresses:
    def __init__(self) -> None:
        self.held: dict[tuple[str, str], int] = {}
        self.fails: TesseraError | None = None
        self.next = 0x0A000001

    async def allocate(self, record):
        if self.fails:
            raise self.fails
        self.next += record.key not in self.held
        return Given(self.held.setdefault(record.key, self.next))

    async def release(self, record):
        self.held.pop(record.key, None)


class FakePolicies:
    """Every wanted identity gets an open policy, unless `withheld`."""

    def __init__(self, enforcement: Enforcement) -> None:
        self.enforcement = enforcement
        self.wanted: list[int] = []
        self.withheld = False

    def want(self, identity):
        self.wanted.append(identity)

    def unwant(self, identity):
        self.wanted.remove(identity)
        if identity not in self.wanted:
            self.enforcement.realise([Update(1, local_policies_removed=(identity,))])

    async def in_force(self, identity, timeout):
        await asyncio.sleep(0)
        if self.withheld:
            raise Retry("no policy")
        policy = LocalPolicy(identity, True, True, (), (), ())
        self.enforcement.realise([Update(1, local_policies=(policy,))])


@dataclass
class FakeMachine:
    namespaces: set[str] = field(default_factory=lambda: {"a", "b", "c"})
    links: dict[str, int] = field(default_factory=dict)
    attached: set[str] = field(default_factory=set)
    up: set[str] = field(default_factory=set)
    forgotten: list[int] = field(default_factory=list)
    fails: dict[str, TesseraError] = field(default_factory=dict)
    count: int = 0

    def _check(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]

    def netns_exists(self, netns: str) -> bool:
        return netns in self.namespaces

    def create_veth(self, record: EndpointRecord, address: IPv4Address) -> VethInfo:
        self._check("create_veth")
        self.count += 1
        self.links[record.outer] = self.count
        return VethInfo(self.count, b"\x04" * 6, b"\x02" * 6)

    def find_veth(self, record: EndpointRecord) -> Existing:
        self._check("find_veth")
        self.links.setdefault("veth0", 77)
        return Existing("veth0", 77, b"\x04" * 6, b"\x02" * 6, IPv4Address("10.9.0.1"))

    def attach(self, ifindex: int, outer: str) -> None:
        self._check("attach")
        self.attached.add(outer)

    def set_up(self, record: EndpointRecord) -> None:
        self._check("set_up")
        assert record.outer in self.attached
        self.up.add(record.outer)

    def delete_veth(self, outer: str) -> bool:
        self.up.discard(outer)
        return self.links.pop(outer, None) is not None

    def detach(self, outer: str) -> None:
        self.attached.discard(outer)

    def forget_flows(self, record: EndpointRecord) -> int:
        self.forgotten.append(record.address)
        return 0


class Node:
    def __init__(self) -> None:
        self.tables = Tables.memory()
        self.enforcement = Enforcement(self.tables, View(), own_nodes=frozenset())
        self.enforcement.recover({})
        self.identities = FakeIdentities()
        self.addresses = FakeAddresses()
        self.policies = FakePolicies(self.enforcement)
        self.machine = FakeMachine()
        self.saved: tuple[EndpointRecord, ...] = ()
        self.disk: asyncio.Event | None = None
        self.endpoints = self.start()
        self.asked: list[int] = []
        self.relabel = Relabel(self.endpoints, self.identities, self._everywhere, SystemClock())

    async def _everywhere(self, revision: int) -> None:
        self.asked.append(revision)

    def start(self, records: tuple[EndpointRecord, ...] = ()) -> Endpoints:
        return Endpoints(
            node="n1",
            identities=self.identities,
            addresses=self.addresses,
            policies=self.policies,
            rows=self.enforcement,
            machine=self.machine,
            save=self._save,
            before_forgetting=lambda: None,
            on_renumbered=lambda: self.relabel.due(),
            clock=SystemClock(),
            records=records,
        )

    async def _save(self) -> None:
        noted = self.endpoints.records
        if self.disk is not None:
            await self.disk.wait()
        self.saved = noted

    def nothing_left(self) -> None:
        for table in ("endpoints", "local4", "ipcache4", "policy_peer", "policy_port"):
            assert not list(getattr(self.tables, table).items()), table
        assert not self.identities.references
        assert not self.identities.announced
        assert not self.addresses.held
        assert not self.policies.wanted
        assert not self.machine.links
        assert not self.machine.attached
        assert not self.endpoints.records
        assert not self.saved


NAMESPACE = "k8s:io.kubernetes.pod.namespace=shop"


def wanted(name: str = "x", netns: str = "a", *labels: str) -> Wanted:
    return Wanted("shop", name, labels or ("k8s:app=x",), netns, "eth0")


async def test_a_created_endpoint_is_ready_saved_announced_and_up() -> None:
    node = Node()
    made = await node.endpoints.create(wanted())
    assert made.state is State.READY
    assert node.saved == (made,)
    assert node.identities.announced == {made.ip: made.identity}
    assert node.machine.up == {made.outer}
    assert dict(node.tables.local4.items())[made.address].ifindex == made.ifindex


async def test_no_interface_is_made_before_it_is_noted_whose_it_is() -> None:
    node = Node()
    node.disk = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        creation = group.create_task(node.endpoints.create(wanted()))
        async with asyncio.timeout(5):
            while not node.identities.announced:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert not node.machine.links
        node.disk.set()
    assert node.machine.up == {creation.result().outer}


async def test_an_adopted_interface_is_judged_from_when_there_is_policy_and_stays() -> None:
    node = Node()
    made = await node.endpoints.create(replace(wanted(), adopted=True))
    assert (made.ip, made.outer, made.state) == ("10.9.0.1", "veth0", State.READY)
    assert node.machine.attached == {"veth0"}
    assert node.machine.up == set()
    assert node.identities.announced == {made.ip: made.identity}
    with pytest.raises(Conflict, match="veth0 belongs to"):
        await node.endpoints.create(replace(wanted("y", "b"), adopted=True))
    assert node.machine.attached == {"veth0"}
    await node.endpoints.delete(made.ref)
    assert node.machine.links.pop("veth0") == 77
    node.nothing_left()


@pytest.mark.parametrize("what", ["find_veth", "attach"])
async def test_an_interface_that_cannot_be_adopted_is_left_as_it_was(what: str) -> None:
    node = Node()
    node.machine.fails[what] = Invalid("x")
    with pytest.raises(Invalid):
        await node.endpoints.create(replace(wanted(), adopted=True))
    node.machine.links.pop("veth0", None)
    node.nothing_left()


async def test_a_deleted_endpoint_leaves_no_trace() -> None:
    node = Node()
    made = await node.endpoints.create(wanted())
    await node.endpoints.delete(made.ref)
    node.nothing_left()
    assert node.machine.forgotten == [made.address]


BROKEN = {
    "identity": lambda n: n.identities.fails.update(allocate=Exhausted("x")),
    "address": lambda n: setattr(n.addresses, "fails", Exhausted("x")),
    "veth": lambda n: n.machine.fails.update(create_veth=Conflict("x")),
    "programs": lambda n: n.machine.fails.update(attach=NotFound("x")),
    "policy": lambda n: setattr(n.policies, "withheld", True),
    "announcement": lambda n: n.identities.fails.update(announce=Retry("x")),
    "carrier": lambda n: n.machine.fails.update(set_up=NotFound("x")),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_whatever_fails_nothing_is_left(what: str) -> None:
    node = Node()
    BROKEN[what](node)
    with pytest.raises(TesseraError):
        await node.endpoints.create(wanted())
    node.nothing_left()


async def test_names_and_interfaces_are_taken_once() -> None:
    node = Node()
    await node.endpoints.create(wanted("x", "a"))
    with pytest.raises(Conflict, match="shop/x exists"):
        await node.endpoints.create(wanted("x", "b"))
    with pytest.raises(Conflict, match="eth0 of a belongs"):
        await node.endpoints.create(wanted("y", "a"))
    with pytest.raises(Invalid, match="no-such"):
        await node.endpoints.create(wanted("y", "no-such"))


async def test_two_creations_of_one_name_make_one() -> None:
    node = Node()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(attempt(node, "x", ns)) for ns in ("a", "b")]
    assert sorted(isinstance(t.result(), Conflict) for t in tasks) == [False, True]


async def attempt(node: Node, name: str, netns: str) -> object:
    try:
        return await node.endpoints.create(wanted(name, netns))
    except TesseraError as error:
        return error


async def test_a_shared_identity_outlives_one_of_its_endpoints() -> None:
    node = Node()
    first = await node.endpoints.create(wanted("x", "a"))
    second = await node.endpoints.create(wanted("y", "b"))
    assert first.identity == second.identity
    await node.endpoints.delete(first.ref)
    assert node.identities.references == {second.identity}
    await node.endpoints.delete(second.ref)
    node.nothing_left()


async def test_an_identity_released_and_asked_for_at_once_keeps_its_reference() -> None:
    for _ in range(20):
        node = Node()
        old = await node.endpoints.create(wanted("x", "a"))
        async with asyncio.TaskGroup() as group:
            group.create_task(node.endpoints.delete(old.ref))
            new = group.create_task(node.endpoints.create(wanted("y", "b")))
        assert node.identities.references == {new.result().identity}
        assert [r.name for r in node.endpoints.records] == ["y"]
        rows = dict(node.tables.endpoints.items())
        assert [row.ipv4 for row in rows.values()] == [new.result().address]


async def test_a_deletion_while_the_control_plane_is_away_is_finished_later() -> None:
    node = Node()
    made = await node.endpoints.create(wanted())
    node.identities.fails["withdraw"] = Retry("away")
    await node.endpoints.delete(made.ref)
    assert not list(node.tables.endpoints.items())
    assert not node.machine.links
    assert [r.state for r in node.saved] == [State.RELEASING]
    with pytest.raises(NotFound):
        node.endpoints.find(made.ref)
    node.identities.fails.clear()
    again = await node.endpoints.create(wanted("x", "b"))
    await node.endpoints.delete(again.ref)
    node.nothing_left()


async def test_what_waits_to_be_released_may_be_taken_over_while_others_are_released() -> None:
    node = Node()
    addresses = {}
    for name, netns in (("x", "a"), ("z", "c")):
        made = await node.endpoints.create(wanted(name, netns, f"k8s:app={name}"))
        addresses[name] = made.ip
        node.identities.fails["withdraw"] = Retry("away")
        await node.endpoints.delete(made.ref)
        node.identities.fails.clear()
    go_on = node.identities.held_back[addresses["x"]] = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        tidy = group.create_task(node.endpoints.tidy(lambda _: []))
        await asyncio.sleep(0)
        again = await node.endpoints.create(wanted("z", "c", "k8s:app=z"))
        await node.endpoints.delete(again.ref)
        go_on.set()
        async with asyncio.timeout(5):
            while node.endpoints.records:  # noqa: ASYNC110
                await asyncio.sleep(0)
        for _ in range(50):  # what it had before it may still be on its list
            await asyncio.sleep(0)
        tidy.cancel()
    node.nothing_left()


async def test_what_was_half_made_when_the_agent_was_killed_is_cleared() -> None:
    node = Node()
    made = await node.endpoints.create(wanted())
    half = replace(made, state=State.CREATING)
    node.enforcement.remove_endpoint(made.ifindex)
    node.policies.unwant(made.identity)
    node.endpoints = node.start((half,))
    await node.endpoints.clear_leftovers(lambda _: [])
    node.nothing_left()


async def test_an_endpoint_whose_namespace_went_away_is_cleared() -> None:
    node = Node()
    made = await node.endpoints.create(wanted())
    kept = await node.endpoints.create(wanted("y", "b"))
    del node.machine.links[made.outer]

    def vanished(records):
        return [r for r in records if r.outer not in node.machine.links]

    async with asyncio.TaskGroup() as group:
        tidy = group.create_task(node.endpoints.tidy(vanished))
        async with asyncio.timeout(5):
            while len(node.endpoints.records) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
        tidy.cancel()
    assert node.endpoints.records == (kept,)
    assert node.machine.forgotten == [made.address]


async def test_whoever_waits_for_an_endpoint_at_rest_sees_it_ready_or_gone() -> None:
    node = Node()
    async with asyncio.TaskGroup() as group:
        group.create_task(node.endpoints.create(wanted()))
        while not node.endpoints.records:  # noqa: ASYNC110
            await asyncio.sleep(0)
        (begun,) = node.endpoints.records
        assert begun.state is State.CREATING
        await node.endpoints.at_rest(begun)
        assert [r.state for r in node.endpoints.records] == [State.READY]
        group.create_task(node.endpoints.delete(begun.ref))
        await asyncio.sleep(0)
        await node.endpoints.at_rest(begun)
        node.nothing_left()


async def test_a_new_number_after_a_lost_lease_takes_over_without_a_gap() -> None:
    node = Node()
    made = await node.endpoints.create(wanted())
    node.identities.references.clear()
    node.identities.announced.clear()
    node.identities.shift = 500
    await node.endpoints.republish()
    # It keeps its number until every node knows the new one.
    assert node.endpoints.records == (made,)
    assert node.identities.announced == {}
    await node.relabel.once()
    (record,) = node.endpoints.records
    assert record.identity == made.identity + 500
    assert node.identities.references == {record.identity}
    assert node.identities.announced == {made.ip: record.identity}
    (row,) = [row for _, row in node.tables.endpoints.items()]
    assert row.identity == record.identity
    assert node.policies.wanted == [record.identity]


async def test_two_label_sets_with_one_number_keep_the_reference_until_both_are_gone() -> None:
    node = Node()
    hashes = (wanted("x", "a", "k8s:app=x", "k8s:hash=1"), wanted("y", "b", "k8s:app=x"))
    for labels in (tuple(sorted((*each.labels, NAMESPACE))) for each in hashes):
        node.identities.numbers[labels] = 1000
    one, other = [await node.endpoints.create(each) for each in hashes]
    assert one.identity == other.identity == 1000
    await node.endpoints.delete(one.ref)
    assert node.identities.references == {1000}
    await node.endpoints.delete(other.ref)
    node.nothing_left()
