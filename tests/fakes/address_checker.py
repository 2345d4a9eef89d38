"""Judges what nodes wrote down against what the store holds; nothing of Tessera decides here.

A ledger line is [seconds, "given" | "released", owner, number of the endpoint, addresses]. An
address is in use from "given" until "released"; clocks are the machine's own, one for all.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import inf
from pathlib import Path

from ipam import keys
from ipam.block import address_text
from services.ipamd.rows import assigned_of, claimed_of, owned_of
from services.store.model import Store

Line = tuple[float, str, str, int, Sequence[str]]


def read(ledger: Path) -> list[Line]:
    """A line that a kill cut short is no line."""
    whole = [text for text in ledger.read_text().splitlines(keepends=True) if text.endswith("\n")]
    return [tuple(json.loads(text)) for text in whole]


def twice(ledgers: Mapping[str, Iterable[Line]], dead: Mapping[str, float]) -> list[str]:
    """Addresses that two endpoints had at one time. `dead`: node -> when it died for good; nobody
    uses its addresses from then on."""
    uses: defaultdict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for node, lines in ledgers.items():
        open_: dict[tuple[int, str], tuple[float, str]] = {}
        for at, what, owner, number, ips in lines:
            for ip in ips:
                if what == "given":
                    open_[number, ip] = (at, f"{owner} #{number} on {node}")
                elif (number, ip) in open_:
                    since, who = open_.pop((number, ip))
                    uses[ip].append((since, at, who))
        for (_, ip), (since, who) in open_.items():
            uses[ip].append((since, dead.get(node, inf), who))
    found = []
    for ip, spans in uses.items():
        spans.sort()
        for (_, end, one), (start, _, other) in pairwise(spans):
            if start < end:
                found.append(f"{ip}: {one} still had it when {other} was given it")
    return found


async def stored(store: Store, left: Mapping[str, set[str]]) -> list[str]:
    """What is wrong with the store, given what each owner should have: `left`, in words."""
    found: list[str] = []
    rows = [assigned_of(kv) for kv in (await store.list(keys.ADDRESSES)).items]
    blocks = {
        (claim.pool, claim.block)
        for claim in map(claimed_of, (await store.list(keys.BLOCKS)).items)
    }
    have: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        have[str(row.owner)].add(address_text(row.address))
        if (row.pool, row.block) not in blocks:
            found.append(f"{address_text(row.address)}: nobody has its block {row.block}")
    for owner in left.keys() - have.keys():
        found.append(f"{owner} has {sorted(left[owner])}, of which the store knows nothing")
    for owner, ips in have.items():
        if owner not in left:
            found.append(f"leaked: {sorted(ips)} of {owner}, which does not exist")
        elif ips != left[owner]:
            found.append(f"{owner} has {sorted(left[owner])}, the store says {sorted(ips)}")
    places = {(row.pool, row.address): row for row in rows}
    for kv in (await store.list(keys.OWNERS)).items:
        namespace, name, interface = kv.key.removeprefix(keys.OWNERS).split("/")
        for row in owned_of(keys.Owner(namespace, name, interface), kv):
            if places.get((row.pool, row.address)) != row:
                found.append(f"{kv.key} names {address_text(row.address)}, which is not its own")
    return found
