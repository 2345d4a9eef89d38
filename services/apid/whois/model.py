"""Who somebody is, as REST says it."""

from __future__ import annotations

from msgspec import Struct

from services.apid.identities.model import Endpoint, Identity
from services.apid.policies.model import Ref


class Allocation(Struct, frozen=True):
    """An address as ipamd gave it out."""

    ip: str
    pool: str
    block: str
    node: str
    owner: str


class Selected(Struct, frozen=True):
    """The policies about an identity. A direction that is not `enforced` is open."""

    identity: int
    ingress_enforced: bool
    egress_enforced: bool
    ingress: tuple[Ref, ...]
    egress: tuple[Ref, ...]


class Whois(Struct, frozen=True):
    """`kind`: identity, address, cidr, endpoint, node or name, as which `query` was taken.

    `says`: what it is, in sentences. `endpoints`: at most 100 announced addresses; `more` says that
    there are others. `allocations`: of one address, who has it from ipamd. `unknown`: services that
    did not answer, and what is therefore not said.
    """

    query: str
    kind: str
    says: tuple[str, ...]
    identities: tuple[Identity, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    more: bool = False
    allocations: tuple[Allocation, ...] = ()
    policies: tuple[Selected, ...] = ()
    unknown: tuple[str, ...] = ()
