"""The node as an endpoint: judged by policies with a nodeSelector, without locking anybody out.

policy of identity 1 (host) ──► slots ──► row of HOST_IFINDEX ──► from_netdev, to_netdev
control ports, services ──────► control table: passes whatever policy says
break-glass ──────────────────► no row, so that nothing of the node's own is judged; a file
keeps it so across restarts, until it is mended
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Final

from datapath.agent.enforcement import Enforcement
from datapath.maps.layout import (
    HOST_IFINDEX,
    ControlKey,
    Endpoint,
    EndpointFlags,
    mapped,
)
from datapath.maps.table import Table
from identity.numbers import HOST
from services.policy.clauses import RULE_CONTROL_CHANNEL
from services.runtime.config import AgentConfig
from services.runtime.errors import Retry
from services.runtime.log import logger

log = logger(__name__)

BROKEN_FILE: Final = "break-glass"
_TCP: Final = 6
_INGRESS, _EGRESS = 1, 2
ROW: Final = Endpoint(0, HOST, 0, 0, EndpointFlags.READY, 0, bytes(6), bytes(6))


def control_rows(config: AgentConfig) -> dict[ControlKey, int]:
    """What the host firewall never stops: TCP to the control ports of this node, and the agent's
    own connections to the services, where they are named by address."""
    rows = {ControlKey(0, port, _TCP, _INGRESS) for port in config.control_ports}
    for target in (config.identityd, config.ipamd, *config.policyd.split(",")):
        host, _, port = target.rpartition(":")
        try:
            peer = mapped(ip_address(host.strip("[]")))
        except ValueError:  # a socket of this machine, or a name
            continue
        rows.add(ControlKey(peer, int(port), _TCP, _EGRESS))
    return dict.fromkeys(rows, RULE_CONTROL_CHANNEL)


class HostFirewall:
    def __init__(
        self, config: AgentConfig, enforcement: Enforcement, control: Table[ControlKey, int]
    ) -> None:
        self.wanted = config.host_firewall
        self._marker = Path(config.state_dir) / BROKEN_FILE
        self._enforcement = enforcement
        self._control = control
        self._rows = control_rows(config) if self.wanted else {}

    @property
    def broken(self) -> bool:
        """Whether somebody broke the glass."""
        return self._marker.exists()

    @property
    def state(self) -> str:
        if not self.wanted:
            return "off"
        return "broken glass: off until tessera agent break-glass --mend" if self.broken else "on"

    def recovered(self) -> dict[int, Endpoint]:
        """The row of the node, for Enforcement.recover; with it the control channel is open."""
        stale = [key for key, _ in self._control.items() if key not in self._rows]
        self._control.put_many(self._rows)
        self._control.delete_many(stale)
        return {HOST_IFINDEX: ROW} if self.wanted and not self.broken else {}

    def place(self) -> None:
        """Call after each batch: the node is judged once its policy is known."""
        if self.wanted and not self.broken and not self._enforcement.judges(HOST_IFINDEX):
            try:
                self._enforcement.add_endpoint(HOST_IFINDEX, ROW)
            except Retry:
                return
            log.info("host.judged", interface="lo")

    def break_glass(self) -> None:
        self._marker.touch(mode=0o600)
        self._enforcement.remove_endpoint(HOST_IFINDEX)
        log.warning("host.unjudged", reason="somebody broke the glass")

    def mend(self) -> None:
        self._marker.unlink(missing_ok=True)
        self.place()
