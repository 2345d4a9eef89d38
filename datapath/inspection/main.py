"""`python -m datapath.inspection.main BPF_DIR QUESTION`: a node's pinned maps, one JSON row a line.

    tessera bpf ... ──► this process ──► bpf(2) on the pins      (a command cannot import the
                    ◄── rows ◄─────────────┘                      datapath: it is the layer above)

QUESTION is a JSON `Question`. Exit status 1 with one line on stderr for what cannot be answered.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from datapath.inspection import kernel
from datapath.inspection.choice import Choice
from datapath.inspection.rows import ConnectionRow, CountRow, Row, TalkerRow
from datapath.maps.layout import HOST_IFINDEX
from datapath.maps.tables import Tables
from services.runtime.clock import Clock, SystemClock
from services.runtime.errors import Invalid, TesseraError, Unusable

Subject = Literal[
    "endpoint",
    "policy",
    "ipcache",
    "ct",
    "top",
    "flush",
    "metrics",
    "map",
    "consistency",
    "break-glass",
]


class Question(Struct, frozen=True, forbid_unknown_fields=True):
    """`interval_s`: between the two looks of `top`."""

    subject: Subject
    choice: Choice = Choice()
    interval_s: float = 1.0


def main(argv: list[str]) -> None:
    try:
        bpf_dir, text = argv
        question = msgspec.json.decode(text, type=Question)
        if os.geteuid() != 0:
            raise Unusable("reading BPF maps needs root (CAP_BPF): run as root")
        question.choice.network()
        tables = Tables.pinned(Path(bpf_dir))
        try:
            tell(answer(question, tables, Path(bpf_dir), SystemClock()))
        finally:
            tables.close()
    except (TesseraError, msgspec.DecodeError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read has seen enough; Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(rows: Iterable[Row]) -> None:
    encode = msgspec.json.Encoder().encode
    for row in rows:
        sys.stdout.buffer.write(encode(row) + b"\n")
    sys.stdout.buffer.flush()


def answer(question: Question, tables: Tables, bpf_dir: Path, clock: Clock) -> Iterable[Row]:
    choice = question.choice
    match question.subject:
        case "endpoint":
            return kernel.endpoints(tables, choice)
        case "policy":
            return kernel.policy(tables, choice)
        case "ipcache":
            return kernel.addresses(tables, choice)
        case "ct":
            return kernel.connections(tables, choice, _now_ns(clock))
        case "top":
            return talkers(tables, question, clock)
        case "flush" | "break-glass":
            return [CountRow(_removed(question, tables, clock))]
        case "metrics":
            return kernel.metrics(tables, choice)
        case "map":
            return kernel.maps(tables)
        case "consistency":
            # With it comes netlink, which takes longer to import than most questions to answer.
            from datapath.attachments import Attachments
            from datapath.inspection import consistency

            return consistency.findings(
                tables, Attachments({}, bpf_dir, "auto").attached("endpoint")
            )


def _removed(question: Question, tables: Tables, clock: Clock) -> int:
    if question.subject == "break-glass":
        return tables.endpoints.delete_many([HOST_IFINDEX])
    return kernel.flush(tables, question.choice, _now_ns(clock))


def talkers(tables: Tables, question: Question, clock: Clock) -> Iterator[TalkerRow]:
    """What moved between two looks, the busiest first."""
    if question.interval_s <= 0:
        raise Invalid(f"an interval of {question.interval_s:g} s: give one above 0")
    before = {
        _ends(row): row for row in kernel.connections(tables, question.choice, _now_ns(clock))
    }
    began_s = clock.monotonic_s()
    time.sleep(question.interval_s)
    found = []
    now_ns = _now_ns(clock)
    seconds = clock.monotonic_s() - began_s
    for row in kernel.connections(tables, question.choice, now_ns):
        then = before.get(_ends(row))
        # An entry that was made anew meanwhile counts from zero.
        known = then if then and sum(then.packets) <= sum(row.packets) else None
        packets = sum(row.packets) - (sum(known.packets) if known else 0)
        octets = sum(row.octets) - (sum(known.octets) if known else 0)
        if packets:
            found.append(TalkerRow(row, packets / seconds, octets / seconds))
    yield from sorted(found, key=lambda one: (-one.octets_per_s, -one.packets_per_s))


def _ends(row: ConnectionRow) -> tuple[str, str, int, str, int]:
    return (row.proto, row.source, row.source_port, row.destination, row.destination_port)


def _now_ns(clock: Clock) -> int:
    return int(clock.monotonic_s() * 1e9)


if __name__ == "__main__":
    main(sys.argv[1:])
