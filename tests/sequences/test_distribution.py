"""Distribution over histories of the store: whatever the order and however slow the reader, an
agent ends with what a snapshot of the final state says."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import pytest

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.resolve import Resolver, ResolverSettings
from services.policyd.distribute import Distributor
from services.policyd.state import State
from services.policyd.subscriber import Subscription
from services.store.model import Changed, KeyValue, Removed, Revision, Synced, WatchEvent
from tests.fakes import cluster_keys as keys
from tests.fakes.agent_view import AgentView, Held

WEB, API, DB, JOB = 1001, 1002, 1003, 1004
LABELS: dict[int, Labels] = {
    WEB: keys.pod("web"),
    API: keys.pod("api"),
    DB: keys.pod("db"),
    JOB: keys.pod("api", "batch"),
}

# One key's change: a value, or None for its removal.
Step = tuple[str, bytes | None]


def put(item: tuple[str, bytes]) -> Step:
    return item


def gone(item: tuple[str, bytes]) -> Step:
    return item[0], None


API_FROM_WEB = keys.policy(keys.allow("api", "api", "web"), 16)
API_FROM_DB = keys.policy(keys.allow("api", "api", "db", 81), 20)
DB_FROM_API = keys.policy(keys.allow("db", "db", "api"), 30)
WEB_TO_WORLD = keys.policy(keys.to_cidr("web", "web", "10.0.0.0/8", but="10.1.0.0/16"), 40)
DB_TO_PART = keys.policy(keys.to_cidr("db-out", "db", "10.0.0.0/9"), 50)
BROKEN = (keys.object_key(keys.ref("api")), b'{"manifest": ')


@dataclass(frozen=True, slots=True)
class World:
    """A policyd without its watch: steps in, agents out."""

    state: State
    distributor: Distributor

    @classmethod
    def empty(cls, log_keys: int = 200_000) -> World:
        state = State(Resolver(ResolverSettings(allow_localhost=False)))
        return cls(state, Distributor(state, log_keys=log_keys))

    def feed(self, *batch: Step) -> None:
        """One batch, each key at a revision of its own."""
        self.distributor.publish(self.state.apply(tuple(self._events(batch))))

    def list(self, content: dict[str, bytes]) -> None:
        """As at a start: everything at once, in the order of the keys."""
        events = [*self._events(sorted(content.items())), Synced(Revision(len(content)))]
        self.distributor.publish(self.state.apply(events))

    def agent(self, *identities: int) -> Agent:
        follows = [NumericIdentity(i) for i in identities]
        with self.distributor.subscribed("n1", follows) as subscription:
            pass  # stays usable: tests call take() themselves
        return Agent(subscription, AgentView(LABELS))

    def snapshot(self, *identities: int) -> Held:
        return self.agent(*identities).read().held

    def _events(self, batch: Iterable[Step]) -> Iterator[WatchEvent]:
        revision = self.state.revision
        for key, value in batch:
            revision = Revision(revision + 1)
            if value is None:
                yield Removed(key, revision)
            else:
                yield Changed(KeyValue(key, value, revision, revision, 1))


@dataclass(frozen=True, slots=True)
class Agent:
    subscription: Subscription
    view: AgentView

    def read(self) -> AgentView:
        self.view.receive(self.subscription.take())
        assert self.view.complete
        return self.view

    def interest(self, add: Sequence[int] = (), remove: Sequence[int] = ()) -> None:
        self.subscription.follow(
            [NumericIdentity(i) for i in add], [NumericIdentity(i) for i in remove]
        )


def content_after(steps: Iterable[Step]) -> dict[str, bytes]:
    content: dict[str, bytes] = {}
    for key, value in steps:
        content.pop(key, None)
        if value is not None:
            content[key] = value
    return content


# What one scenario needs to come about; every order of it is run.
ARRIVALS: dict[str, list[Step]] = {
    "address, its identity, its node and a policy": [
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.address("10.2.0.1", WEB)),
        put(keys.node("n1")),
        put(API_FROM_WEB),
        put(keys.identity(API, LABELS[API])),
    ],
    "policies that share a group": [
        put(API_FROM_WEB),
        put(DB_FROM_API),
        put(keys.identity(API, LABELS[API])),
        put(keys.identity(JOB, LABELS[JOB])),
        put(keys.address("10.2.0.2", API)),
    ],
    "prefixes within each other": [
        put(WEB_TO_WORLD),
        put(DB_TO_PART),
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.identity(DB, LABELS[DB])),
    ],
}

# Histories in the order they happen; the end state differs from the union of the steps.
HISTORIES: dict[str, list[Step]] = {
    "an identity leaves before its address": [
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.identity(API, LABELS[API])),
        put(API_FROM_WEB),
        put(keys.address("10.2.0.1", WEB)),
        gone(keys.identity(WEB, LABELS[WEB])),
        gone(keys.address("10.2.0.1", WEB)),
    ],
    "an address leaves before its identity": [
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.identity(API, LABELS[API])),
        put(API_FROM_WEB),
        put(keys.address("10.2.0.1", WEB)),
        gone(keys.address("10.2.0.1", WEB)),
        gone(keys.identity(WEB, LABELS[WEB])),
    ],
    "an identity leaves and its address stays": [
        put(keys.identity(API, LABELS[API])),
        put(DB_FROM_API),
        put(keys.identity(DB, LABELS[DB])),
        put(keys.address("10.2.0.1", API)),
        gone(keys.identity(API, LABELS[API])),
    ],
    "an address changes hands": [
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.identity(API, LABELS[API])),
        put(keys.address("10.2.0.1", WEB)),
        put(API_FROM_WEB),
        put(keys.address("10.2.0.1", API, "192.0.2.2", "q")),
    ],
    "a policy is replaced, and removed": [
        put(keys.identity(API, LABELS[API])),
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.identity(DB, LABELS[DB])),
        put(API_FROM_WEB),
        put(API_FROM_DB),
        gone(API_FROM_DB),
        put(API_FROM_WEB),
    ],
    "a group goes and comes again with other members": [
        put(keys.identity(API, LABELS[API])),
        put(keys.identity(DB, LABELS[DB])),
        put(DB_FROM_API),
        gone(DB_FROM_API),
        gone(keys.identity(API, LABELS[API])),
        put(DB_FROM_API),
        put(keys.identity(JOB, keys.pod("api"))),
    ],
    "prefixes come and go": [
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.identity(DB, LABELS[DB])),
        put(WEB_TO_WORLD),
        put(DB_TO_PART),
        gone(WEB_TO_WORLD),
        gone(DB_TO_PART),
        put(DB_TO_PART),
    ],
    "a node is renamed, and goes": [
        put(keys.node("old")),
        put(keys.identity(WEB, LABELS[WEB])),
        put(keys.address("10.2.0.1", WEB)),
        put(keys.node("new")),
        gone(keys.node("old")),
        gone(keys.node("new")),
    ],
    "a followed identity goes and comes with other labels": [
        put(API_FROM_WEB),
        put(keys.identity(API, LABELS[API])),
        gone(keys.identity(API, LABELS[API])),
        put(keys.identity(API, keys.pod("db"))),
        put(DB_FROM_API),
    ],
}

EVERYONE = (WEB, API, DB, JOB)


@pytest.mark.parametrize("name", ARRIVALS)
def test_every_order_of_arrival_ends_as_a_snapshot_does(name: str) -> None:
    scratch = World.empty()
    scratch.list(content_after(ARRIVALS[name]))
    expected = scratch.snapshot(*EVERYONE)
    for order in permutations(ARRIVALS[name]):
        world = World.empty()
        agent = world.agent(*EVERYONE)
        agent.read()
        for step in order:
            world.feed(step)
            agent.read()
        assert agent.view.held == expected, order
        assert agent.view.snapshots == 1


@pytest.mark.parametrize("follows", [EVERYONE, (API,), ()], ids=["all", "one", "none"])
@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_read_at_any_pace_ends_as_a_snapshot_does(
    name: str, follows: tuple[int, ...]
) -> None:
    """Each subset of steps after which the agent reads is a pace; batches are single steps."""
    steps = HISTORIES[name]
    scratch = World.empty()
    scratch.list(content_after(steps))
    expected = scratch.snapshot(*follows)
    every = range(1 << (len(steps) - 1))
    for pace in every if follows == EVERYONE else (0, 0b0101010, 0b1010101, every[-1]):
        world = World.empty()
        agent = world.agent(*follows)
        agent.read()
        for number, step in enumerate(steps):
            world.feed(step)
            if pace >> number & 1:
                agent.read()
        assert agent.read().held == expected, f"pace {pace:b}"
        assert world.snapshot(*follows) == expected


@pytest.mark.parametrize("name", HISTORIES)
def test_batches_of_any_size_end_as_single_steps_do(name: str) -> None:
    """A watch conflates: of the steps in one batch each key shows its last."""
    steps = HISTORIES[name]
    for cut in range(1, len(steps)):
        world = World.empty()
        agent = world.agent(*EVERYONE)
        agent.read()
        for part in (steps[:cut], steps[cut:]):
            world.feed(*dict(part).items())
            agent.read()
        scratch = World.empty()
        scratch.list(content_after(steps))
        assert agent.view.held == scratch.snapshot(*EVERYONE), f"cut at {cut}"


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_with_changing_interest_end_as_a_snapshot_does(seed: int) -> None:
    """Also a log so short that a slow agent falls out of it and starts over."""
    rng = random.Random(seed)
    items = [step for steps in ARRIVALS.values() for step in steps if step[1] is not None]
    items += [API_FROM_DB, put(keys.node("n2", "192.0.2.2")), put(keys.address("10.2.0.3", DB))]
    world = World.empty(log_keys=rng.choice([5, 200_000]))
    agents = {world.agent(API): {API}, world.agent(): set[int](), world.agent(WEB, DB): {WEB, DB}}
    content: dict[str, bytes] = {}
    for _ in range(150):
        key, value = rng.choice(items)
        assert value is not None
        if content.get(key) == value and rng.random() < 0.7:
            del content[key]
            world.feed((key, None))
        elif content.get(key) != value:
            content[key] = value
            world.feed((key, value))
        agent, follows = rng.choice(list(agents.items()))
        match rng.randrange(4):
            case 0:
                wanted = rng.choice(EVERYONE)
                follows.add(wanted)
                agent.interest(add=[wanted])
            case 1 if follows:
                unwanted = rng.choice(sorted(follows))
                follows.discard(unwanted)
                agent.interest(remove=[unwanted])
            case 2:
                agent.read()
    for agent, follows in agents.items():
        assert agent.read().held == world.snapshot(*follows)
        scratch = World.empty()
        scratch.list(content)
        assert agent.view.held == scratch.snapshot(*follows)


def test_a_slow_reader_gets_one_update_for_all_it_missed() -> None:
    world = World.empty()
    world.feed(put(DB_FROM_API), put(keys.identity(DB, LABELS[DB])))
    slow = world.agent(DB)
    slow.read()
    for number in range(2000, 2100):
        world.feed(put(keys.identity(number, keys.pod("api"))))
        world.feed(put(keys.address(f"10.3.0.{number - 2000}", number)))
    assert slow.read().updates == 2
    assert slow.view.snapshots == 1
    assert slow.view.held == world.snapshot(DB)
    assert world.distributor.counts.coalesced == 199


def test_a_reader_that_fell_out_of_the_log_starts_over() -> None:
    world = World.empty(log_keys=50)
    world.feed(put(DB_FROM_API), put(keys.identity(DB, LABELS[DB])))
    slow, steady = world.agent(DB), world.agent(DB)
    slow.read()
    steady.read()
    for number in range(2000, 2100):
        world.feed(put(keys.identity(number, keys.pod("api"))))
        steady.read()
    assert slow.read().snapshots == 2
    assert steady.view.snapshots == 1
    assert slow.view.held == steady.view.held


def test_every_change_reaches_every_agent_as_a_revision_at_least() -> None:
    world = World.empty()
    agent = world.agent()
    agent.read()
    world.feed(put(DB_FROM_API))
    assert agent.read().revision == world.state.revision == 1
    assert agent.view.held == Held()


def test_an_agent_is_told_only_what_its_identities_need() -> None:
    world = World.empty()
    world.feed(
        put(DB_FROM_API), put(API_FROM_WEB), *(put(keys.identity(*i)) for i in LABELS.items())
    )
    held = world.snapshot(DB)
    assert held.locals.keys() == {DB}
    assert [*held.selectors.values()] == [
        "app=api,k8s:io.kubernetes.pod.namespace=shop",
    ]
    assert held.rules.keys() == {30}


def test_an_identity_nobody_selects_is_answered_as_open() -> None:
    world = World.empty()
    world.feed(put(keys.identity(WEB, LABELS[WEB])))
    agent = world.agent()
    agent.read()
    agent.interest(add=[WEB])
    policy = agent.read().held.locals[WEB]
    assert not policy.ingress_enforced
    assert not policy.egress_enforced


def test_an_identity_not_seen_yet_is_answered_when_it_arrives() -> None:
    world = World.empty()
    agent = world.agent()
    agent.read()
    agent.interest(add=[WEB])
    assert agent.read().held.locals == {}
    world.feed(put(keys.identity(WEB, LABELS[WEB])))
    assert agent.read().held.locals.keys() == {WEB}


def test_an_interest_withdrawn_takes_its_groups_along() -> None:
    world = World.empty()
    world.feed(
        put(DB_FROM_API), put(API_FROM_WEB), *(put(keys.identity(*i)) for i in LABELS.items())
    )
    agent = world.agent(DB, API)
    agent.read()
    agent.interest(remove=[DB])
    assert agent.read().held == world.snapshot(API)


def test_a_snapshot_too_large_for_a_message_arrives_in_parts() -> None:
    world = World.empty()
    world.feed(*(put(keys.identity(*i)) for i in LABELS.items()))
    count = 30_000
    world.feed(
        *(put(keys.address(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", WEB)) for n in range(count))
    )
    agent = world.agent(DB)
    agent.read()
    assert agent.view.messages > 1
    assert agent.view.updates == 1
    assert len(agent.view.held.addresses) == count


def test_what_concerns_nobody_is_shared_by_all() -> None:
    world = World.empty()
    agents = [world.agent(), world.agent()]
    for agent in agents:
        agent.read()
    world.feed(put(keys.identity(WEB, LABELS[WEB])), put(keys.address("10.2.0.1", WEB)))
    first, second = (list(agent.subscription.take()) for agent in agents)
    assert first[0] is second[0]


def test_a_broken_record_leaves_the_last_good_version_in_force() -> None:
    world = World.empty()
    world.feed(put(API_FROM_WEB), put(keys.identity(API, LABELS[API])))
    before = world.snapshot(API)
    world.feed(put(BROKEN))
    assert world.snapshot(API) == before
    assert keys.ref("api") in world.state.broken
    world.feed(put(API_FROM_DB))
    assert world.state.broken == {}
    assert world.snapshot(API).rules.keys() == {20}


@pytest.mark.parametrize(
    "step",
    [
        ("tessera/policy/object/too/short", b"{}"),
        ("cilium/state/identities/v1/id/web", b"k8s:app=web;"),
        ("cilium/state/identities/v1/id/1002", b"no labels"),
        ("cilium/state/ip/v1/default/10.0.0.0.1", b"{}"),
        ("cilium/state/ip/v1/default/10.2.0.9", b'{"ID": "web"}'),
        ("cilium/state/nodes/v1/nameless", b"{}"),
        ("cilium/state/nodes/v1/default/n9", b"\xff"),
    ],
)
def test_values_that_cannot_be_read_change_nothing(step: Step) -> None:
    world = World.empty()
    world.feed(put(API_FROM_WEB), put(keys.identity(API, LABELS[API])))
    before = world.snapshot(API)
    world.feed(step)
    assert world.snapshot(API) == before
    world.feed((step[0], None))
    if step[0] != keys.identity(API, LABELS[API])[0]:
        assert world.snapshot(API) == before
