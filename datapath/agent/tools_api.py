"""What the tools that read the kernel ask the agent for, on its socket.

POST /v1/verify[?repair=1]    desired rows against the kernel's: a verify.Report
GET  /v1/rules                rule id -> what it is called, for every rule the node knows
POST /v1/break-glass          nothing of the node's own is judged; DELETE: it is again
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from aiohttp import web

from datapath.agent.hostfirewall import HostFirewall
from datapath.agent.verify import Verifier
from datapath.agent.view import View


@dataclass(frozen=True, slots=True)
class ToolsApi:
    verifier: Verifier
    view: View
    firewall: HostFirewall

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/verify", self.verify),
            web.get("/v1/rules", self.rules),
            web.post("/v1/break-glass", self.break_glass),
            web.delete("/v1/break-glass", self.mend),
        ]

    async def break_glass(self, _request: web.Request) -> web.Response:
        self.firewall.break_glass()
        return _json({"host_firewall": self.firewall.state})

    async def mend(self, _request: web.Request) -> web.Response:
        self.firewall.mend()
        return _json({"host_firewall": self.firewall.state})

    async def verify(self, request: web.Request) -> web.Response:
        repair = request.query.get("repair", "") not in ("", "0", "false")
        return _json(self.verifier.verify(repair=repair))

    async def rules(self, _request: web.Request) -> web.Response:
        return _json({str(number): str(rule) for number, rule in self.view.rules.items()})


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
