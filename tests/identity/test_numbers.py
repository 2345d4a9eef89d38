from itertools import pairwise

import pytest

from identity import keys
from identity.labels import Invalid, Labels
from identity.numbers import (
    KUBE_APISERVER,
    UNKNOWN,
    Scope,
    allocatable,
    cluster_of,
    name_of,
    reserved_labels,
    reserved_number,
    scope_for,
    scope_of,
)


@pytest.mark.parametrize(
    ("number", "scope"),
    [
        (0, Scope.RESERVED),
        (11, Scope.RESERVED),
        (100, Scope.WELL_KNOWN),
        (115, Scope.WELL_KNOWN),
        (116, Scope.RESERVED),
        (128, Scope.FIXED),
        (255, Scope.FIXED),
        (256, Scope.CLUSTER),
        (0xFFFFFF, Scope.CLUSTER),
        (1 << 24, Scope.LOCAL),
        (33554431, Scope.LOCAL),
        (2 << 24, Scope.REMOTE_NODE),
    ],
)
def test_the_bits_of_a_number_give_its_scope(number, scope):
    assert scope_of(number) is scope


@pytest.mark.parametrize("number", [-1, 3 << 24, 1 << 32])
def test_numbers_of_no_scope_are_refused(number):
    with pytest.raises(Invalid):
        scope_of(number)


def test_each_cluster_hands_out_its_own_range():
    assert allocatable(0) == range(256, 65536)
    assert allocatable(3) == range(0x30000, 0x40000)
    assert cluster_of(199472) == 3
    with pytest.raises(Invalid, match="256"):
        allocatable(256)


def test_a_mesh_of_511_clusters_gives_the_cluster_a_bit_of_the_local_number():
    assert allocatable(0, 511) == range(256, 32768)
    assert allocatable(511, 511) == range(511 << 15, 1 << 24)
    ranges = [allocatable(cluster, 511) for cluster in range(512)]
    assert all(one.stop <= other.start for one, other in pairwise(ranges))
    assert all(cluster_of(each[-1], 511) == cluster for cluster, each in enumerate(ranges))
    with pytest.raises(Invalid, match="512"):
        allocatable(512, 511)
    with pytest.raises(Invalid, match="300"):
        allocatable(1, 300)


def test_reserved_identities_have_labels_and_names_and_unknown_has_no_labels():
    assert UNKNOWN not in reserved_labels()
    assert sorted(reserved_labels()) == list(range(1, 12))
    assert str(reserved_labels()[KUBE_APISERVER]) == "reserved:kube-apiserver reserved:remote-node"
    assert [name_of(n) for n in (0, 1, 2, 102, 110, 116, 256)] == [
        "unknown", "host", "world", "kube-dns", "kube-dns", None, None,
    ]  # fmt: skip
    for number, labels in reserved_labels().items():
        assert reserved_number(labels) == number


@pytest.mark.parametrize(
    ("texts", "scope"),
    [
        (["reserved:health"], Scope.RESERVED),
        (["reserved:remote-node", "k8s:x=y"], Scope.REMOTE_NODE),
        (["cidr:10.0.0.0/8", "reserved:world"], Scope.LOCAL),
        (["k8s:app=x"], Scope.CLUSTER),
        (["k8s:app=x", "cidr:10.0.0.0/8"], Scope.CLUSTER),
    ],
)
def test_labels_tell_the_scope_of_their_identity(texts, scope):
    assert scope_for(Labels.parse(texts)) is scope


def test_keys_read_back_and_foreign_keys_do_not():
    assert keys.number_in(keys.id_key(256), keys.ID_PREFIX) == 256
    assert keys.ref_in(keys.ref_key(256, "node-a")) == (256, "node-a")
    for foreign in ("07", "+7", "x", "", "1/2", "٣", "99999999999"):
        assert keys.number_in(keys.ID_PREFIX + foreign, keys.ID_PREFIX) is None
    assert keys.number_in("elsewhere/7", keys.ID_PREFIX) is None
    for foreign in ("7", "7/", "x/node", "/node"):
        assert keys.ref_in(keys.REF_PREFIX + foreign) is None
