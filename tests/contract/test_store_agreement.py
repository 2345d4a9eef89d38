"""The memory store and etcd, given the same transactions, answer and end the same."""

from __future__ import annotations

import dataclasses

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.runtime.clock import SystemClock
from services.runtime.errors import Invalid
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.etcd import EtcdStore
from services.store.memory import MemoryStore
from services.store.model import (
    Compare,
    Delete,
    KeyValue,
    Operation,
    OperationResult,
    Put,
    Range,
    RangeResult,
    Relation,
    Revision,
    Store,
    Target,
    Txn,
    TxnResult,
)
from services.store.txn import delete_prefix
from tests.fakes.etcd import config

keys = st.sampled_from(["a", "a/1", "a/2", "b", "b/ü"])
ends = st.sampled_from([None, None, "a0", "b", "\0"])
values = st.sampled_from([b"", b"1", b"2"])

compares = st.one_of(
    st.builds(Compare, keys, st.just(Target.VALUE), st.sampled_from(Relation), values, ends),
    st.builds(
        Compare,
        keys,
        st.sampled_from([Target.CREATE, Target.VERSION]),
        st.sampled_from(Relation),
        st.sampled_from([0, 0, 1, 2]),
        ends,
    ),
)
simple = st.one_of(
    st.builds(Put, keys, values),
    st.builds(Delete, keys, ends),
    st.builds(Range, keys, ends, st.sampled_from([0, 1, 2]), st.booleans(), st.booleans()),
)


def txns(operations: st.SearchStrategy[Operation]) -> st.SearchStrategy[Txn]:
    branches = st.lists(operations, max_size=3).map(tuple)
    return st.builds(Txn, st.lists(compares, max_size=2).map(tuple), branches, branches)


scripts = st.lists(txns(st.one_of(simple, txns(simple))), min_size=1, max_size=6)


def shifted(kv: KeyValue, base: int) -> KeyValue:
    return dataclasses.replace(
        kv,
        create_revision=Revision(kv.create_revision - base),
        mod_revision=Revision(kv.mod_revision - base),
    )


def relative(result: OperationResult, base: int) -> OperationResult:
    """With revisions counted from `base`."""
    match result:
        case TxnResult(revision=revision, succeeded=succeeded, results=results):
            nested = tuple(relative(each, base) for each in results)
            return TxnResult(Revision(revision - base), succeeded, nested)
        case RangeResult(items=items, count=count):
            return RangeResult(tuple(shifted(kv, base) for kv in items), count)
        case _:
            return result


async def play(store: Store, script: list[Txn]) -> list[object]:
    await store.txn(Txn(success=(delete_prefix(""),)))
    base = await store.put("!", b"")  # before all keys that the script may name
    story: list[object] = []
    for txn in script:
        try:
            story.append(relative(await store.txn(txn), base))
        except Invalid:
            story.append(Invalid)
    story += [shifted(kv, base) for prefix in "ab" for kv in (await store.list(prefix)).items]
    return story


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=scripts)
async def test_both_stores_tell_the_same_story(
    etcd_server: EmbeddedEtcd, script: list[Txn]
) -> None:
    async with (
        MemoryStore(SystemClock()) as memory,
        EtcdStore(config(etcd_server.endpoint)) as etcd,
    ):
        assert await play(memory, script) == await play(etcd, script)
