"""Veth pairs and what their refusals say."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from datapath import links
from services.runtime.errors import Conflict, Invalid, NotFound
from tests.fakes.kernel_node import needs_kernel
from tests.fakes.netns import Namespace

pytestmark = pytest.mark.kernel

ADDRESS = IPv4Address("10.80.0.5")


@pytest.fixture
def host() -> Iterator[Namespace]:
    needs_kernel()
    made = Namespace.create()
    yield made
    made.delete()


@pytest.fixture
def guest(host: Namespace) -> Iterator[Namespace]:
    made = Namespace.create()
    yield made
    made.delete()


def create(host: Namespace, guest: str, inner: str = "eth0", outer: str = "t0") -> links.VethInfo:
    return host.call(lambda: links.create_veth(guest, inner, outer, ADDRESS, mtu=1400))


def test_a_pair_has_no_carrier_until_set_up(host: Namespace, guest: Namespace) -> None:
    info = create(host, guest.name)
    assert "NO-CARRIER" in guest.ip("link show eth0")
    host.call(lambda: links.set_up("t0", ADDRESS, info.mac))
    host.call(lambda: links.set_up("t0", ADDRESS, info.mac))
    assert "NO-CARRIER" not in guest.ip("link show eth0")
    assert "mtu 1400" in guest.ip("link show eth0")
    assert info.mac.hex(":") in guest.ip("link show eth0")
    assert info.host_mac.hex(":") in host.ip("link show t0")
    assert "10.80.0.5/32" in guest.ip("addr show eth0")
    assert "default via 169.254.1.1 dev eth0" in guest.ip("route")
    assert f"{info.host_mac.hex(':')} PERMANENT" in guest.ip("neigh show 169.254.1.1")
    assert "10.80.0.5 dev t0" in host.ip("route")
    assert f"{info.mac.hex(':')} PERMANENT" in host.ip("neigh show 10.80.0.5")
    assert host.call(lambda: links.list_outer("t")) == {"t0": info.ifindex}
    with guest.listen(80):
        host.ip("addr add 10.80.9.9/32 dev lo")
        assert host.can_connect(str(ADDRESS), 80)


def test_deleting_is_repeatable(host: Namespace, guest: Namespace) -> None:
    create(host, guest.path)
    assert host.call(lambda: links.delete_veth("t0"))
    assert not host.call(lambda: links.delete_veth("t0"))
    assert "eth0" not in guest.ip("link")


def test_names_that_are_taken_or_wrong_are_refused_and_leave_nothing(
    host: Namespace, guest: Namespace
) -> None:
    create(host, guest.name)
    with pytest.raises(Conflict, match="has an interface eth0 already"):
        create(host, guest.name, outer="t1")
    with pytest.raises(Conflict, match="interface t0 exists already"):
        create(host, guest.name, inner="eth1")
    with pytest.raises(Conflict, match="has a default route already"):
        create(host, guest.name, inner="eth1", outer="t1")
    with pytest.raises(Invalid, match="no interface name"):
        create(host, guest.name, inner="a name that is too long")
    assert host.call(lambda: links.list_outer("t")).keys() == {"t0"}
    assert "eth1" not in guest.ip("link")


def test_a_missing_namespace_is_named(host: Namespace) -> None:
    with pytest.raises(NotFound, match="no network namespace nowhere"):
        create(host, "nowhere")
    assert not links.netns_exists("nowhere")
    assert links.netns_exists(host.name)
    assert links.netns_exists(f"/run/netns/{host.name}")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/etc/passwd", "is no network namespace"),
        ("/tmp", "is no network namespace"),
        ("/proc/self/ns/uts", "is no network namespace"),
        ("/proc/self/ns/net", "the host's own"),
    ],
)
def test_what_cannot_be_an_endpoints_namespace_is_refused(path: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        links.netns_exists(path)


def test_the_nodes_addresses_begin_with_the_default_routes(host: Namespace) -> None:
    host.ip("link add a0 type veth peer name a1")
    host.ip("link add b0 type veth peer name b1")
    for command in (
        "addr add 10.1.0.1/24 dev a0",
        "addr add 10.2.0.1/24 dev b0",
        "link set a0 up",
        "link set b0 up",
        "route add default via 10.2.0.2",
    ):
        host.ip(command)
    addresses = host.call(links.node_addresses)
    assert addresses == (IPv4Address("10.2.0.1"), IPv4Address("10.1.0.1"))
