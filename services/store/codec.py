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
    return pb.TxnRequest(
        compare=[_compare(compare) for compare in txn.compares],
        success=[_operation(operation) for operation in txn.success],
        failure=[_operation(operation) for operation in txn.failure],
    )


def txn_result(response: pb.TxnResponse, revision: Revision) -> TxnResult:
    """Nested answers carry no revision; they get the outer one's."""
    results = tuple([_result(each, revision) for each in response.responses])
    return TxnResult(revision, response.succeeded, results)


def _compare(compare: Compare) -> pb.Compare:
    message = pb.Compare(
        result=_RELATIONS[compare.relation],
        key=_start(compare.key, compare.range_end),
        range_end=_end(compare.range_end),
    )
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
    return message


def _operation(operation: Operation) -> pb.RequestOp:
    match operation:
        case Put(key=key, value=value, lease=lease):
            put = pb.PutRequest(key=key_bytes(key), value=value, lease=lease)
            return pb.RequestOp(request_put=put)
        case Delete(key=key, range_end=end):
            delete = pb.DeleteRangeRequest(key=_start(key, end), range_end=_end(end))
            return pb.RequestOp(request_delete_range=delete)
        case Range():
            return pb.RequestOp(request_range=_range(operation))
        case Txn():
            return pb.RequestOp(request_txn=txn_request(operation))


def _range(request: Range) -> pb.RangeRequest:
    return pb.RangeRequest(
        key=_start(request.key, request.range_end),
        range_end=_end(request.range_end),
        limit=request.limit,
        count_only=request.count_only,
        keys_only=request.keys_only,
    )


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
