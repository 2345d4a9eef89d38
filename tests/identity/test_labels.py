import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.labels import FilterRule, Invalid, Label, LabelFilter, Labels

keys = st.from_regex(r"[a-z][a-z0-9./_-]{0,12}", fullmatch=True)
values = st.from_regex(r"[A-Za-z0-9=:/.-]{0,8}", fullmatch=True)
label_sets = st.dictionaries(
    keys, st.tuples(st.sampled_from(["k8s", "any", "cidr", "unspec"]), values), max_size=6
).map(lambda by_key: Labels(Label(s, k, v) for k, (s, v) in by_key.items()))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("k8s:app=web", Label("k8s", "app", "web")),
        ("app=web", Label("unspec", "app", "web")),
        ("app", Label("unspec", "app", "")),
        ("k8s:app=", Label("k8s", "app", "")),
        ("url=http://x", Label("unspec", "url", "http://x")),
        ("k8s:a=b=c", Label("k8s", "a", "b=c")),
        ("$host", Label("reserved", "host", "")),
        ("reserved:host", Label("reserved", "host", "")),
        ("cidr:10.0.0.0/8", Label("cidr", "10.0.0.0/8", "")),
        ("cidr:2001:db8::/32", Label("cidr", "2001:db8::/32", "")),
    ],
)
def test_a_label_reads_as_source_key_value(text, label):
    assert Label.parse(text) == label


@pytest.mark.parametrize("text", ["", "=x", "k8s:", ":app=x", "k8s:=x", "a b:c=d", "k8s: app=x"])
def test_a_text_that_is_no_label_is_refused_with_the_text(text):
    with pytest.raises(Invalid, match="label"):
        Label.parse(text)


@pytest.mark.parametrize("text", ["k8s:app=a;b", "k8s:a;b=c", "k8s:app=a\nb"])
def test_what_the_stored_form_cannot_hold_is_refused(text):
    with pytest.raises(Invalid, match="cannot be stored"):
        Label.parse(text)


def test_the_stored_form_is_ordered_by_key_and_ends_each_label():
    labels = Labels.parse(["k8s:b=2", "any:a", "k8s:c.d/e=f"])
    assert labels.canonical() == "any:a=;k8s:b=2;k8s:c.d/e=f;"
    assert labels.strings() == ("any:a", "k8s:b=2", "k8s:c.d/e=f")


@given(label_sets)
def test_every_label_set_survives_the_stored_form_and_the_shown_form(labels):
    assert Labels.from_canonical(labels.canonical()) == labels
    assert Labels.parse(labels.strings()) == labels


@given(label_sets, st.randoms())
def test_the_order_given_does_not_matter(labels, random):
    shuffled = list(labels)
    random.shuffle(shuffled)
    other = Labels(shuffled)
    assert (other, hash(other), other.digest()) == (labels, hash(labels), labels.digest())
    assert list(other) == list(labels)


@given(label_sets, label_sets)
def test_different_sets_have_different_stored_forms(one, other):
    assert (one == other) == (one.canonical() == other.canonical())


def test_a_key_given_twice_is_refused_unless_it_says_the_same():
    assert len(Labels.parse(["k8s:a=1", "k8s:a=1"])) == 1
    with pytest.raises(Invalid, match=r"'a' is given twice, as 'k8s:a=1' and 'any:a=1'"):
        Labels.parse(["k8s:a=1", "any:a=1"])


def test_lookup_honours_the_source():
    labels = Labels.parse(["k8s:app=web"])
    assert labels.value("app") == labels.value("app", "any") == labels.value("app", "k8s") == "web"
    assert labels.value("app", "reserved") is None
    assert labels.value("nope") is None


def test_a_hand_edited_store_value_is_named():
    with pytest.raises(Invalid, match="stored label 'nonsense'"):
        Labels.from_canonical("nonsense;")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("reserved:host", True),
        ("k8s:app=web", True),
        ("k8s:io.kubernetes.pod.namespace=shop", True),
        ("k8s:io.kubernetes.pod.name=x", False),
        ("k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=x", True),
        ("k8s:io.cilium.k8s.policy.cluster=c", True),
        ("k8s:io.cilium.k8s.policy.serviceaccount=default", True),
        ("k8s:app.kubernetes.io/name=x", True),
        ("k8s:kubernetes.io/os=linux", False),
        ("k8s:beta.kubernetes.io/arch=x", False),
        ("k8s:node.beta.kubernetes.io/arch=x", False),
        ("k8s:k8s.io/x=y", False),
        ("k8s:statefulset.kubernetes.io/pod-name=db-0", False),
        ("k8s:apps.kubernetes.io/pod-index=0", False),
        ("k8s:batch.kubernetes.io/job-completion-index=0", False),
        ("k8s:batch.kubernetes.io/controller-uid=0", False),
        ("k8s:batch.kubernetes.io/job-name=x", True),
        ("k8s:pod-template-hash=abc", False),
        ("k8s:pod-template-generation=1", False),
        ("k8s:controller-revision-hash=abc", False),
        ("k8s:controller-uid=abc", False),
        ("k8s:annotation.x=y", False),
        ("container:etcd_node=x", False),
    ],
)
def test_the_default_filter_keeps_what_makes_an_identity(text, kept):
    assert bool(LabelFilter.default().apply(Labels.parse([text]))) is kept


def test_the_longest_include_beats_the_shortest_ignore_only_when_longer():
    rules = tuple(map(FilterRule.parse, ["abc", "!ab", "!abcdef"]))
    assert LabelFilter(rules).keeps(Label("k8s", "abcdef", ""))
    tie = tuple(map(FilterRule.parse, ["abc", "!abc"]))
    assert not LabelFilter(tie).keeps(Label("k8s", "abc", ""))


def test_an_including_rule_turns_the_configured_filter_into_an_allow_list():
    chosen = LabelFilter.configured(["k8s:team"])
    labels = Labels.parse(
        ["k8s:team=a", "k8s:app=b", "any:team2=c", "k8s:io.kubernetes.pod.namespace=d"]
    )
    assert chosen.apply(labels).strings() == ("k8s:io.kubernetes.pod.namespace=d", "k8s:team=a")
    ignoring = LabelFilter.configured(["!app"])
    assert "k8s:app=b" not in ignoring.apply(labels).strings()
    assert "any:team2=c" in ignoring.apply(labels).strings()
