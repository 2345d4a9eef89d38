"""What every test needs, and the rule that CI may not skip the kernel in silence."""

from __future__ import annotations

import asyncio
import os

import pytest

_KERNEL_RUNS = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KERNEL_RUNS] = {"run": 0, "skipped": 0}
    # The looptime plugin asks for the current loop before a synchronous test too. Unless told that
    # there is none, asyncio makes one, nobody closes it, and a later test fails on the warning.
    asyncio.set_event_loop(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if item.get_closest_marker("kernel") is not None:
        counts = item.config.stash[_KERNEL_RUNS]
        if report.skipped:
            counts["skipped"] += 1
        elif report.when == "call":
            counts["run"] += 1
    return report


def _all_kernel_tests_skipped(config: pytest.Config) -> bool:
    counts = config.stash[_KERNEL_RUNS]
    return bool(counts["skipped"]) and not counts["run"]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if (
        os.environ.get("CI")
        and exitstatus == pytest.ExitCode.OK
        and _all_kernel_tests_skipped(session.config)
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if os.environ.get("CI") and _all_kernel_tests_skipped(config):
        terminalreporter.write_line(
            "FAILED: every kernel test was skipped; CI needs root, a bpf filesystem and etcd",
            red=True,
        )
