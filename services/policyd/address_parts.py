"""The addresses as they are sent: encoded one by one, divided into buckets, digested along the way.

A bucket is what is compared and sent anew when an agent's addresses are not what they should be
(services/wire/held.py). After a change only its bucket is joined again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tessera_wire.policy.v1.policy_pb2 import Address, Update

from services.policyd.addresses import Row
from services.wire.held import BUCKETS, bucket_of, digest_of_address, total


@dataclass(frozen=True, slots=True)
class _Encoded:
    part: bytes
    digest: int


class AddressParts:
    def __init__(self) -> None:
        self._buckets: list[dict[str, _Encoded]] = [{} for _ in range(BUCKETS)]
        self._joined: list[bytes | None] = [b""] * BUCKETS
        self._digests = [0] * BUCKETS
        self._total: int | None = 0

    @property
    def digest(self) -> int:
        """Of all of them."""
        if self._total is None:
            self._total = total(self._digests)
        return self._total

    def put(self, row: Row) -> None:
        where = self._take(row.cidr)
        message = Address(
            cidr=row.cidr,
            identity=row.identity,
            node=row.node,
            namespace=row.namespace,
            name=row.name,
        )
        digest = digest_of_address(row.cidr, row.identity, row.node, row.namespace, row.name)
        part = Update(addresses=(message,)).SerializeToString()
        self._buckets[where][row.cidr] = _Encoded(part, digest)
        self._digests[where] = total((self._digests[where], digest))

    def remove(self, cidr: str) -> None:
        self._take(cidr)

    def find(self, cidr: str) -> bytes | None:
        found = self._buckets[bucket_of(cidr)].get(cidr)
        return None if found is None else found.part

    def every(self) -> list[bytes]:
        return [part for part in map(self.bucket, range(BUCKETS)) if part]

    def bucket(self, number: int) -> bytes:
        joined = self._joined[number]
        if joined is None:
            joined = b"".join(encoded.part for encoded in self._buckets[number].values())
            self._joined[number] = joined
        return joined

    def differing(self, digests: Sequence[int]) -> list[int]:
        """Buckets whose digest is another; `digests` empty: of nothing."""
        theirs: Iterable[int] = digests or (0,) * BUCKETS
        pairs = enumerate(zip(self._digests, theirs, strict=True))
        return [number for number, (mine, other) in pairs if mine != other]

    def _take(self, cidr: str) -> int:
        """Removes it if it is there; its bucket."""
        where = bucket_of(cidr)
        old = self._buckets[where].pop(cidr, None)
        if old is not None:
            self._digests[where] = total((self._digests[where], -old.digest))
        self._joined[where] = None
        self._total = None
        return where
