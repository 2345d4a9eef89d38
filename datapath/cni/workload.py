"""Who a container is: its namespace, its name and its labels, from what the runtime says.

Labels, each source over those before it:

    labels of the network configuration               every container of the network
    args.cni.labels                                   a convention of CNI's runtimes
    runtimeConfig.labels                              capability `labels`
    runtimeConfig["io.kubernetes.cri.pod-annotations"]["tessera.io/labels"]   containerd, CRI-O
    <labels_dir>/<namespace>/<name>                   whoever starts containers, beforehand
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from datapath.cni.request import Request
from datapath.cni.spec import CniError, Code

ANNOTATIONS: Final = "io.kubernetes.cri.pod-annotations"
ANNOTATION: Final = "tessera.io/labels"
IPS_ANNOTATION: Final = "ipam.tessera.io/ips"
POOL_ANNOTATION: Final = "ipam.cilium.io/ip-pool"
FIRST_INTERFACE: Final = "eth0"
# Container ids may be longer than a name of Kubernetes; runtimes show the first twelve digits.
_ID_SHOWN: Final = 12
_MAC: Final = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_SEPARATORS: Final = re.compile(r"[,\n]")


def namespace_of(request: Request) -> str:
    return request.args.get("K8S_POD_NAMESPACE") or request.config.namespace


def addresses_of(request: Request) -> tuple[str, ...]:
    """Those it is to have, without prefix length; empty: any. The runtime's word before the
    pod's: capability `ips`, args.cni.ips, CNI_ARGS IP, annotation."""
    runtime = request.config.runtime_config
    convention = request.config.args.get("cni", {})
    sources: Iterable[tuple[str, object]] = (
        ("runtimeConfig.ips", runtime.get("ips")),
        ("args.cni.ips", convention.get("ips") if isinstance(convention, dict) else None),
        ("CNI_ARGS IP", request.args.get("IP")),
        (f"annotation {IPS_ANNOTATION}", annotations_of(request).get(IPS_ANNOTATION)),
    )
    for name, given in sources:
        if given:
            found = given.split(",") if isinstance(given, str) else given
            if not isinstance(found, list):
                raise CniError(Code.BAD_CONFIG, f"{name}: {given!r} is no list of addresses")
            return tuple(_text(name, one).strip().partition("/")[0] for one in found)
    return ()


def mac_of(request: Request) -> bytes:
    """Of the container's interface; zeros: any. Capability `mac`, args.cni.mac, CNI_ARGS MAC."""
    convention = request.config.args.get("cni", {})
    given = (
        request.config.runtime_config.get("mac")
        or (convention.get("mac") if isinstance(convention, dict) else None)
        or request.args.get("MAC")
    )
    if not given:
        return bytes(6)
    if not isinstance(given, str) or not _MAC.fullmatch(given):
        raise CniError(Code.BAD_CONFIG, f"MAC {given!r} is not like 02:00:00:00:00:01")
    mac = bytes.fromhex(given.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise CniError(
            Code.BAD_CONFIG, f"MAC {given} is no interface's: zeros, or an address of many"
        )
    return mac


def pool_of(request: Request) -> str:
    return str(annotations_of(request).get(POOL_ANNOTATION) or request.config.pool)


def annotations_of(request: Request) -> Mapping[str, object]:
    found = request.config.runtime_config.get(ANNOTATIONS)
    return found if isinstance(found, dict) else {}


def is_pod(request: Request) -> bool:
    """Its labels are known to somebody, who will tell them; until then it is `init`."""
    return bool(request.args.get("K8S_POD_NAMESPACE"))


def name_of(request: Request) -> str:
    """A container's second interface is an endpoint of its own."""
    name = request.args.get("K8S_POD_NAME") or request.container[:_ID_SHOWN]
    return name if request.interface == FIRST_INTERFACE else f"{name}.{request.interface}"


def labels_of(request: Request, file: str | None) -> tuple[str, ...]:
    """As source:key=value; none when no source knows any. `file`: the text of the labels file, if
    there is one."""
    runtime = request.config.runtime_config
    convention = request.config.args.get("cni", {})
    sources: Iterable[tuple[str, object]] = (
        ("labels", request.config.labels),
        ("args.cni.labels", convention.get("labels") if isinstance(convention, dict) else None),
        ("runtimeConfig.labels", runtime.get("labels")),
        (f"annotation {ANNOTATION}", annotations_of(request).get(ANNOTATION)),
        ("labels file", file),
    )
    found: dict[str, str] = {}
    for name, given in sources:
        for key, value in _pairs(name, given):
            found[_sourced(key)] = value
    return tuple(sorted(f"{key}={value}" for key, value in found.items()))


def _pairs(name: str, given: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401  JSON of anybody's
    """A mapping, a list of {key, value}, or text: key=value by commas or lines, # for comments."""
    match given:
        case None:
            return
        case str():
            for word in _SEPARATORS.split(given):
                if (pair := word.partition("#")[0].strip()) != "":
                    key, _, value = pair.partition("=")
                    yield key.strip(), value.strip()
        case Mapping():
            yield from ((_text(name, key), _text(name, value)) for key, value in given.items())
        case list():
            for one in given:
                if not isinstance(one, dict) or "key" not in one:
                    raise CniError(
                        Code.BAD_CONFIG, f'{name}: {one!r} is not {{"key": ..., "value": ...}}'
                    )
                yield _text(name, one["key"]), _text(name, one.get("value", ""))
        case _:
            raise CniError(Code.BAD_CONFIG, f"{name}: neither a mapping nor a list of labels")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise CniError(Code.BAD_CONFIG, f"{name}: {value!r} is no text")
    return value


def _sourced(key: str) -> str:
    return key if ":" in key else f"k8s:{key}"
