"""What a node does without identityd, and how many keys hang on one lease."""

import pytest

from datapath.agent import leases
from datapath.agent.identities import Identities
from datapath.agent.known import MOST, REMEMBER_S, Known, Remembered
from datapath.agent.leases import Leases
from datapath.agent.session import Announced, Granted
from identity.numbers import INIT
from services.runtime.errors import Exhausted, Retry
from tests.fakes.clock import FakeClock

WEB = ("k8s:app=web",)
AWAY = Retry("identityd does not answer")


class FakeSession:
    def __init__(self):
        self.connected = True
        self.error = ""
        self.fails = None
        self.announced = []

    async def allocate(self, labels, previous=0):
        if self.fails:
            raise self.fails
        return 300

    async def refer(self, sets):
        if self.fails:
            raise self.fails
        return {labels: Granted(300, 1) for labels in sets}

    async def announce(self, items):
        if self.fails:
            raise self.fails
        self.announced += items


class Node:
    def __init__(self, *, unknown_as_init=False):
        self.session, self.clock, self.used, self.owed = FakeSession(), FakeClock(), set(), []
        self.identities = Identities(
            self.session,
            Known(),
            in_use=lambda: frozenset(self.used),
            owing=lambda: self.owed.append(1),
            unknown_as_init=unknown_as_init,
            clock=self.clock,
        )


async def test_a_label_set_known_here_gets_its_number_while_identityd_is_away():
    node = Node()
    assert await node.identities.allocate(WEB) == 300
    node.session.fails = AWAY
    assert await node.identities.allocate(WEB) == 300
    # The reference and the announcement are owed, and follow.
    assert node.owed
    item = Announced("10.0.0.1", 300, "shop", "web")
    await node.identities.announce([item])
    assert node.session.announced == []
    node.session.fails = None
    await node.identities.refer({WEB: 300})
    await node.identities.announce([item])
    assert node.session.announced == [item]


async def test_a_number_that_nobody_here_has_is_forgotten_before_it_may_be_another_sets():
    node = Node()
    await node.identities.allocate(WEB)
    node.session.fails = AWAY
    await node.clock.advance(REMEMBER_S + 1)
    with pytest.raises(Retry):
        await node.identities.allocate(WEB)
    node.used.add(300)
    assert await node.identities.allocate(WEB) == 300


async def test_an_unknown_label_set_is_refused_or_init_as_configured():
    for unknown_as_init in (False, True):
        node = Node(unknown_as_init=unknown_as_init)
        node.session.fails = AWAY
        if unknown_as_init:
            assert await node.identities.allocate(WEB) == INIT
            assert node.owed
        else:
            with pytest.raises(Retry):
                await node.identities.allocate(WEB)


async def test_a_refusal_is_no_outage():
    node = Node(unknown_as_init=True)
    await node.identities.allocate(WEB)
    node.session.fails = Exhausted("no number left")
    with pytest.raises(Exhausted):
        await node.identities.allocate(WEB)


async def test_an_announcement_that_fails_is_an_error_unless_it_is_owed():
    node = Node()
    node.session.fails = AWAY
    with pytest.raises(Retry):
        await node.identities.announce([Announced("10.0.0.1", 300, "shop", "web")])


def test_only_so_many_sets_are_remembered_the_oldest_go_first():
    known = Known([Remembered((f"k8s:a={i}",), 300 + i, 0.0) for i in range(MOST)])
    known.learn(WEB, 299, 1.0)
    assert len(known.remembered) == MOST
    assert known.recall(("k8s:a=0",), frozenset(), 1.0) is None
    assert known.recall(WEB, frozenset(), 1.0) == 299


# ------------------------------------------------------------------ leases


async def test_a_lease_carries_so_many_keys_and_no_more(monkeypatch):
    monkeypatch.setattr(leases, "KEYS_PER_LEASE", 10)
    one, extra = Leases(), iter(range(101, 200))
    one.begin(100)

    async def extend():
        return next(extra)

    spread = await one.spread((f"k{i}" for i in range(25)), extend)
    assert {lease: len(keys) for lease, keys in spread.items()} == {100: 10, 101: 10, 102: 5}
    again = await one.spread(["k0", "k24", "new"], extend)
    assert again == {100: ["k0"], 102: ["k24", "new"]}
    one.drop([f"k{i}" for i in range(10)])
    assert await one.spread(["k30"], extend) == {100: ["k30"]}
    assert one.ids == (100, 101, 102)


async def test_a_new_session_knows_of_no_other_lease():
    one = Leases()
    one.begin(100)

    async def never():
        raise AssertionError("one lease is enough")

    await one.spread(["a"], never)
    one.begin(200)
    assert one.ids == (200,)
    assert await one.spread(["a"], never) == {200: ["a"]}
