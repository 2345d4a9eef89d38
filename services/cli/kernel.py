"""Asking the kernel: the reader process of datapath/inspection, its rows and its refusals.

Needs no agent and no control plane. What a running agent can add, names of endpoints and of rules,
is asked of it; without one the numbers stand alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from identity.numbers import name_of
from services.cli.layout import child_environ
from services.cli.options import DEFAULT_AGENT_SOCKET
from services.runtime.errors import NotFound, TesseraError, Unusable

DEFAULT_BPF_DIR = Path("/sys/fs/bpf/tessera")
READER = "datapath.inspection.main"
ASK_DEADLINE_S = 120.0  # a million rows, compared on a loaded machine

BpfDir = Annotated[
    Path,
    typer.Option(
        "--bpf-dir", envvar="TESSERA_BPF_DIR", help="Where the maps are pinned.", metavar="DIR"
    ),
]
T = TypeVar("T")


def environ() -> dict[str, str]:
    """As a process reads its configuration from."""
    return child_environ(os.environ)


def ask(bpf_dir: Path, subject: str, choice: Mapping[str, object], **more: object) -> Iterator[str]:
    """The rows, each as a line of JSON. Raises `Unusable` with the reader's reason."""
    question = {"subject": subject, "choice": _given(choice), **more}
    argv = [sys.executable, "-m", READER, str(bpf_dir), json.dumps(question)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        yield from (line.rstrip("\n") for line in reader.stdout)
        reason = reader.stderr.read().strip()
    if reader.returncode:
        raise Unusable(reason.splitlines()[-1] if reason else "the reader ended without a word")


def rows(
    bpf_dir: Path, subject: str, kind: type[T], choice: Mapping[str, object], **more: object
) -> Iterator[T]:
    from services.cli import views

    for line in ask(bpf_dir, subject, choice, **more):
        yield views.decode(line.encode(), kind)


def _given(choice: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in choice.items() if value not in (None, "")}


@dataclass(frozen=True)
class Names:
    """What numbers are called on this node, as far as an agent says."""

    agent_socket: str = DEFAULT_AGENT_SOCKET

    @cached_property
    def _endpoints(self) -> dict[int, str]:
        from services.cli import client, views

        try:
            body = client.agent(self.agent_socket).get("/v1/endpoints")
        except TesseraError:  # no agent runs here, or it is just starting
            return {}
        return {one.id: one.ref for one in views.decode(body, views.Endpoints).endpoints}

    @cached_property
    def _rules(self) -> dict[str, str]:
        from services.cli import client, views

        try:
            body = client.agent(self.agent_socket).get("/v1/rules")
        except TesseraError:
            return {}
        return views.decode(body, dict[str, str])

    def endpoint(self, number: int) -> str:
        if number == 0:
            return "the node"
        return self._endpoints.get(number, str(number))

    def rule(self, number: int) -> str:
        return _RESERVED_RULES.get(number) or self._rules.get(str(number), f"rule {number}")

    def number_of(self, endpoint: str) -> int:
        """Of a number, or namespace/name. Raises `NotFound`."""
        if endpoint.isdecimal():
            return int(endpoint)
        for number, ref in self._endpoints.items():
            if ref == endpoint:
                return number
        raise NotFound(
            f"no endpoint {endpoint} on this node, or no agent that knows its name: give its "
            "number, see tessera bpf endpoint list"
        )


_RESERVED_RULES: Mapping[int, str] = {
    0: "-",
    1: "no policy selects it",
    2: "default deny",
    3: "the node itself",
    4: "no default deny",
}


def identity_text(number: int) -> str:
    name = name_of(number)
    return f"{number} {name}" if name else str(number)
