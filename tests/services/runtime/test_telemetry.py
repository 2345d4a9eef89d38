"""Metrics and traces set the process's providers, so they are tried in a child."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


async def printed(program: str) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        program,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode().splitlines()


async def test_a_span_continues_the_trace_it_is_given() -> None:
    lines = await printed(
        """
from services.runtime import tracing
provider = tracing.configure("test", "")
print(tracing.current_traceparent() == "")
given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
with tracing.span("outer", given, identity=7):
    print(tracing.current_traceparent())
    with tracing.span("inner"):
        print(tracing.current_traceparent())
with tracing.span("of its own"):
    print(tracing.current_traceparent())
with tracing.span("misspelt parent", "00-nonsense"):
    print(tracing.current_traceparent())
provider.shutdown()
"""
    )
    assert lines[0] == "True"
    outer, inner, own, misspelt = (line.split("-") for line in lines[1:])
    assert outer[1] == inner[1] == "0af7651916cd43dd8448eb211c80319c"
    assert len({outer[2], inner[2], "b7ad6b7169203331"}) == 3
    assert len({outer[1], own[1], misspelt[1]}) == 3


async def test_the_exporter_is_not_imported_without_an_endpoint() -> None:
    lines = await printed(
        """
import sys
import services.runtime.process
from services.runtime import tracing
tracing.configure("test", "").shutdown()
print([m for m in sys.modules if "otlp" in m])
provider = tracing.configure("test", "127.0.0.1:9")
print(any("otlp" in m for m in sys.modules))
"""
    )
    assert lines == ["[]", "True"]


async def test_meters_made_early_are_exposed() -> None:
    lines = await printed(
        """
from services.runtime import metrics
counter = metrics.meter("tessera.test").create_counter("tessera_test_things", description="Things.")
metrics.configure("test")
counter.add(2, {"kind": "a"})
print(metrics.exposition().decode())
"""
    )
    assert any(re.match(r'tessera_test_things_total\{.*kind="a".*\} 2\.0', line) for line in lines)
