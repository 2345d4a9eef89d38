"""Samples to printed figures: the machine, the load it was under, medians, tails, ratios."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def machine() -> str:
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return (
        f"kernel {platform.release()} {platform.machine()}, {os.cpu_count()} x {cpu},"
        f" Python {platform.python_version()}, {load()}"
    )


def load() -> str:
    """Of the machine, ours and everybody else's: figures under load compare with nothing."""
    one, five, _ = os.getloadavg()
    return f"load {one:.2f} (1 min) {five:.2f} (5 min)"


def quantile(samples: Sequence[float], q: float) -> float:
    """The smallest sample that at least `q` of all do not exceed (no interpolation)."""
    return sorted(samples)[max(0, math.ceil(q * len(samples)) - 1)]


def table(title: str, rows: Mapping[str, Sequence[float]]) -> None:
    """Seconds in, milliseconds out. The ratio is of each row's median to the first row's."""
    first = statistics.median(next(iter(rows.values())))
    width = max(map(len, rows))
    out = [
        f"\n{title}   [{load()}]",
        f"  {'ms':{width}}  {'n':>4} {'min':>9} {'median':>9} {'p95':>9} {'p99':>9} {'ratio':>8}",
    ]
    for name, samples in rows.items():
        ms = [s * 1000 for s in samples]
        middle = statistics.median(ms)
        out.append(
            f"  {name:{width}}  {len(ms):4} {min(ms):9.3f} {middle:9.3f} {quantile(ms, 0.95):9.3f}"
            f" {quantile(ms, 0.99):9.3f} {middle / 1000 / first:8.2f}"
        )
    print("\n".join(out), file=sys.stdout, flush=True)
