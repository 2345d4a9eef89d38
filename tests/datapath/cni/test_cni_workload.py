"""A container's namespace, name and labels, from whatever a runtime says of it."""

from __future__ import annotations

import pytest

from datapath.cni.request import NetConf, Request
from datapath.cni.spec import CniError, Command
from datapath.cni.workload import (
    ANNOTATION,
    ANNOTATIONS,
    IPS_ANNOTATION,
    POOL_ANNOTATION,
    addresses_of,
    labels_of,
    mac_of,
    name_of,
    namespace_of,
    pool_of,
)

ID = "0123456789abcdef0123456789abcdef"


def request(cni_args=None, interface="eth0", **config):
    return Request(Command.ADD, NetConf(**config), ID, interface, "/run/netns/a", cni_args or {})


def test_a_pod_has_its_own_namespace_and_name():
    pod = request({"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": "web-1"}, namespace="default")
    assert (namespace_of(pod), name_of(pod)) == ("shop", "web-1")


def test_a_container_without_a_name_is_called_by_its_id():
    plain = request(namespace="batch")
    assert (namespace_of(plain), name_of(plain)) == ("batch", "0123456789ab")


def test_a_second_interface_is_an_endpoint_of_its_own():
    assert name_of(request({"K8S_POD_NAME": "web"}, interface="net1")) == "web.net1"


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ({"labels": {"app": "web"}}, None),
        ({"args": {"cni": {"labels": [{"key": "app", "value": "web"}]}}}, None),
        ({"args": {"cni": {"labels": {"app": "web"}}}}, None),
        ({"runtime_config": {"labels": {"app": "web"}}}, None),
        ({"runtime_config": {ANNOTATIONS: {ANNOTATION: "app=web", "other": "x"}}}, None),
        ({}, "# of the shop\napp = web\n"),
    ],
)
def test_every_source_of_labels_is_read(config, file):
    assert labels_of(request(**config), file) == ("k8s:app=web",)


def test_later_sources_win_and_the_others_stay():
    config = {
        "labels": {"app": "a", "tier": "front"},
        "runtime_config": {ANNOTATIONS: {ANNOTATION: "app=b,container:image=x"}},
    }
    assert labels_of(request(**config), "app=c") == (
        "container:image=x",
        "k8s:app=c",
        "k8s:tier=front",
    )


def test_nobody_knowing_any_label_is_told_apart_by_their_absence():
    assert labels_of(request(), None) == ()
    assert labels_of(request(args={"cni": None}, runtime_config={ANNOTATIONS: None}), None) == ()


@pytest.mark.parametrize("labels", [7, [7], [{"value": "x"}], {"app": 7}, [{"key": 7}]])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(CniError, match=r"args\.cni\.labels"):
        labels_of(request(args={"cni": {"labels": labels}}), None)


@pytest.mark.parametrize(
    ("args", "config"),
    [
        ({"IP": "10.0.0.7"}, {}),
        ({}, {"runtime_config": {"ips": ["10.0.0.7/24"]}}),
        ({}, {"args": {"cni": {"ips": ["10.0.0.7"]}}}),
        ({}, {"runtime_config": {ANNOTATIONS: {IPS_ANNOTATION: "10.0.0.7"}}}),
        ({"IP": "10.0.0.8"}, {"runtime_config": {"ips": ["10.0.0.7"]}}),
    ],
)
def test_wanted_addresses_are_read_wherever_a_runtime_puts_them(args, config):
    assert addresses_of(request(args, **config)) == ("10.0.0.7",)


def test_addresses_that_are_no_list_are_refused():
    with pytest.raises(CniError, match=r"runtimeConfig\.ips"):
        addresses_of(request(runtime_config={"ips": {"a": 1}}))


def test_a_pods_pool_goes_before_the_networks():
    chosen = {ANNOTATIONS: {POOL_ANNOTATION: "blue"}}
    assert pool_of(request(pool="red")) == "red"
    assert pool_of(request(pool="red", runtime_config=chosen)) == "blue"


@pytest.mark.parametrize(
    ("args", "config"),
    [
        ({"MAC": "02:00:00:00:00:0A"}, {}),
        ({}, {"runtime_config": {"mac": "02:00:00:00:00:0a"}}),
        ({}, {"args": {"cni": {"mac": "02:00:00:00:00:0a"}}}),
    ],
)
def test_a_wanted_mac_is_read_wherever_a_runtime_puts_it(args, config):
    assert mac_of(request(args, **config)) == b"\x02\0\0\0\0\x0a"


@pytest.mark.parametrize("mac", ["x", "02:00:00:00:00", "01:00:5e:00:00:01", "0:0:0:0:0:0", 7])
def test_a_mac_no_interface_can_have_is_refused(mac):
    with pytest.raises(CniError, match="MAC"):
        mac_of(request(runtime_config={"mac": mac}))


def test_without_a_wish_any_mac_will_do():
    assert mac_of(request()) == bytes(6)
