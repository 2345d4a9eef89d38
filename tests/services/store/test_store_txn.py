from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import Invalid
from services.store.codec import txn_request
from services.store.model import Delete, Operation, Put, Range, Txn, prefix_end
from services.store.txn import absent, bulk_txn, check, check_size, delete_prefix, writes


def leaves(operations: tuple[Operation, ...]) -> Iterator[Operation]:
    for operation in operations:
        if isinstance(operation, Txn):
            yield from leaves(operation.success)
        else:
            yield operation


@given(st.text(min_size=1), st.text())
def test_a_key_is_below_a_prefix_iff_it_is_in_its_range(prefix: str, key: str) -> None:
    end = prefix_end(prefix)
    within = prefix <= key and (end == "\0" or key < end)
    assert within == key.startswith(prefix)
    if end != "\0":
        within_bytes = prefix.encode() <= key.encode() < end.encode()
        assert within_bytes == key.startswith(prefix)


def test_the_end_of_a_prefix_is_never_half_a_character() -> None:
    assert prefix_end("a/\ud7ff".encode("utf-8").decode()) == "a/\ue000"
    assert prefix_end("a\U0010ffff") == "b"
    assert prefix_end("\U0010ffff") == prefix_end("") == "\0"


@pytest.mark.parametrize("count", [0, 1, 128, 129, 4_096, 4_097, 20_000, 74_088])
def test_a_bulk_keeps_every_operation_in_order_and_within_the_limits(count: int) -> None:
    puts = tuple(Put(f"k{n}", b"") for n in range(count))
    txn = bulk_txn([absent("guard")], puts)
    assert tuple(leaves(txn.success)) == puts
    assert txn.compares == (absent("guard"),)
    check(txn)


def test_a_bulk_of_many_compares_is_still_checked() -> None:
    guards = [absent(f"g{n}") for n in range(129)]
    with pytest.raises(Invalid, match="129 operations wide"):
        check(bulk_txn(guards, [Put("a", b"")]))


def test_a_transaction_that_only_reads_is_known() -> None:
    assert not writes(Txn((absent("a"),), (Range("a"), Txn((), (Range("b"),)))))
    assert writes(Txn((), (), (Put("a", b""),)))
    assert writes(Txn((), (Txn((), (), (Delete("a"),)),)))


def test_deletes_may_overlap() -> None:
    check(Txn(success=(Delete("p/a"), delete_prefix("p/"), Delete("p/a"))))


def test_the_refusal_names_the_key() -> None:
    with pytest.raises(Invalid, match="puts key 'a' twice"):
        check(Txn(success=(Put("a", b""), Put("a", b""))))
    with pytest.raises(Invalid, match="puts and deletes key 'p/a'"):
        check(Txn(success=(Txn(success=(Put("p/a", b""),)), delete_prefix("p/"))))


def test_the_size_limit_is_that_of_one_request() -> None:
    check_size(1_572_864, "transaction")
    with pytest.raises(Invalid, match="transaction of 1572865 bytes exceeds"):
        check_size(1_572_865, "transaction")


def test_a_whole_range_starts_at_nul() -> None:
    request = txn_request(Txn(success=(delete_prefix(""),)))
    delete = request.success[0].request_delete_range
    assert (delete.key, delete.range_end) == (b"\0", b"\0")
