"""Values of the store to etcd's messages and back.

Keys that are not UTF-8 (somebody else's) survive the way in and out by surrogate escapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tessera_wire.etcd import etcd_pb2 as pb
from tessera_wire.etcd import kv_pb2

from services.runtime.errors import Invalid
from services.store.model import (
    Compare,
    Delete,
    DeleteResult,
    KeyValue,
    LeaseId,
    Operation,
    OperationResult,
    Put,
    PutResult,
    Range,
    RangeResult,
    Relation,
    Revision,
    Target,
    Txn,
    TxnResult,
)

_RELATIONS: Final = {
    Relation.EQUAL: pb.Compare.EQUAL,
    Relation.NOT_EQUAL: pb.Compare.NOT_EQUAL,
    Relation.GREATER: pb.Compare.GREATER,
    Relation.LESS: pb.Compare.LESS,
}


def key_bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def key_text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def start_bytes(key: str) -> bytes:
    """Of a range: etcd spells "from the first key" as NUL."""
    return key_bytes(key) or b"\0"


def key_value(kv: kv_pb2.KeyValue) -> KeyValue:
    return KeyValue(
        key_text(kv.key),
        kv.value,
        Revision(kv.create_revision),
        Revision(kv.mod_revision),
        kv.version,
        LeaseId(kv.lease),
    )


def key_values(kvs: Iterable[kv_pb2.KeyValue]) -> tuple[KeyValue, ...]:
    return tuple([key_value(kv) for kv in kvs])


def txn_request(txn: Txn) -> pb.TxnRequest:
    request = pb.TxnRequest()
    _fill(request, txn)
    return request


def _fill(request: pb.TxnRequest, txn: Txn) -> None:
    """In place: a message handed to another one's constructor is copied, at every level again."""
    for compare in txn.compares:
        _compare(request.compare.add(), compare)
    for operation in txn.success:
        _operation(request.success.add(), operation)
    for operation in txn.failure:
        _operation(request.failure.add(), operation)


def txn_result(response: pb.TxnResponse, revision: Revision) -> TxnResult:
    """Nested answers carry no revision; they get the outer one's."""
    results = tuple([_result(each, revision) for each in response.responses])
    return TxnResult(revision, response.succeeded, results)


def _compare(message: pb.Compare, compare: Compare) -> None:
    message.result = _RELATIONS[compare.relation]
    message.key = _start(compare.key, compare.range_end)
    message.range_end = _end(compare.range_end)
    match compare.target, compare.operand:
        case Target.CREATE, int(revision):
            message.target = pb.Compare.CREATE
            message.create_revision = revision
        case Target.MOD, int(revision):
            message.target = pb.Compare.MOD
            message.mod_revision = revision
        case Target.VERSION, int(version):
            message.target = pb.Compare.VERSION
            message.version = version
        case Target.VALUE, bytes(value):
            message.target = pb.Compare.VALUE
            message.value = value
        case target, operand:
            raise Invalid(f"{target.value} of {compare.key!r} compared with {operand!r}")


def _operation(message: pb.RequestOp, operation: Operation) -> None:
    match operation:
        case Put():
            put = message.request_put
            put.key = key_bytes(operation.key)
            put.value = operation.value
            put.lease = operation.lease
        case Delete():
            delete = message.request_delete_range
            delete.key = _start(operation.key, operation.range_end)
            delete.range_end = _end(operation.range_end)
        case Range():
            _range(message.request_range, operation)
        case Txn():
            # Touched first: an empty transaction must still be the one that is set.
            message.request_txn.SetInParent()
            _fill(message.request_txn, operation)


def _range(message: pb.RangeRequest, request: Range) -> None:
    message.key = _start(request.key, request.range_end)
    message.range_end = _end(request.range_end)
    message.limit = request.limit
    message.count_only = request.count_only
    message.keys_only = request.keys_only


def _result(response: pb.ResponseOp, revision: Revision) -> OperationResult:
    match response.WhichOneof("response"):
        case "response_put":
            return PutResult()
        case "response_range":
            answer = response.response_range
            return RangeResult(key_values(answer.kvs), answer.count)
        case "response_delete_range":
            return DeleteResult(response.response_delete_range.deleted)
        case _:
            return txn_result(response.response_txn, revision)


def _start(key: str, range_end: str | None) -> bytes:
    return key_bytes(key) if range_end is None else start_bytes(key)


def _end(range_end: str | None) -> bytes:
    return b"" if range_end is None else key_bytes(range_end)
