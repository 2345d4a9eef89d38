"""What a runtime's request is read as, and by which code it is refused."""

from __future__ import annotations

import json

import pytest

from datapath.cni.request import parse, split, version_of
from datapath.cni.spec import NEWEST, SUPPORTED, CniError, Code, Command

ENVIRON = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/a",
    "CNI_IFNAME": "eth0",
}
CONFIG = {"cniVersion": "1.0.0", "name": "pods", "type": "tessera"}


def asked(environ=None, config=None):
    return parse(ENVIRON | (environ or {}), json.dumps(CONFIG | (config or {})).encode())


def refused(environ=None, config=None) -> CniError:
    with pytest.raises(CniError) as caught:
        asked(environ, config)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_request_is_read_whole():
    found = asked(
        {"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web"},
        {"mtu": 1400, "routes": [{"dst": "10.0.0.0/8"}], "dns": {"nameservers": ["10.0.0.53"]}},
    )
    assert (found.container, found.interface, found.netns) == ("c1", "eth0", "/run/netns/a")
    assert found.args["K8S_POD_NAME"] == "web"
    assert found.config.mtu == 1400
    assert [route.dst for route in found.config.routes] == ["10.0.0.0/8"]
    assert found.config.dns.nameservers == ("10.0.0.53",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CNI_COMMAND", "PING"),
        ("CNI_COMMAND", ""),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "-c1"),
        ("CNI_CONTAINERID", "a/b"),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "a b"),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "sixteen-letters-"),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "a"),
        ("CNI_ARGS", "novalue"),
    ],
)
def test_a_bad_variable_is_named(name, value):
    error = refused({name: value})
    assert error.code is Code.BAD_ENVIRONMENT
    assert name in str(error)


def test_deleting_needs_no_namespace():
    found = asked({"CNI_COMMAND": "DEL", "CNI_NETNS": ""})
    assert (found.command, found.netns) == (Command.DEL, "")


def test_deleting_reads_a_configuration_that_adding_refuses():
    bad = {"nonsense": 1, "mtu": "large", "prevResult": {"ips": 7}}
    assert refused(config=bad).code is Code.UNSUPPORTED_FIELD
    assert asked({"CNI_COMMAND": "DEL", "CNI_ARGS": "novalue"}, bad).container == "c1"


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "1.2.0", "", None, 1])
def test_other_versions_are_refused_with_the_list_of_supported_ones(version):
    error = refused(config={"cniVersion": version})
    assert error.code is Code.INCOMPATIBLE_VERSION
    assert all(one in error.details for one in SUPPORTED)


@pytest.mark.parametrize(
    ("command", "before"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")]
)
def test_a_command_is_as_old_as_the_specification_says(command, before):
    error = refused({"CNI_COMMAND": command}, {"cniVersion": before})
    assert error.code is Code.INCOMPATIBLE_VERSION
    assert asked({"CNI_COMMAND": command}, {"cniVersion": "1.1.0"}).command == command


@pytest.mark.parametrize("stdin", [b"", b"{", b"[]", b"null", b"\xff"])
def test_what_is_no_json_object_is_undecodable(stdin):
    with pytest.raises(CniError) as caught:
        parse(ENVIRON, stdin)
    assert caught.value.code is Code.UNDECODABLE


def test_an_unsupported_field_is_named_with_its_value():
    error = refused(config={"bridge": "cni0"})
    assert error.code is Code.UNSUPPORTED_FIELD
    assert 'bridge: "cni0"' in str(error)


@pytest.mark.parametrize(
    "config",
    [
        {"name": ""},
        {"name": "a/b"},
        {"mtu": -1},
        {"mtu": 70_000},
        {"mtu": "1500"},
        {"labels": ["app=web"]},
        {"routes": [{"dst": "10.0.0.1/8"}]},
        {"routes": [{}]},
        {"dns": {"nameservers": "10.0.0.53"}},
    ],
)
def test_a_bad_configuration_is_refused(config):
    assert refused(config=config).code is Code.BAD_CONFIG


def test_version_answers_whatever_is_asked():
    assert parse({"CNI_COMMAND": "VERSION"}, b'{"cniVersion":"9.0.0"}').version == "9.0.0"
    assert parse({"CNI_COMMAND": "VERSION"}, b"").version == NEWEST


def test_the_forwarders_body_is_taken_apart_where_the_environment_ends():
    environ, stdin = split(b"CNI_ARGS=a=b;c=\0CNI_COMMAND=ADD\0\0{}\0\0")
    assert environ == {"CNI_ARGS": "a=b;c=", "CNI_COMMAND": "ADD"}
    assert stdin == b"{}\0\0"
    with pytest.raises(CniError):
        split(b"{}")


@pytest.mark.parametrize("stdin", [b"", b"{}", b"[]", b'{"cniVersion": 7}'])
def test_errors_are_answered_in_some_version_always(stdin):
    assert version_of(stdin) == NEWEST
