"""Single rows of the tables after single changes."""

from __future__ import annotations

from pyroaring import BitMap

from datapath.agent.enforcement import Enforcement
from datapath.agent.view import Address, Update
from datapath.maps.layout import IpcacheEntry
from datapath.maps.tables import Sizes, Tables
from services.policy.clauses import Action, Clause, Direction, LocalPolicy, PortRange
from tests.fakes.agent_sequences import OWN, endpoint, start

TCP80, TCP81 = (PortRange(6, 80, 80),), (PortRange(6, 81, 81),)
HERE = 0x0A090000


def allow(group: int, ports: tuple[PortRange, ...], rule: int) -> Clause:
    return Clause(Direction.INGRESS, (group,), ports, Action.ALLOW, rule)


def policy(*clauses: Clause, identity: int = 300) -> LocalPolicy:
    return LocalPolicy(identity, True, False, clauses, (), ())


def revision_of(enforcement: Enforcement, tables: Tables, identity: int) -> int:
    return tables.policy_slot.get(enforcement.slot_numbers(identity)[0]).revision


def test_taking_port_rows_away_renews_every_slot_that_ever_pointed_to_them() -> None:
    """A packet may have read the peer row before it was exchanged, and find no port row now."""
    tables = Tables.memory()
    enforcement = start(tables)
    clauses = (allow(11, TCP80, 16), allow(12, TCP81, 17))
    enforcement.realise(
        [
            Update(
                1,
                groups=((11, BitMap([256])), (12, BitMap())),
                local_policies=(policy(*clauses), policy(*clauses, identity=301)),
            )
        ]
    )
    before = {i: revision_of(enforcement, tables, i) for i in (300, 301)}
    ports = dict(tables.policy_port.items())
    enforcement.realise([Update(2, groups=((12, BitMap([256])),))])  # more is allowed, nothing less
    assert not ports.keys() & dict(tables.policy_port.items()).keys()
    assert all(revision_of(enforcement, tables, i) > before[i] for i in (300, 301))


def test_a_slot_number_used_again_goes_on_counting_its_revisions() -> None:
    tables = Tables.memory(Sizes(policy_slots_max=8))
    enforcement = start(tables)
    seen: dict[int, list[int]] = {}
    for rule in range(16, 60):
        enforcement.realise([Update(rule, local_policies=(policy(allow(11, TCP80, rule)),))])
        number = enforcement.slot_numbers(300)[0]
        seen.setdefault(number, []).append(tables.policy_slot.get(number).revision)
    assert len(seen) > 2
    for revisions in seen.values():
        assert revisions == sorted(set(revisions))


def test_a_restart_goes_on_counting_and_believes_no_verdict_from_before() -> None:
    tables = Tables.memory()
    enforcement = start(tables)
    before = revision_of(enforcement, tables, 300)
    again = Enforcement(tables, enforcement.view, own_nodes=OWN)
    assert again.recover(dict(tables.endpoints.items())).rows() == 0
    assert again.slot_numbers(300) == enforcement.slot_numbers(300)
    assert revision_of(again, tables, 300) > before


def test_an_address_that_leaves_this_node_is_again_whose_the_stream_says() -> None:
    tables = Tables.memory()
    enforcement = start(tables)
    ifindex, row = endpoint(300)
    there, own = Address("10.9.0.10", 257, "n2"), Address("10.0.0.9", 258, "n2")
    assert row.ipv4 == HERE + 10
    enforcement.own_addresses([0x0A000009])
    enforcement.realise([Update(1, addresses=(there, own))])
    assert tables.ipcache4.get(row.ipv4) == IpcacheEntry(300)
    enforcement.remove_endpoint(ifindex)
    enforcement.own_addresses([])
    assert tables.ipcache4.get(row.ipv4) == IpcacheEntry(257)
    assert tables.ipcache4.get(0x0A000009) == IpcacheEntry(258)
    assert tables.local4.get(row.ipv4) is None


def test_an_endpoint_that_changes_its_identity_leaves_nothing_of_the_old_one() -> None:
    tables = Tables.memory()
    enforcement = start(tables)
    ifindex, _ = endpoint(300)
    enforcement.realise([Update(1, local_policies_removed=(300,))])
    assert enforcement.problem_of(300) is None
    _, other = endpoint(301)
    enforcement.add_endpoint(ifindex, other)
    assert enforcement.problem_of(300) is not None
    assert enforcement.slot_numbers(300) == (0, 0)
    slots = {key.slot for key, _ in tables.policy_peer.items()}
    assert slots == set(enforcement.slot_numbers(301))
