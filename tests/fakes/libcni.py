"""A runtime's side of CNI in the order the specification prescribes (and libcni follows): chains
forwards and backwards, prevResult, capability arguments, results kept for CHECK and DEL."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORWARDER = Path(__file__).parents[2] / "datapath" / "cni" / "forwarder.py"
STANDARD_PLUGINS = "/usr/lib/cni"


class PluginFailed(Exception):
    def __init__(self, plugin: str, error: dict[str, Any]) -> None:
        super().__init__(f"{plugin}: {error}")
        self.code = error["code"]
        self.error = error


def install_plugin(folder: Path, agent_socket: Path) -> Path:
    """As `tessera cni install` does it."""
    text = FORWARDER.read_text()
    assert text.count('"/run/tessera/agent.sock"') == 1
    plugin = folder / "tessera"
    plugin.write_text(text.replace("/run/tessera/agent.sock", str(agent_socket)))
    plugin.chmod(0o755)
    return plugin


def run_plugin(plugin: Path, environ: Mapping[str, str], stdin: bytes) -> tuple[int, Any]:
    """Exit status, and what it printed: JSON, or None for nothing."""
    done = subprocess.run([plugin], input=stdin, env=environ, capture_output=True, timeout=90)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None


@dataclass
class Runtime:
    """`network`: a conflist. `path`: folders of plugins."""

    network: dict[str, Any]
    path: list[str]
    results: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _capabilities: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    def add(
        self,
        container: str,
        netns: str,
        ifname: str = "eth0",
        args: str = "",
        capabilities: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        result: dict[str, Any] | None = None
        self._capabilities[container, ifname] = capabilities or {}
        environ = self._environ("ADD", container, ifname, netns, args)
        for plugin in self.network["plugins"]:
            result = self._run(plugin, environ, result, capabilities or {})
        assert result is not None
        self.results[container, ifname] = result
        return result

    def check(self, container: str, netns: str, ifname: str = "eth0", args: str = "") -> None:
        environ = self._environ("CHECK", container, ifname, netns, args)
        for plugin in self.network["plugins"]:
            given = self._capabilities[container, ifname]
            self._run(plugin, environ, self.results[container, ifname], given)

    def delete(self, container: str, netns: str = "", ifname: str = "eth0", args: str = "") -> None:
        environ = self._environ("DEL", container, ifname, netns, args)
        for plugin in reversed(self.network["plugins"]):
            given = self._capabilities.get((container, ifname), {})
            self._run(plugin, environ, self.results.get((container, ifname)), given)
        self.results.pop((container, ifname), None)
        self._capabilities.pop((container, ifname), None)

    def gc(self, valid: list[tuple[str, str]]) -> None:
        attachments = [{"containerID": c, "ifname": i} for c, i in valid]
        extra = {"cni.dev/valid-attachments": attachments}
        for plugin in self.network["plugins"]:
            self._run(plugin | extra, self._environ("GC"), None, {})

    def status(self) -> None:
        for plugin in self.network["plugins"]:
            self._run(plugin, self._environ("STATUS"), None, {})

    def _environ(
        self, command: str, container: str = "", ifname: str = "", netns: str = "", args: str = ""
    ) -> dict[str, str]:
        named = {
            "CNI_CONTAINERID": container,
            "CNI_IFNAME": ifname,
            "CNI_NETNS": netns,
            "CNI_ARGS": args,
        }
        given = {name: value for name, value in named.items() if value}
        path = {"CNI_PATH": ":".join(self.path), "PATH": os.environ["PATH"]}
        return {"CNI_COMMAND": command} | given | path

    def _run(
        self,
        plugin: Mapping[str, Any],
        environ: Mapping[str, str],
        previous: dict[str, Any] | None,
        capabilities: Mapping[str, Any],
    ) -> Any:
        config = {key: value for key, value in plugin.items() if key != "capabilities"}
        config |= {key: self.network[key] for key in ("cniVersion", "name")}
        wanted = {k: v for k, v in capabilities.items() if plugin.get("capabilities", {}).get(k)}
        if wanted:
            config["runtimeConfig"] = wanted
        if previous is not None:
            config["prevResult"] = previous
        program = next(
            Path(folder, plugin["type"])
            for folder in self.path
            if Path(folder, plugin["type"]).exists()
        )
        status, printed = run_plugin(program, environ, json.dumps(config).encode())
        if status:
            raise PluginFailed(plugin["type"], printed)
        return printed
