"""Which store the configuration means."""

from __future__ import annotations

from services.runtime.config import EtcdConfig
from services.store.etcd import EtcdStore
from services.store.model import Store


def open_store(config: EtcdConfig) -> Store:
    """Not connected yet; use it in an `async with`. Raises `Unusable` for unreadable TLS files."""
    return EtcdStore(config)
