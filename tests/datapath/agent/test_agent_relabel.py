"""Moving endpoints to other identities: the order of things, and what may go wrong between."""

import asyncio
from dataclasses import replace

import pytest
from tessera_wire.policy.v1 import policy_pb2

from datapath.agent.record import EndpointRecord, State
from datapath.agent.relabel import Everywhere, Relabel
from datapath.agent.session import Granted
from services.runtime.clock import SystemClock
from services.runtime.errors import Exhausted, Retry

RECORD = EndpointRecord(
    id=1,
    namespace="shop",
    name="web",
    labels=("k8s:app=web",),
    netns="/run/netns/web",
    interface="eth0",
    outer="tes1",
    state=State.READY,
    identity=300,
    address=0x0A000001,
)
OTHER = replace(RECORD, id=2, name="api", labels=("k8s:app=api",), identity=301, address=0x0A000002)


class Control:
    """The endpoints and identityd at once; notes what is asked of them, in order."""

    def __init__(self, *records):
        self._records = {record.key: record for record in records}
        self.answers = {record.labels: Granted(record.identity, 5) for record in records}
        self.done = []
        self.away = None
        self.behind = None

    @property
    def records(self):
        return tuple(self._records.values())

    async def live(self):
        if self.away:
            raise self.away

    async def at_rest(self, record):
        pass

    async def refer(self, sets):
        return {labels: self.answers[labels] for labels in sets}

    async def everywhere(self, revision):
        self.done.append(f"everywhere {revision}")
        if self.behind:
            raise self.behind

    async def move(self, record, identity):
        self.done.append(f"move {record.name} {identity}")
        self._records[record.key] = replace(record, identity=identity)
        return True

    async def announce(self, items):
        self.done.append("announce " + " ".join(f"{item.name}={item.identity}" for item in items))

    async def let_go(self, identity):
        self.done.append(f"let go {identity}")


def relabel(control):
    return Relabel(control, control, control.everywhere, SystemClock())


async def test_every_node_allows_the_new_number_before_the_endpoint_has_it():
    control = Control(RECORD, OTHER)
    control.answers[RECORD.labels] = Granted(400, 77)
    await relabel(control).once()
    assert control.done == ["everywhere 77", "move web 400", "announce web=400", "let go 300"]


async def test_where_no_number_changes_nothing_is_done():
    control = Control(RECORD, OTHER)
    await relabel(control).once()
    assert control.done == []


async def test_a_node_that_is_behind_holds_the_move_back():
    control = Control(RECORD)
    control.answers[RECORD.labels] = Granted(400, 77)
    control.behind = Retry("node b is behind")
    with pytest.raises(Retry):
        await relabel(control).once()
    assert control.done == ["everywhere 77"]
    assert control.records == (RECORD,)


async def test_an_endpoint_that_is_refused_another_number_keeps_the_one_it_has():
    control = Control(RECORD, OTHER)
    control.answers[RECORD.labels] = Exhausted("namespace 'shop' has its quota")
    control.answers[OTHER.labels] = Granted(401, 78)
    await relabel(control).once()
    assert [record.identity for record in control.records] == [300, 401]


async def test_what_is_due_while_identityd_is_away_is_done_when_it_answers():
    control = Control(RECORD)
    control.answers[RECORD.labels] = Granted(400, 77)
    control.away = Retry("no session with identityd")
    one = relabel(control)
    running = asyncio.ensure_future(one.run())  # noqa: TID251
    one.due()
    await asyncio.sleep(0)
    control.away = None
    async with asyncio.timeout(10):
        while "let go 300" not in control.done:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()


# ------------------------------------------------------------------ whether every node has it


class Replica:
    """policyd as it answers WaitRealised: (node, connected, reason)."""

    def __init__(self, *nodes):
        self.nodes = nodes

    async def WaitRealised(self, request, **_):
        if isinstance(self.nodes[0], Exception):
            raise self.nodes[0]
        states = [policy_pb2.NodeState(node=n, connected=c, reason=r) for n, c, r in self.nodes]
        return policy_pb2.WaitRealisedResponse(nodes=states)


class QuickClock(SystemClock):
    """Ten seconds pass with every look."""

    def __init__(self):
        self.now = 0.0

    def monotonic_s(self):
        self.now += 10.0
        return self.now


async def test_a_node_has_it_when_the_replica_it_is_connected_to_says_so():
    one = Replica(("a", True, ""), ("b", False, "not connected"))
    other = Replica(("a", False, "not connected"), ("b", True, ""))
    await Everywhere([one, other], QuickClock())(5)
    await Everywhere([other, one], QuickClock())(5)


async def test_a_connected_node_that_stays_behind_is_named():
    one = Replica(("a", True, ""), ("b", False, "not connected"))
    other = Replica(("a", False, "not connected"), ("b", True, "behind, at revision 4"))
    for order in ([one, other], [other, one]):
        with pytest.raises(Retry, match=r"node b does not allow .* behind, at revision 4"):
            await Everywhere(order, QuickClock())(5)


async def test_a_node_that_is_away_is_waited_for_a_while_only():
    clock = QuickClock()
    await Everywhere([Replica(("a", True, ""), ("b", False, "not connected"))], clock)(5)
    assert clock.now >= 20.0
