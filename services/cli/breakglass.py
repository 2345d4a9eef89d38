"""`tessera agent break-glass`: the host firewall off, at once, whoever is stuck or gone.

    a file says so ──► the agent is told, or else the node's row is taken out of the kernel's table

The file is first: an agent that starts in between finds it.
"""

from __future__ import annotations

from pathlib import Path

from services.cli import client, kernel
from services.cli.output import say
from services.runtime import config as configuration
from services.runtime.config import AgentConfig
from services.runtime.errors import Retry, Unusable

MARKER = "break-glass"


def break_glass(config: Path | None, *, mend: bool) -> None:
    """Raises `Unusable` where it cannot be done."""
    settings = configuration.load(AgentConfig, "agent", config, kernel.environ())
    marker = Path(settings.state_dir) / MARKER
    try:
        if mend:
            marker.unlink(missing_ok=True)
        else:
            marker.touch(mode=0o600)
    except OSError as error:
        raise Unusable(f"cannot write {marker}: {error.strerror}; run as root") from None
    door = client.agent(str(Path(settings.run_dir) / "agent.sock"))
    try:
        door.request("DELETE" if mend else "POST", "/v1/break-glass")
    except Retry:
        if mend:
            say("the next agent turns the host firewall on again")
            return
        list(kernel.ask(Path(settings.bpf_dir), "break-glass", {}))
    say(
        "the host firewall is on again"
        if mend
        else "nothing of the node's own is judged until: tessera agent break-glass --mend"
    )
