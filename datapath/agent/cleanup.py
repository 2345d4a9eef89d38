"""`tessera agent --cleanup`: takes every trace of a node's agent off the machine, and says what.

    endpoints' interfaces ──► programs elsewhere ──► routes ──► pins, maps with them ──► files
    and, as far as the control plane answers: addresses, identities and announcements given back

Only what this node's files and pins name is touched; another agent's of the same machine is not.
Can be run again: what is gone already is not missed. Packets of what were endpoints find no way
from the first step on; the sysctl net.ipv4.ip_forward stays as it is, others may rely on it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tessera_wire.identity.v1 import identity_pb2 as idpb
from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceStub
from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceStub

from datapath import links
from datapath.agent import api, checkpoint
from datapath.agent.addressing import Addressing
from datapath.agent.addresslog import FILE, INSTANCE_FILE, AddressLog
from datapath.agent.checkpoint import ENDPOINTS_FILE, VIEW_FILE, Journal
from datapath.agent.record import OUTER_PREFIX
from datapath.agent.underlay import overlay_name
from datapath.attachments import Attachments
from datapath.maps.tables import CODECS, MAPS_DIR
from datapath.routes import Router
from services.runtime.clock import SystemClock
from services.runtime.config import AgentConfig
from services.runtime.errors import TesseraError, Unusable
from services.runtime.process import load_or_exit
from services.wire.client import call, channel

RPC_DEADLINE_S: Final = 5.0


def main(argv: Sequence[str] | None = None) -> None:
    config = load_or_exit("agent", AgentConfig, sys.argv[1:] if argv is None else argv)
    try:
        removed = clean_up(config)
    except TesseraError as error:
        print(f"tessera agent: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if not removed:
        print("nothing of an agent was found here")


def clean_up(config: AgentConfig) -> int:
    """How many things were removed; each is printed. Raises `Unusable` while an agent runs."""
    if os.geteuid() != 0:
        raise Unusable("taking an agent's traces off needs root: run as root")
    count = 0
    with api.only_agent(Path(config.run_dir)):
        for line in _steps(config):
            print(line, flush=True)
            count += 1
    for name in (api.SOCKET_NAME, api.LOCK_NAME):
        Path(config.run_dir, name).unlink(missing_ok=True)
    return count


def _steps(config: AgentConfig) -> Iterator[str]:
    state_dir, bpf_dir = Path(config.state_dir), Path(config.bpf_dir)
    journal = checkpoint.load_journal(state_dir) if state_dir.is_dir() else None
    records = journal.endpoints if journal else ()
    attachments = Attachments({}, bpf_dir, "auto")
    known = {record.outer: record.ref for record in records}
    for outer in sorted(attachments.names() | known.keys()):
        attachments.detach(outer)
        if outer in known or outer.startswith(OUTER_PREFIX):
            if links.delete_veth(outer):
                yield f"interface {outer}" + (f" of {known[outer]}" if outer in known else "")
        else:
            yield f"programs on {outer}"
    router = Router(config.node_name)
    if routes := router.held():
        router.drop(routes)
        yield f"{len(routes)} routes to endpoints of other nodes"
    overlay = overlay_name(config.node_name)
    if links.delete_veth(overlay):
        yield f"interface {overlay}, the overlay"
    if bpf_dir.is_dir():
        maps = [name for name in CODECS if (bpf_dir / MAPS_DIR / name).exists()]
        shutil.rmtree(bpf_dir)
        yield f"{len(maps)} maps and every pin in {bpf_dir}"
    if journal is not None:
        log = AddressLog(state_dir)
        try:
            yield asyncio.run(_give_back(config, journal, log))
        finally:
            log.close()
    for name in (ENDPOINTS_FILE, VIEW_FILE, FILE, INSTANCE_FILE):
        path = state_dir / name
        if path.exists():
            path.unlink()
            yield f"file {path}"


async def _give_back(config: AgentConfig, journal: Journal, log: AddressLog) -> str:
    """Raises what the control plane's absence raises, before the file that names them is gone."""
    node, records = config.node_name, journal.endpoints
    async with channel(config.ipamd) as to_ipamd, channel(config.identityd) as to_identityd:
        addresses = Addressing(
            IpamServiceStub(to_ipamd),
            node,
            journal=log,
            records=lambda: records,
            networks=tuple,
            clock=SystemClock(),
        )
        try:
            await addresses.leave()
            if journal.lease:  # identities and announcements hang on it
                close = idpb.CloseSessionRequest(node=node, lease=journal.lease)
                stub = IdentityServiceStub(to_identityd)
                await call(stub.CloseSession, close, deadline_s=RPC_DEADLINE_S)
        except TesseraError as error:
            raise type(error)(
                f"{error}; addresses and identities of {len(records)} endpoints are still "
                "allocated: run this again when the control plane answers"
            ) from None
    return f"addresses and identities of {len(records)} endpoints, given back"


if __name__ == "__main__":
    main()
