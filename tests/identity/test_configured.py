import pytest

from identity.configured import ConfiguredIdentities
from identity.labels import Invalid, Labels
from identity.numbers import Scope, name_of, reserved_number, scope_of

COREDNS = (
    "k8s:io.kubernetes.pod.namespace=kube-system",
    "k8s:io.cilium.k8s.policy.serviceaccount=coredns",
    "k8s:io.cilium.k8s.policy.cluster=default",
    "k8s:k8s-app=kube-dns",
)


def test_the_cluster_dns_has_its_number_without_anybody_allocating_it():
    known = ConfiguredIdentities("default")
    assert known.number_of(Labels.parse(COREDNS)) == 104
    twin = Labels.parse(
        (*COREDNS, "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=kube-system")
    )
    assert known.number_of(twin) == 112
    assert known.number_of(Labels.parse((*COREDNS, "k8s:more=1"))) is None


def test_well_known_numbers_are_those_of_their_names_and_of_this_cluster():
    known = ConfiguredIdentities("east")
    assert sorted(known.labels) == list(range(100, 116))
    assert len(set(known.labels.values())) == 16
    for number, labels in known.labels.items():
        assert scope_of(number) is Scope.WELL_KNOWN
        assert name_of(number) is not None
        assert labels.value("io.cilium.k8s.policy.cluster") == "east"
        assert known.number_of(labels) == number
    assert known.number_of(Labels.parse(COREDNS)) is None


def test_a_fixed_identity_is_chosen_by_one_label_whatever_the_others():
    known = ConfiguredIdentities("default", ("128=kv-store", "255=other"))
    labels = Labels.parse(("k8s:app=etcd", "k8s:io.cilium.fixed-identity=kv-store"))
    assert known.fixed_number(labels) == 128
    assert str(known.labels[known.fixed_number(labels)]) == "reserved:kv-store"


def test_a_fixed_identity_that_is_not_configured_is_refused():
    known = ConfiguredIdentities("default", ("128=kv-store",))
    with pytest.raises(Invalid, match="configured: kv-store; add"):
        known.fixed_number(Labels.parse(("k8s:app=x", "k8s:io.cilium.fixed-identity=kvstore")))


def test_reserved_labels_keep_their_numbers():
    known = ConfiguredIdentities("default")
    host = Labels.parse(("reserved:host",))
    assert known.number_of(host) == reserved_number(host) == 1


@pytest.mark.parametrize(
    "text", ["127=a", "256=a", "128", "128=", "x=a", "-130=a", "128=world", "١٢٨=a"]
)
def test_what_is_no_fixed_identity_is_refused(text):
    with pytest.raises(Invalid, match="fixed identity"):
        ConfiguredIdentities("default", (text,))


def test_a_number_or_a_name_is_given_once():
    for twice in (("128=a", "128=b"), ("128=a", "129=a")):
        with pytest.raises(Invalid, match="given away"):
            ConfiguredIdentities("default", twice)
