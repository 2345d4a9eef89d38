"""What is done for a request, given what the node has: values in, values out."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address

import pytest

from datapath.agent.endpoints import Wanted
from datapath.agent.record import EndpointRecord, State
from datapath.cni import decide
from datapath.cni.request import NetConf, Request, ValidAttachment
from datapath.cni.result import Seen, differences, result
from datapath.cni.spec import CniError, Code, Command, Interface, Ip, Result, Route
from datapath.links import Inside

RECORD = EndpointRecord(
    id=3,
    namespace="shop",
    name="web",
    labels=(),
    netns="/run/netns/a",
    interface="eth0",
    outer="tes0123456789ab",
    state=State.READY,
    identity=300,
    address=0x0A000001,
    ifindex=7,
    mac=b"\x02" * 6,
    host_mac=b"\x04" * 6,
    container="c1",
    network="pods",
)


def request(command=Command.ADD, container="c1", netns="/run/netns/a", **config):
    base = {"cni_version": "1.0.0", "name": "pods"}
    return Request(command, NetConf(**(base | config)), container, "eth0", netns)


def wanted(name="web", netns="/run/netns/a"):
    return Wanted("shop", name, (), netns, "eth0")


def decided(records, *, lives=True, ask=None, name="web"):
    return decide.addition(ask or request(), wanted(name), records, lambda _: lives)


def test_nothing_in_the_way_is_made():
    assert decided([]) == decide.Make()
    assert decided([replace(RECORD, container="c2")], name="other") == decide.Make()


def test_the_same_request_again_has_the_same_answer():
    assert decided([RECORD]) == decide.Answer(RECORD)


def test_an_answer_whose_interface_is_gone_is_made_anew():
    assert decided([RECORD], lives=False) == decide.Replace(RECORD)


def test_a_container_begun_anew_in_another_namespace_replaces_the_old_one():
    again = request(netns="/run/netns/b")
    assert decided([RECORD], ask=again) == decide.Replace(RECORD)


def test_a_pods_new_sandbox_takes_over_from_one_that_is_gone():
    new = request(container="c2")
    assert decided([RECORD], ask=new, lives=False) == decide.Replace(RECORD)


@pytest.mark.parametrize("held", [RECORD, replace(RECORD, container="")])
def test_a_name_that_somebody_lives_under_is_not_taken_away(held):
    with pytest.raises(CniError, match="shop/web belongs to") as caught:
        decided([held], ask=request(container="c2"))
    assert caught.value.code is Code.TRY_AGAIN


def test_what_is_only_waiting_to_be_released_is_in_nobodys_way():
    assert decided([replace(RECORD, state=State.RELEASING)]) == decide.Make()


def test_chained_after_somebody_elses_interface_is_refused_by_name():
    before = Result("1.0.0", (Interface("cni0"), Interface("eth0", sandbox="/run/netns/a")))
    with pytest.raises(CniError, match=r"not the first plugin.*cni0, eth0") as caught:
        decided([], ask=request(prev_result=before))
    assert caught.value.code is Code.BAD_CONFIG


def test_deleting_takes_one_attachment():
    other = replace(RECORD, id=4, container="c2")
    assert decide.attachments([RECORD, other], "c1", "eth0") == [RECORD]
    assert decide.attachments([RECORD, other], "c1", "eth1") == []
    assert decide.attachments([replace(RECORD, state=State.RELEASING)], "c1", "eth0") == []


def test_garbage_is_of_this_network_and_of_a_runtime():
    records = [
        RECORD,
        replace(RECORD, id=4, container="c2"),
        replace(RECORD, id=5, container="c3", network="others"),
        replace(RECORD, id=6, container="", network=""),
        replace(RECORD, id=7, container="c4", state=State.RELEASING),
        replace(RECORD, id=8, interface="eth1"),
    ]
    valid = request(Command.GC, valid_attachments=(ValidAttachment("c1", "eth0"),))
    assert [r.id for r in decide.garbage(valid, records)] == [4, 8]
    none = request(Command.GC, valid_attachments=())
    assert [r.id for r in decide.garbage(none, records)] == [3, 4, 8]


def test_garbage_collection_without_a_list_removes_nothing():
    with pytest.raises(CniError, match="valid-attachments"):
        decide.garbage(request(Command.GC), [RECORD])


@pytest.mark.parametrize(
    ("version", "family", "mtu"), [("0.3.1", "4", 0), ("1.0.0", "", 0), ("1.1.0", "", 1400)]
)
def test_a_result_has_what_its_version_has(version, family, mtu):
    made = result(replace(RECORD, mtu=1400), request(cni_version=version))
    assert made.interfaces == (
        Interface("tes0123456789ab", "04:04:04:04:04:04", mtu=mtu),
        Interface("eth0", "02:02:02:02:02:02", "/run/netns/a", mtu),
    )
    assert made.ips == (Ip("10.0.0.1/32", family, "169.254.1.1", 1),)
    assert made.routes == (Route("0.0.0.0/0", "169.254.1.1"),)


@pytest.mark.parametrize(("version", "families"), [("0.4.0", ["4", "6"]), ("1.0.0", ["", ""])])
def test_a_result_has_both_families_with_the_gateway_of_each(version, families):
    both = replace(RECORD, address6=int(IPv6Address("fd00::1")))
    made = result(both, request(cni_version=version))
    assert made.ips == (
        Ip("10.0.0.1/32", families[0], "169.254.1.1", 1),
        Ip("fd00::1/128", families[1], "fe80::1", 1),
    )
    assert made.routes == (Route("0.0.0.0/0", "169.254.1.1"), Route("::/0", "fe80::1"))


def test_routes_of_a_family_without_an_address_are_not_made():
    only = replace(RECORD, routes=("10.0.0.0/8", "fd00::/8"))
    assert [route.dst for route in result(only, request()).routes] == ["10.0.0.0/8"]


def test_a_result_lists_the_routes_that_were_asked_for():
    made = result(replace(RECORD, routes=("10.0.0.0/8",)), request())
    assert [route.dst for route in made.routes] == ["10.0.0.0/8"]


INSIDE = Inside(b"\x02" * 6, True, frozenset({"10.0.0.1/32"}), frozenset({"0.0.0.0/0"}))
SEEN = Seen(INSIDE, outer=True, carrier=True, judged=True, row=True, delivered=True)


def found(seen):
    check = request(Command.CHECK, prev_result=result(RECORD, request()))
    return list(differences(check, RECORD, seen))


def test_an_endpoint_as_it_was_added_has_no_difference():
    assert found(SEEN) == []


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (replace(SEEN, outer=False), "tes0123456789ab is gone"),
        (replace(SEEN, carrier=False), "tes0123456789ab is down"),
        (replace(SEEN, judged=False), "no programs judge"),
        (replace(SEEN, row=False), "endpoints map"),
        (replace(SEEN, delivered=False), "does not lead 10.0.0.1"),
        (replace(SEEN, inside=None), "eth0 is not in /run/netns/a"),
        (replace(SEEN, inside=replace(INSIDE, up=False)), "eth0 is down"),
        (replace(SEEN, inside=replace(INSIDE, mac=b"\x06" * 6)), "has MAC 06:06:06:06:06:06"),
        (replace(SEEN, inside=replace(INSIDE, addresses=frozenset())), "lacks address"),
        (replace(SEEN, inside=replace(INSIDE, routes=frozenset())), "route to 0.0.0.0/0 is gone"),
    ],
)
def test_each_part_that_is_missing_is_told(seen, words):
    (told,) = found(seen)
    assert words in told


def test_another_address_than_the_runtime_believes_in_is_told():
    believed = result(replace(RECORD, address=0x0A000002), request())
    check = request(Command.CHECK, prev_result=believed)
    assert list(differences(check, RECORD, SEEN)) == [
        "prevResult has 10.0.0.2/32, the endpoint has 10.0.0.1/32"
    ]


def test_checking_without_the_former_result_is_refused():
    with pytest.raises(CniError, match="prevResult"):
        list(differences(request(Command.CHECK), RECORD, SEEN))
