"""One endpoint of etcd: its channel, its stubs, its TLS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from tessera_wire.etcd import etcd_pb2_grpc as rpc

from services.runtime.config import EtcdConfig
from services.runtime.errors import Unusable

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # etcd refuses pings more often than every 5 s, and all pings without a call in flight.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Two stores of one process must not share a broken connection, nor its flow control.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One endpoint and its stubs."""

    server: str
    channel: grpc.aio.Channel
    kv: rpc.KVAsyncStub
    watch: rpc.WatchAsyncStub
    lease: rpc.LeaseAsyncStub
    auth: rpc.AuthAsyncStub


def members(config: EtcdConfig, servers: Iterable[str]) -> tuple[Member, ...]:
    """One per server, scheme allowed. Raises `Unusable` for TLS files that cannot be used."""
    credentials = _credentials(config)
    return tuple(_member(server, credentials) for server in servers)


def _member(server: str, credentials: grpc.ChannelCredentials | None) -> Member:
    scheme, separator, address = server.rpartition("://")
    if separator and scheme == "https" and credentials is None:
        credentials = grpc.ssl_channel_credentials()
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    return Member(
        address,
        channel,
        rpc.KVStub(channel),
        rpc.WatchStub(channel),
        rpc.LeaseStub(channel),
        rpc.AuthStub(channel),
    )


def _credentials(config: EtcdConfig) -> grpc.ChannelCredentials | None:
    if not (config.ca_file or config.cert_file):
        return None
    if bool(config.cert_file) != bool(config.key_file):
        raise Unusable("etcd.cert_file and etcd.key_file go together; set both or neither")
    return grpc.ssl_channel_credentials(
        _read(config.ca_file), _read(config.key_file), _read(config.cert_file)
    )


def _read(file: str) -> bytes | None:
    if not file:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise Unusable(f"{file} for etcd's TLS cannot be read: {error.strerror}") from None
