"""One process, many nodes: what a thousand nodes are sent in the same bytes is decoded once.

A real node decodes for itself; here a thousand would share one core. The decoded values are
immutable, so that sharing them is not seen by who holds them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, TypeVar

import grpc.aio
from tessera_wire.policy.v1 import policy_pb2 as pb

from datapath.agent.received import update_from_wire
from datapath.agent.view import Update

if TYPE_CHECKING:
    from collections.abc import Sequence

SUBSCRIBE: Final = "/tessera.policy.v1.PolicyDistribution/Subscribe"
# Messages in a row that nodes are likely to be at; a slower one decodes for itself.
KEPT: Final = 256

K = TypeVar("K")
V = TypeVar("V")


class SharedDecoder:
    """`bytes_received`, `messages`: of all nodes together."""

    def __init__(self) -> None:
        self._messages: OrderedDict[bytes, pb.Update] = OrderedDict()
        # By id of the message, which is held along, so that no other gets that id.
        self._updates: OrderedDict[int, tuple[pb.Update, Update]] = OrderedDict()
        self.bytes_received = 0
        self.messages = 0

    def stub(self, channel: grpc.aio.Channel) -> SharedStub:
        return SharedStub(channel, self)

    def parse(self, data: bytes) -> pb.Update:
        self.bytes_received += len(data)
        self.messages += 1
        message = self._messages.get(data)
        if message is None:
            message = self._messages[data] = pb.Update.FromString(data)
            _shorten(self._messages)
        return message

    def decode(self, message: pb.Update) -> Update:
        found = self._updates.get(id(message))
        if found is None:
            found = self._updates[id(message)] = (message, update_from_wire(message))
            _shorten(self._updates)
        return found[1]


def _shorten(cache: OrderedDict[K, V]) -> None:
    if len(cache) > KEPT:
        cache.popitem(last=False)


class SharedStub:
    """As the generated one, with another deserializer."""

    def __init__(self, channel: grpc.aio.Channel, decoder: SharedDecoder) -> None:
        self._method: grpc.aio.StreamStreamMultiCallable[pb.AgentMessage, pb.Update] = (
            channel.stream_stream(
                SUBSCRIBE,
                request_serializer=pb.AgentMessage.SerializeToString,
                response_deserializer=decoder.parse,
            )
        )

    def Subscribe(
        self, *, metadata: Sequence[tuple[str, str]] = ()
    ) -> grpc.aio.StreamStreamCall[pb.AgentMessage, pb.Update]:
        return self._method(metadata=tuple(metadata))
