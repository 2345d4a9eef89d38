"""Processes as the operator sees them: exit status and stderr of a real child."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
DEADLINE_S = 30.0

HEAD = """
import asyncio, sys
from services.runtime.config import IdentitydConfig
from services.runtime.errors import Invalid, Retry, Unusable
from services.runtime.process import load_or_exit, run

config = load_or_exit("identityd", IdentitydConfig, sys.argv[1:])

async def fail(error):
    raise error
"""


async def start(body: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"{HEAD}\nasync def main():\n{body}\n\nrun('identityd', config, main)\n",
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def outcome(body: str, *arguments: str) -> tuple[int | None, list[str]]:
    """Exit status, and stderr without the lines of the log."""
    process = await start(body, *arguments)
    async with asyncio.timeout(DEADLINE_S):
        _, errors = await process.communicate()
    lines = errors.decode().splitlines()
    return process.returncode, [line for line in lines if "process.st" not in line]


async def test_returning_is_success() -> None:
    assert await outcome("    pass") == (0, [])


async def test_an_expected_error_is_one_line_and_status_1() -> None:
    assert await outcome("    await fail(Unusable('no bpffs; mount it'))") == (
        1,
        ["tessera identityd: no bpffs; mount it"],
    )


async def test_an_expected_error_in_a_task_is_one_line_too() -> None:
    body = """
    async with asyncio.TaskGroup() as outer:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail(Retry('etcd cannot be reached')))
            await asyncio.Event().wait()
    """
    assert await outcome(body) == (1, ["tessera identityd: etcd cannot be reached"])


async def test_a_bug_is_logged_with_its_traceback() -> None:
    status, lines = await outcome("    await fail(ValueError('a bug'))")
    assert status == 1
    assert "process.failed" in lines[0]
    assert "Traceback (most recent call last):" in "\n".join(lines)
    assert lines[-1] == "ValueError: a bug"


async def test_a_bug_beside_an_expected_error_is_not_hidden() -> None:
    body = """
    async with asyncio.TaskGroup() as group:
        group.create_task(fail(Retry('etcd cannot be reached')))
        group.create_task(fail(ValueError('a bug')))
    """
    status, lines = await outcome(body)
    assert status == 1
    assert any("ValueError: a bug" in line for line in lines)


async def test_a_signal_stops_in_order_with_success() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = await start(
            """
    try:
        print('up', flush=True)
        await asyncio.Event().wait()
    finally:
        print('cleaned up', flush=True)
    """
        )
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            assert await process.stdout.readline() == b"up\n"
            process.send_signal(number)
            output, _ = await process.communicate()
        assert (process.returncode, output) == (0, b"cleaned up\n")


async def test_a_second_signal_ends_a_shutdown_that_hangs() -> None:
    process = await start(
        """
    print('up', flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print('hanging', flush=True)
        await asyncio.Event().wait()
    """
    )
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert await process.stdout.readline() == b"hanging\n"
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == -signal.SIGTERM


async def test_a_wrong_configuration_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tessera.toml"
    path.write_text("[identityd]\nlisten_to = 'x'\n")
    status, lines = await outcome("    pass", "--config", str(path))
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"tessera identityd: {path}: unknown key identityd.listen_to")


async def test_json_logs_are_one_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "tessera.toml"
    path.write_text("[log]\njson = true\n[etcd]\npassword = 'hush'\n")
    process = await start("    pass", "--config", str(path))
    async with asyncio.timeout(DEADLINE_S):
        _, errors = await process.communicate()
    lines = errors.decode().splitlines()
    assert [line[0] + line[-1] for line in lines] == ["{}", "{}"]
    assert '"event": "process.started"' in lines[0]
    assert "hush" not in lines[0]
