"""Which labels make an identity: set while running, alike on every replica; and the quotas."""

import asyncio
import json

import pytest

from identity import keys
from services.identityd.allocator import Allocated, Item
from services.identityd.rules import LabelRules, set_rules
from services.runtime.clock import SystemClock
from services.runtime.errors import Conflict, Exhausted, Invalid
from services.store.memory import MemoryStore
from services.store.model import Revision
from tests.fakes.identity_replica import replica, until

NAMESPACE = "k8s:io.kubernetes.pod.namespace=shop"
POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress: [{fromEndpoints: [{matchLabels: {tier: web}}]}]
"""
POLICY_KEY = "tessera/policy/object/CiliumNetworkPolicy/shop/db"


@pytest.fixture
async def store():
    async with MemoryStore(SystemClock()) as memory:
        yield memory


def policy(text=POLICY):
    return json.dumps({"manifest": text, "rule_base": 1, "rule_count": 1}).encode()


async def allocate(one, *items):
    lease = await one.open()
    return await one.allocator.allocate("node-a", lease, [Item(texts) for texts in items])


async def test_a_filter_set_while_running_holds_on_every_replica(store):
    clock = SystemClock()
    async with replica(store, clock) as one, replica(store, clock, seed=1) as other:
        before = await allocate(one, (NAMESPACE, "k8s:uid=1"), (NAMESPACE, "k8s:uid=2"))
        assert before[0].number != before[1].number
        old = one.rules.version
        revision = await set_rules(store, LabelRules(label_filter=("!uid",)), Revision(0))
        await one.rules.reached(revision)
        await other.rules.reached(revision)
        after = []
        for member in (one, other):
            after += await allocate(member, (NAMESPACE, "k8s:uid=1"), (NAMESPACE, "k8s:uid=2"))
        assert len({result.number for result in after}) == 1
        assert after[0].number not in {result.number for result in before}
        assert one.rules.version == other.rules.version != old


async def test_a_node_is_told_once_for_each_change_of_what_counts(store):
    async with replica(store, SystemClock()) as one:
        async with asyncio.timeout(5):
            first = await one.rules.news("")
            waiting = asyncio.ensure_future(one.rules.news(first))  # noqa: TID251
            # A quota changes nothing about labels.
            revision = await set_rules(store, LabelRules(namespace_quota=7), Revision(0))
            await one.rules.reached(revision)
            assert not waiting.done()
            await set_rules(store, LabelRules(label_filter=("!uid",)), revision)
            assert await waiting != first


async def test_of_two_writers_of_the_rules_the_second_is_told_to_read_first(store):
    revision = await set_rules(store, LabelRules(namespace_quota=1), Revision(0))
    with pytest.raises(Conflict, match="read them and try again"):
        await set_rules(store, LabelRules(namespace_quota=2), Revision(0))
    await set_rules(store, LabelRules(namespace_quota=2), revision)


async def test_a_filter_that_is_no_pattern_is_refused_and_nothing_written(store):
    before = store.revision
    with pytest.raises(Invalid, match="no regular expression"):
        await set_rules(store, LabelRules(label_filter=("!(",)), Revision(0))
    assert store.revision == before


async def test_rules_that_cannot_be_read_leave_the_last_ones_in_force(store):
    async with replica(store, SystemClock()) as one:
        revision = await set_rules(store, LabelRules(label_filter=("!uid",)), Revision(0))
        await one.rules.reached(revision)
        broken = await store.put(keys.RULES, b'{"label_filter": ["!("]}')
        await one.rules.reached(broken)
        assert one.rules.rules.label_filter == ("!uid",)
        await store.delete(keys.RULES)
        await until(lambda: one.rules.rules == LabelRules(), "the configuration's rules")


async def test_with_policy_relevant_only_labels_that_a_policy_selects_count(store):
    rules = LabelRules(policy_relevant=True)
    async with replica(store, SystemClock(), label_rules=rules) as one:
        full = (NAMESPACE, "k8s:app=db", "k8s:tier=web", "k8s:release=7")
        [none] = await allocate(one, full)
        assert none.labels.strings() == ("k8s:io.cilium.k8s.policy.cluster=default", NAMESPACE)
        version = one.rules.version
        await store.put(POLICY_KEY, policy())
        await one.rules.news(version)
        [some] = await allocate(one, full)
        assert {label.key for label in some.labels} >= {"app", "tier"}
        assert some.labels.get("release") is None
        version = one.rules.version
        await store.put(POLICY_KEY, policy(POLICY.replace("{app: db}", "{}")))
        await one.rules.news(version)
        assert "app" not in one.rules.relevant
        await store.delete(POLICY_KEY)
        await until(lambda: "tier" not in one.rules.relevant, "the policy is gone")
        [again] = await allocate(one, full)
        assert again.number == none.number


async def test_a_policy_that_changes_nothing_about_labels_is_no_news(store):
    async with replica(store, SystemClock(), label_rules=LabelRules(policy_relevant=True)) as one:
        await store.put(POLICY_KEY, policy())
        await until(lambda: "app" in one.rules.relevant, "the policy's keys")
        version = one.rules.version
        await store.put(POLICY_KEY.replace("/db", "/two"), policy(POLICY.replace("db}", "two}")))
        await set_rules(store, LabelRules(policy_relevant=True), Revision(0))
        await until(lambda: one.rules.revision, "the rules")
        assert one.rules.version == version


# ------------------------------------------------------------------ quotas


async def test_a_namespace_over_its_quota_is_refused_with_the_label_that_fills_it(store):
    async with replica(store, SystemClock(), label_rules=LabelRules(namespace_quota=10)) as one:
        results = await allocate(one, *((NAMESPACE, f"k8s:pod.uid={i}") for i in range(12)))
        assert sum(isinstance(result, Allocated) for result in results) == 10
        refused = next(result for result in results if isinstance(result, Exhausted))
        assert "namespace 'shop' has 10 identities and may have 10" in str(refused)
        await until(lambda: one.view.in_use == 10, "the view has seen all")
        [refused] = await allocate(one, (NAMESPACE, "k8s:pod.uid=99"))
        assert r"label 'pod.uid' alone has 10 values" in str(refused)
        assert r"label filter '!pod\.uid$'" in str(refused)


async def test_a_quota_touches_neither_other_namespaces_nor_sets_that_have_a_number(store):
    async with replica(store, SystemClock(), label_rules=LabelRules(namespace_quota=1)) as one:
        [first] = await allocate(one, (NAMESPACE, "k8s:app=a"))
        again, other, free = await allocate(
            one,
            (NAMESPACE, "k8s:app=a"),
            ("k8s:io.kubernetes.pod.namespace=bank", "k8s:app=a"),
            ("k8s:app=a",),
        )
        assert again.number == first.number
        assert isinstance(other, Allocated)
        assert isinstance(free, Allocated)


async def test_a_key_with_many_values_is_told_once(store, capsys):
    async with replica(store, SystemClock(), label_rules=LabelRules(warn_values=20)) as one:
        for start in (0, 20):
            await allocate(one, *((NAMESPACE, f"k8s:uid={start + i}") for i in range(20)))
            await until(lambda count=start + 20: one.view.in_use == count, "the view has seen all")
        await allocate(one, (NAMESPACE, "k8s:uid=more"))
        assert one.allocator.guard.warned == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "cardinality" in line]
    assert len(told) == 1
    assert "key=uid namespace=shop" in told[0]
