"""Administration over real gRPC, on a memory store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tessera_wire.policy.v1 import policy_pb2 as pb

from services.policy.clauses import PolicyRef
from services.policy.parse import ParsedPolicy, parse
from services.policyd.apply import Policies
from services.policyd.records import NEXT_RULE_KEY, Held, decode, object_key
from services.runtime.clock import SystemClock
from services.runtime.errors import Invalid, Retry
from services.store.memory import MemoryStore
from tests.fakes import cluster_keys as keys
from tests.fakes.policy_agent import policy_agent
from tests.fakes.running_policyd import Running, running_policyd

API = 1002
API_KEY = keys.identity(API, keys.pod("api"))


@pytest.fixture
async def policyd(tmp_path: Path) -> AsyncIterator[Running]:
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path) as running,
    ):
        yield running


def actions(response: pb.ApplyResponse | pb.DeleteResponse) -> dict[str, str]:
    return {policy.ref.name: policy.action for policy in response.policies}


def wire_ref(name: str, namespace: str = "shop") -> pb.PolicyRef:
    return pb.PolicyRef(kind="CiliumNetworkPolicy", namespace=namespace, name=name)


async def rule_base(policyd: Running, name: str) -> int:
    kv = await policyd.store.get(object_key(keys.ref(name)))
    assert kv is not None
    return decode(kv.value).rule_base


# ------------------------------------------------------------------ apply


async def test_an_applied_policy_is_listed_with_what_was_given(policyd: Running) -> None:
    await policyd.put(API_KEY)
    manifest = "# who may reach the api\n" + keys.allow("api", "api", "web")
    applied = await policyd.apply(manifest)
    assert actions(applied) == {"api": "created"}
    (listed,) = (await policyd.list()).policies
    assert listed.manifest.decode() == manifest
    assert listed.revision == applied.revision
    assert (listed.author, listed.state, listed.selects) == ("ann", "enforced", 1)
    assert listed.applied_at.endswith("Z")


async def test_an_unchanged_document_is_not_written(policyd: Running) -> None:
    first = await policyd.apply(keys.allow("api", "api", "web"))
    before = policyd.store.revision
    again = await policyd.apply(keys.allow("api", "api", "web"))
    assert actions(again) == {"api": "unchanged"}
    assert again.revision == first.revision
    assert policyd.store.revision == before


async def test_a_changed_document_takes_fresh_rule_ids_and_its_neighbour_keeps_its(
    policyd: Running,
) -> None:
    one, two = keys.allow("one", "api", "web"), keys.allow("two", "db", "api")
    await policyd.apply(one + "---\n" + two)
    assert [await rule_base(policyd, name) for name in ("one", "two")] == [16, 17]
    applied = await policyd.apply(keys.allow("one", "api", "web", 81) + "---\n" + two)
    assert actions(applied) == {"one": "configured", "two": "unchanged"}
    assert [await rule_base(policyd, name) for name in ("one", "two")] == [18, 17]


async def test_one_bad_document_refuses_all_and_says_where(policyd: Running) -> None:
    bad = keys.allow("bad", "db", "api").replace("ingress:", "ingres:")
    answer = await policyd.apply(keys.allow("good", "api", "web") + "---\n" + bad)
    assert answer.revision == 0
    assert list(answer.policies) == []
    (problem,) = [p for p in answer.problems if p.severity == "error"]
    assert (problem.ref.name, problem.source) == ("bad", "test.yaml")
    assert problem.line > 10
    assert problem.column > 0
    assert list((await policyd.list()).policies) == []


async def test_a_dry_run_tells_what_it_would_do_and_writes_nothing(policyd: Running) -> None:
    await policyd.apply(keys.allow("one", "api", "web"))
    before = policyd.store.revision
    answer = await policyd.apply(
        keys.allow("one", "api", "db") + "---\n" + keys.allow("two", "db", "api"), dry_run=True
    )
    assert actions(answer) == {"one": "configured", "two": "created"}
    assert answer.revision == 0
    assert policyd.store.revision == before


async def test_a_document_without_a_namespace_goes_where_the_request_says(policyd: Running) -> None:
    manifest = keys.allow("api", "api", "web").replace(", namespace: shop", "")
    await policyd.apply(manifest, namespace="lab")
    await policyd.apply(manifest)
    listed = (await policyd.list()).policies
    assert [policy.ref.namespace for policy in listed] == ["default", "lab"]
    assert all(policy.state == "enforced" for policy in listed)


async def test_many_documents_are_one_revision(policyd: Running) -> None:
    many = "---\n".join(keys.allow(f"p{n}", "api", "web", 1 + n) for n in range(300))
    applied = await policyd.apply(many)
    assert len(applied.policies) == 300
    listed = (await policyd.list()).policies
    assert {policy.revision for policy in listed} == {applied.revision}


async def test_what_no_transaction_can_hold_is_refused_in_words(policyd: Running) -> None:
    quotes = "# " + '"' * 450_000 + "\n"  # each is two bytes in the record
    two = [quotes + keys.allow(name, "api", "web") for name in ("one", "two")]
    with pytest.raises(Invalid, match=r"2 policies of .* apply them in smaller groups"):
        await policyd.apply("---\n".join(two))
    assert list((await policyd.list()).policies) == []


async def test_writers_at_the_same_time_take_turns(policyd: Running) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(policyd.apply(keys.allow(f"p{n}", "api", "web"))) for n in range(6)
        ]
    assert all(task.result().revision for task in tasks)
    assert sorted([await rule_base(policyd, f"p{n}") for n in range(6)]) == [*range(16, 22)]


@dataclass(frozen=True, slots=True)
class Stale:
    """A view that goes on saying the same, whatever the store holds by now."""

    says: Held

    def held(self, refs: Iterable[PolicyRef]) -> Held:
        wanted = set(refs)
        policies = {ref: old for ref, old in self.says.policies.items() if ref in wanted}
        return Held(policies, self.says.counter)


def parsed(*names: str) -> tuple[ParsedPolicy, ...]:
    text = "---\n".join(keys.allow(name, "api", "web") for name in names)
    return parse(text.encode(), "test.yaml", "default").policies


async def test_an_out_of_date_view_gives_no_rule_id_twice_and_no_wrong_answer(
    policyd: Running,
) -> None:
    clock = SystemClock()
    empty = Policies(policyd.store, Stale(Held({}, None)), clock)
    await empty.apply(parsed("one"), "")
    await policyd.policyd.view.reached(policyd.store.revision)
    full = Policies(policyd.store, Stale(policyd.policyd.state.held([keys.ref("one")])), clock)
    assert (await empty.apply(parsed("one"), "")).applied[0].action == "unchanged"
    assert (await empty.apply(parsed("two"), "")).applied[0].action == "created"
    assert [await rule_base(policyd, name) for name in ("one", "two")] == [16, 17]
    assert [one.ref.name for one in (await empty.delete([keys.ref("one")], "")).applied] == ["one"]
    # The full view still shows it, unchanged.
    assert (await full.apply(parsed("one"), "")).applied[0].action == "created"
    assert await rule_base(policyd, "one") == 18


async def test_what_is_in_force_after_an_apply_is_what_the_stored_text_says(
    policyd: Running,
) -> None:
    """Line numbers too: those of the document as stored, wherever in a file it stood."""
    single = keys.allow("single", "api", "web")
    await policyd.apply(single)
    await policyd.apply("---\n".join(keys.allow(n, "api", "web") for n in ("one", "two")))
    await policyd.apply("---\n" + keys.allow("after", "api", "web"))
    await policyd.apply("---\n".join(keys.allow(f"p{n}", "api", "web") for n in range(200)))
    for ref, stored in policyd.policyd.state.policies.items():
        (again,) = parse(stored.record.manifest.encode(), str(ref), ref.namespace).policies
        assert stored.policy == again.policy


async def test_a_spoilt_counter_stops_writing_and_says_how_to_mend_it(policyd: Running) -> None:
    await policyd.store.put(NEXT_RULE_KEY, b"many")
    with pytest.raises(Invalid, match="set it above rule_base"):
        await policyd.apply(keys.allow("api", "api", "web"))


async def test_an_unreachable_store_is_a_reason_to_retry(policyd: Running) -> None:
    policyd.store.set_reachable(False)
    with pytest.raises(Retry):
        await policyd.apply(keys.allow("api", "api", "web"))
    policyd.store.set_reachable(True)


# ------------------------------------------------------------------ delete, list


async def test_delete_takes_what_is_there_and_reports_what_is_not(policyd: Running) -> None:
    await policyd.apply(keys.allow("one", "api", "web") + "---\n" + keys.allow("two", "db", "api"))
    answer = await policyd.delete(wire_ref("one"), wire_ref("none"), wire_ref("one"))
    assert actions(answer) == {"one": "deleted"}
    assert [ref.name for ref in answer.not_found] == ["none"]
    assert [p.ref.name for p in (await policyd.list()).policies] == ["two"]


async def test_deleting_nothing_writes_nothing(policyd: Running) -> None:
    before = policyd.store.revision
    answer = await policyd.delete(wire_ref("none"))
    assert answer.revision == 0
    assert policyd.store.revision == before


async def test_rule_ids_of_a_deleted_policy_are_not_given_again(policyd: Running) -> None:
    await policyd.apply(keys.allow("one", "api", "web"))
    await policyd.delete(wire_ref("one"))
    await policyd.apply(keys.allow("one", "api", "web"))
    assert await rule_base(policyd, "one") == 17


async def test_list_is_narrowed_by_what_is_asked(policyd: Running) -> None:
    await policyd.apply(
        keys.allow("one", "api", "web") + "---\n" + keys.allow("one", "a", "b", namespace="lab")
    )
    assert len((await policyd.list(name="one")).policies) == 2
    assert len((await policyd.list(name="one", namespace="lab")).policies) == 1
    assert len((await policyd.list(kind="NetworkPolicy")).policies) == 0


async def test_a_broken_record_is_listed_with_the_reason(policyd: Running) -> None:
    await policyd.put(API_KEY)
    applied = await policyd.apply(keys.allow("api", "api", "web"))
    await policyd.put((object_key(keys.ref("api")), b"{}"))
    revision = await policyd.put((object_key(keys.ref("new")), b"{}"))
    await policyd.policyd.view.reached(revision)
    states = {p.ref.name: p.state for p in (await policyd.list()).policies}
    assert states["api"].startswith("broken: its record in the store cannot be read")
    assert states["api"].endswith(f"its version of revision {applied.revision} stays in force")
    assert states["new"].endswith("nothing of it is in force")
    assert actions(await policyd.apply(keys.allow("api", "api", "web"))) == {"api": "configured"}
    assert actions(await policyd.delete(wire_ref("new"))) == {"new": "deleted"}
    assert [p.state for p in (await policyd.list()).policies] == ["enforced"]


# ------------------------------------------------------------------ realised


def reasons(response: pb.WaitRealisedResponse | pb.StatusResponse) -> dict[str, str]:
    return {node.node: node.reason for node in response.nodes}


async def test_waiting_ends_when_every_node_has_acknowledged(policyd: Running) -> None:
    await policyd.put(API_KEY, keys.node("n1"), keys.node("n2", "192.0.2.2"))
    async with (
        policy_agent(policyd.target, "n1", API),
        policy_agent(policyd.target, "n2") as second,
        asyncio.TaskGroup() as group,
    ):
        applied = await policyd.apply(keys.allow("api", "api", "web"))
        waiting = group.create_task(policyd.wait(applied.revision))
        await second.reached(applied.revision)
        answer = await waiting
        assert answer.done
        assert reasons(answer) == {"n1": "", "n2": ""}


async def test_at_the_deadline_the_nodes_that_have_not_are_named_with_the_reason(
    policyd: Running,
) -> None:
    ips = {"away": "192.0.2.1", "slow": "192.0.2.2", "full": "192.0.2.3", "good": "192.0.2.4"}
    await policyd.put(API_KEY, *(keys.node(name, ip) for name, ip in ips.items()))
    async with (
        policy_agent(policyd.target, "slow", acks=False) as slow,
        policy_agent(policyd.target, "full") as full,
        policy_agent(policyd.target, "good"),
    ):
        await slow.acknowledge(slow.view.revision)
        full.failures = {API: "the policy table is full"}
        applied = await policyd.apply(keys.allow("api", "api", "web"))
        answer = await policyd.wait(applied.revision, timeout_s=0.5)
        assert not answer.done
        assert reasons(answer) == {
            "away": "not connected",
            "full": f"identity {API}: the policy table is full",
            "good": "",
            "slow": f"behind, at revision {slow.view.revision}"
            if slow.view.revision < applied.revision
            else f"behind, at revision {applied.revision - 1}",
        }


async def test_a_revision_not_seen_yet_is_not_realised(policyd: Running) -> None:
    async with policy_agent(policyd.target, "n1"):
        answer = await policyd.wait(10_000, timeout_s=0.1)
    assert not answer.done
    assert "policyd itself has seen revision" in reasons(answer)["n1"]


async def test_an_acknowledgement_beyond_what_was_sent_counts_as_what_was_sent(
    policyd: Running,
) -> None:
    async with policy_agent(policyd.target, "n1", acks=False) as agent:
        await agent.acknowledge(10_000)
        revision = await policyd.put(API_KEY)
        await agent.reached(revision)
        answer = await policyd.wait(revision, timeout_s=0.1)
        assert not answer.done
        await agent.acknowledge(revision)
        assert (await policyd.wait(revision)).done


async def test_a_node_that_leaves_is_waited_for_no_longer(policyd: Running) -> None:
    revision = await policyd.put(keys.node("n1"))
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(policyd.wait(revision))
        await policyd.store.delete(keys.node("n1")[0])
        assert (await waiting).done


async def test_status_counts(policyd: Running) -> None:
    await policyd.put(API_KEY, keys.address("10.2.0.1", API), keys.address("10.2.0.2", 4321))
    await policyd.put(keys.node("n1"))
    await policyd.apply(
        keys.allow("api", "api", "web") + "---\n" + keys.to_cidr("o", "api", "10.0.0.0/8")
    )
    status = await policyd.status()
    assert (status.policies, status.identities, status.groups) == (2, 1, 2)
    # The endpoint whose identity is known, the node, the prefix.
    assert status.addresses == 3
    assert reasons(status) == {"n1": "not connected"}
