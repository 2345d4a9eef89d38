"""Compilation of one local policy: which answer each peer identity gets, on which ports.

    LocalPolicy --compile_direction--> Compiled --partition(group members)--> {Answer: identities}

An answer is the content of one class of the datapath. Precedence is decided here, for each class and
each distinct port block, so that the kernel never ranks rules: any deny -> DENY; else any allow ->
ALLOW; else NONE. Nothing here knows maps, slots or class numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from pyroaring import BitMap

from services.policy.clauses import Direction, GroupId, LocalPolicy, RuleId


class Verdict(IntEnum):
    """As enum verdict in datapath/bpf/abi.h."""

    NONE = 0
    ALLOW = 1
    DENY = 2


@dataclass(frozen=True, slots=True)
class PortAnswer:
    """What is decided and by which clause. NONE carries RULE_NONE: nothing matches, default deny."""

    verdict: Verdict
    rule_id: RuleId


@dataclass(frozen=True, slots=True)
class ExactPort:
    """One port of one protocol. ICMP: the port is the type."""

    proto: int
    port: int
    answer: PortAnswer


@dataclass(frozen=True, slots=True)
class PortBlock:
    """The ports of `proto` that share the first `bits` bits of `port`; 0 bits: every port.

    Aligned: the low 16 - bits bits of `port` are zero. `bits` is 0..15; a full match is an ExactPort.
    """

    proto: int
    port: int
    bits: int
    answer: PortAnswer


@dataclass(frozen=True, slots=True)
class Answer:
    """The content of a class. Lookup order: exact port, longest block, `all`.

    A row with Verdict.NONE is a row: it stops a less specific row from answering.
    `ports` and `ranges` are sorted; equal answers compare and hash equal.
    """

    all: PortAnswer
    ports: tuple[ExactPort, ...]
    ranges: tuple[PortBlock, ...]

    def lookup(self, proto: int, port: int) -> PortAnswer:
        """What the datapath answers; port 0 for protocols without ports."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Compiled:
    """One direction of a local policy, ready to be applied to group members."""

    groups: frozenset[GroupId]
    default: Answer

    def partition(
        self, members: Callable[[GroupId], BitMap], within: BitMap | None = None
    ) -> dict[Answer, BitMap]:
        """Every identity of the referenced groups with its answer; values are disjoint.

        Without `within`: identities whose answer equals `default` are left out, they need no row.
        With `within`: only these identities, all of them (also those in no group), and those that
        answer `default` are listed under it, so that the caller deletes their rows.
        """
        raise NotImplementedError


def compile_direction(local: LocalPolicy, direction: Direction) -> Compiled | None:
    """None: the direction is open, nothing is looked up."""
    raise NotImplementedError
