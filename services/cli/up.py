"""`tessera up`: a whole node on this machine, in the foreground, until SIGINT or SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.layout import ETCD_CLIENT_PORT
from services.cli.options import ConfigFile
from services.cli.output import say

if TYPE_CHECKING:
    from services.cli.layout import Table
INTERRUPTED = 130


def up(
    config: ConfigFile = None,
    *,
    state_dir: Annotated[
        Path | None, typer.Option(help="etcd's data, checkpoints.", metavar="DIR")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Sockets, logs, the configuration in force.", metavar="DIR")
    ] = None,
    etcd_endpoints: Annotated[
        str, typer.Option(help="Use a running etcd: host:port[,host:port].", metavar="LIST")
    ] = "",
    etcd_port: Annotated[
        int,
        typer.Option(
            help="Of its own etcd, whose peers get the next one; 0: any free ones.",
            min=0,
            max=65534,
            metavar="N",
        ),
    ] = ETCD_CLIENT_PORT,
    cleanup: Annotated[
        bool, typer.Option("--cleanup", help="When stopping, remove endpoints and pinned programs.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Once ready, run the demo, then keep the node running.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Children log to stderr, not to files.")
    ] = False,
) -> None:
    """Run a whole node on this machine, until Ctrl-C."""
    from services.cli import layout
    from services.cli.foreground import run_node, until_signal
    from services.cli.node import Plan
    from services.runtime import log

    log.configure("warning", json=False)
    user = read_config(config)
    endpoints = tuple(one.strip() for one in etcd_endpoints.split(",") if one.strip())
    plan = Plan(
        layout=layout.layout_of(user, state_dir=state_dir, run_dir=run_dir),
        user=user,
        etcd_endpoints=endpoints or layout.configured_etcd(user),
        etcd_ports=(etcd_port, etcd_port and etcd_port + 1),
        verbose=verbose,
        clean_up=cleanup,
    )
    until_signal(run_node(plan, demo=demo))
    if not cleanup:
        say(
            f"stopped; what is pinned in {plan.layout.bpf_dir} keeps enforcing the last policy "
            "(`tessera up --cleanup` removes it when it stops)"
        )


def read_config(path: Path | None) -> Table:
    """The user's file, judged as every process will judge it, so that refusals name this file and
    not the one made from it."""
    import os
    import tomllib

    from services.cli.layout import child_environ
    from services.runtime import config

    environ = child_environ(os.environ)
    for section, kind in config.CLASSES.items():
        config.load(kind, section, path, environ)
    return tomllib.loads(path.read_text()) if path is not None else {}
