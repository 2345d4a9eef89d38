"""The vocabulary of log keys: each word once, with its meaning and unit.

Calls write them as plain keyword arguments, `log.info("store.reached", endpoint=...)`; a key that
is not listed here is a misspelling, and tests/services/runtime/test_log_keys.py finds it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

KEYS: Final = MappingProxyType(
    {
        "address": "an IP address of an endpoint or node",
        "attempt": "how many times this was tried, from 1",
        "block": "an address block, CIDR",
        "blocks": "number of address blocks",
        "changed": "number of objects changed",
        "cluster": "name of a cluster",
        "cluster_id": "number of a cluster, of Tessera's or etcd's",
        "bytes": "size of what the event is about",
        "connected": "how many are connected",
        "enforcing": "how many nodes enforce what they were told to",
        "highest": "highest revision among several",
        "lowest": "lowest revision among several",
        "messages": "number of messages received",
        "code": "number of an error, as the protocol it is of numbers them",
        "config": "the configuration in force, without secrets",
        "count": "number of things the event is about",
        "detail": "one line of free text from elsewhere: the kernel, etcd, a peer",
        "direction": "ingress or egress",
        "endpoint": "an endpoint: number, or namespace/name",
        "error": "message of the error that caused the event",
        "file": "path of a file",
        "identity": "a numeric security identity",
        "interface": "name of a network interface",
        "key": "key of a label",
        "keys": "number of keys in the store",
        "kind": "kind of a policy object",
        "labels": "a label set in its stored form",
        "lease": "id of a lease in the store",
        "listen": "address a server listens on",
        "name": "name of the object the event is about",
        "namespace": "namespace of the object the event is about",
        "node": "name of a node",
        "offset": "place in a file, bytes from its start",
        "pause_s": "seconds until the next try",
        "pid": "process id",
        "policy": "a policy: kind namespace/name",
        "pool": "name of an address pool",
        "prefixes": "key prefixes in the store",
        "process": "name of the process: identityd, ipamd, ...",
        "reason": "why, in one word or line",
        "removed": "number of objects removed",
        "revision": "revision of the store, or of what was derived from it",
        "rows": "rows of a kernel map",
        "rule": "a rule id",
        "server": "a server this process talks to, host:port or socket",
        "servers": "servers this process talks to",
        "signal": "name of a signal",
        "slot": "policy slot of the datapath",
        "source": "where an input came from",
        "state": "state after the change",
        "suggestion": "what would help, as a setting",
        "table": "name of a kernel map",
        "target": "gRPC target",
        "took_s": "duration, seconds",
        "trace_id": "trace this happened in, hex",
        "ttl_s": "time to live, seconds",
        "version": "version of a program or format",
        "was": "what it was before the change",
    }
)
