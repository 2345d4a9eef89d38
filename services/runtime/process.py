"""Running one process: command line, configuration, log, signals, and how it ends.

main(argv) ── load_or_exit ──► config ── run ──► uvloop: main() until SIGTERM/SIGINT
                                                   │
                 exit 0 ◄── returned or signalled ─┤
                 exit 1, one line on stderr ◄──────┤ TesseraError
                 exit 1, traceback in the log ◄────┘ anything else
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import uvloop
from msgspec import Struct

from services.runtime import config as configuration
from services.runtime import log as logging_setup
from services.runtime import metrics, tracing
from services.runtime.config import ProcessConfig
from services.runtime.errors import TesseraError
from services.runtime.health import serve_metrics as serve_metrics
from services.runtime.log import logger

log = logger(__name__)

C = TypeVar("C", bound=Struct)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def load_or_exit(name: str, cls: type[C], argv: Sequence[str]) -> C:
    """Parse `--config FILE` and load the configuration, or exit with one line on stderr."""
    parser = argparse.ArgumentParser(prog=f"tessera {name}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file; see README")
    arguments = parser.parse_args(argv)
    try:
        return configuration.load(cls, name, arguments.config, os.environ)
    except TesseraError as error:
        print(f"tessera {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def run(name: str, config: ProcessConfig, main: Callable[[], Awaitable[None]]) -> None:
    """Returns when `main` returned or was stopped by a signal; raises SystemExit(1) otherwise."""
    try:
        logging_setup.configure(config.log.level, json=config.log.json)
        metrics.configure(name)
        tracer = tracing.configure(name, config.telemetry.otlp_endpoint)
        try:
            _run_loop(name, config, main)
        finally:
            tracer.shutdown()
    except TesseraError as error:
        _end(name, error)
    except BaseExceptionGroup as group:
        expected = group.split(TesseraError)
        if expected[1] is not None or expected[0] is None:
            log.exception("process.failed", process=name)
            raise SystemExit(1) from None
        _end(name, _leaf(expected[0]))
    except Exception:
        log.exception("process.failed", process=name)
        raise SystemExit(1) from None


def _run_loop(name: str, config: ProcessConfig, main: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signalled(name, config, main))


async def _until_signalled(
    name: str, config: ProcessConfig, main: Callable[[], Awaitable[None]]
) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    signalled = False

    def stop(number: signal.Signals) -> None:
        nonlocal signalled
        signalled = True
        log.info("process.stopping", process=name, signal=number.name)
        # A second signal finds the default action, so a hanging shutdown can be ended by hand.
        for each in SIGNALS:
            loop.remove_signal_handler(each)
        task.cancel()

    for each in SIGNALS:
        loop.add_signal_handler(each, stop, each)
    shown = configuration.shown(config) if isinstance(config, Struct) else {}
    log.info("process.started", process=name, pid=os.getpid(), config=shown)
    try:
        await main()
    except asyncio.CancelledError:
        if not signalled:
            raise
        task.uncancel()
    log.info("process.stopped", process=name)


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _end(name: str, error: BaseException) -> None:
    print(f"tessera {name}: {error}", file=sys.stderr)
    raise SystemExit(1)
