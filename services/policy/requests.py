"""One L7 request against the merged rules of a proxy: would it be let through?

    "GET http://shop.example/cart" --parse--> Request --passes--> True, False, or None: not asked

For explanations on paper; what judges requests of a running node is its proxy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from services.policy.fqdn import name_matches
from services.policy.l7 import DNS, HTTP, ProxyPart, ProxySet
from services.runtime.errors import Invalid


@dataclass(frozen=True, slots=True)
class Request:
    """`name`: of dns; the rest of http, of which headers are not asked about."""

    parser: str
    method: str = ""
    host: str = ""
    path: str = ""
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Request:
        """`GET /path`, `GET http://host/path` or `dns NAME`. Raises Invalid."""
        word, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        if word.lower() == DNS and rest:
            return cls(DNS, name=rest)
        url = urlsplit(rest)
        if not word.isalpha() or not url.path.startswith("/"):
            raise Invalid(f"request {text!r} is not written like GET /path or dns example.com")
        path = f"{url.path}?{url.query}" if url.query else url.path
        return cls(HTTP, word.upper(), url.hostname or "", path)

    def __str__(self) -> str:
        return f"{DNS} {self.name}" if self.parser == DNS else f"{self.method} {self.path}"


def passes(proxy: ProxySet, request: Request) -> bool | None:
    """None: no rule is about requests of this kind."""
    for part in proxy.parts:
        if part.parser == request.parser:
            return part.any_request or _any_rule(part, request)
    return None


def _any_rule(part: ProxyPart, request: Request) -> bool:
    return any(_MATCHES[part.parser](json.loads(text), request) for text in part.rules)


def _http(rule: Mapping[str, Any], request: Request) -> bool:
    """Fields are whole-match expressions, ANDed; a rule about headers asks for what is not told."""
    if rule.get("headers") or rule.get("headerMatches"):
        return False
    asked = {"method": request.method, "host": request.host, "path": request.path}
    return all(re.fullmatch(rule[f], text) for f, text in asked.items() if rule.get(f))


def _dns(rule: Mapping[str, Any], request: Request) -> bool:
    return name_matches(rule["name"], request.name)


_MATCHES: Final[Mapping[str, Callable[[Mapping[str, Any], Request], bool]]] = {
    HTTP: _http,
    DNS: _dns,
}
