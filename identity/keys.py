"""Keys of the store that concern identities.

Public, in the format that other clusters read:
    cilium/state/identities/v1/id/<N>         canonical labels
    cilium/state/ip/v1/default/<ip>           JSON, leased
    cilium/state/nodes/v1/<cluster>/<node>    JSON, leased
    cilium/.heartbeat                         time, leased
Private (readers of the public prefix log what they do not know, so these live elsewhere):
    tessera/id/idx/<digest of the labels>     N
    tessera/id/ref/<N>/<node>                 digest, leased by the node's session
    tessera/id/tomb/<N>                       digest, leased: N is in quarantine
    tessera/id/guard/<lease>                  empty, leased: tombs may hang on that lease
    tessera/id/rules                          JSON: which labels make an identity
    tessera/id/heartbeat                      time; rewritten, so that a stalled watch is noticed
"""

from __future__ import annotations

from typing import Final

from identity.numbers import NumericIdentity

ID_PREFIX: Final = "cilium/state/identities/v1/id/"
IP_PREFIX: Final = "cilium/state/ip/v1/default/"
NODES_PREFIX: Final = "cilium/state/nodes/v1/"
IDX_PREFIX: Final = "tessera/id/idx/"
REF_PREFIX: Final = "tessera/id/ref/"
TOMB_PREFIX: Final = "tessera/id/tomb/"
GUARD_PREFIX: Final = "tessera/id/guard/"
RULES: Final = "tessera/id/rules"
HEARTBEAT: Final = "tessera/id/heartbeat"
# Other clusters take this one for gone when it is not rewritten for two minutes.
PUBLIC_HEARTBEAT: Final = "cilium/.heartbeat"


def id_key(number: NumericIdentity) -> str:
    return f"{ID_PREFIX}{number}"


def idx_key(digest: str) -> str:
    return f"{IDX_PREFIX}{digest}"


def refs_of(number: NumericIdentity) -> str:
    """The prefix of every reference to `number`."""
    return f"{REF_PREFIX}{number}/"


def ref_key(number: NumericIdentity, node: str) -> str:
    return f"{REF_PREFIX}{number}/{node}"


def tomb_key(number: NumericIdentity) -> str:
    return f"{TOMB_PREFIX}{number}"


def guard_key(lease: int) -> str:
    return f"{GUARD_PREFIX}{lease:x}"


def ip_key(ip: str) -> str:
    return f"{IP_PREFIX}{ip}"


def node_key(cluster: str, node: str) -> str:
    return f"{NODES_PREFIX}{cluster}/{node}"


def number_in(key: str, prefix: str) -> NumericIdentity | None:
    """The number that follows `prefix`; None for a key that some other writer put there."""
    return _number(key.removeprefix(prefix)) if key.startswith(prefix) else None


def ref_in(key: str) -> tuple[NumericIdentity, str] | None:
    """Number and node of a reference key."""
    if not key.startswith(REF_PREFIX):
        return None
    digits, slash, node = key.removeprefix(REF_PREFIX).partition("/")
    number = _number(digits)
    return (number, node) if number is not None and slash and node else None


def _number(digits: str) -> NumericIdentity | None:
    # The canonical decimal only: "007" and "+7" would be second spellings of one number.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
        return None
    number = int(digits)
    return NumericIdentity(number) if str(number) == digits and number < 1 << 32 else None
