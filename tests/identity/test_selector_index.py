import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from identity.index import Postings, SelectorIndex
from identity.labels import Label, Labels
from identity.selector import Operator, Requirement, Selector

KEYS = ["app", "ns", "tier", "env"]
VALUES = ["a", "b", "c", ""]
SOURCES = ["k8s", "any", "cidr"]

label_sets = st.dictionaries(
    st.sampled_from(KEYS), st.tuples(st.sampled_from(SOURCES), st.sampled_from(VALUES)), max_size=4
).map(lambda by_key: Labels(Label(s, k, v) for k, (s, v) in by_key.items()))
requirements = st.one_of(
    st.builds(
        lambda s, k, o, v: Requirement(s, k, o, tuple(v)),
        st.sampled_from(SOURCES),
        st.sampled_from(KEYS),
        st.sampled_from([Operator.IN, Operator.NOT_IN]),
        st.lists(st.sampled_from(VALUES), max_size=3),
    ),
    st.builds(
        Requirement,
        st.sampled_from(SOURCES),
        st.sampled_from(KEYS),
        st.sampled_from([Operator.EXISTS, Operator.DOES_NOT_EXIST]),
    ),
)
selectors = st.lists(requirements, max_size=3).map(lambda rs: Selector(tuple(rs)))
numbers = st.integers(1, 40)
steps = st.one_of(
    st.tuples(st.just("add"), st.dictionaries(numbers, label_sets, min_size=1, max_size=20)),
    st.tuples(st.just("remove"), st.lists(numbers, max_size=12)),
    st.tuples(st.just("relabel"), numbers, label_sets),
    st.tuples(st.just("select"), selectors),
    st.tuples(st.just("deselect"), st.integers(0, 30)),
)


class Naive:
    """What the index must agree with: every selector asked about every identity."""

    def __init__(self):
        self.identities = {}
        self.users = {}

    def members(self, selector):
        return {n for n, labels in self.identities.items() if selector.matches(labels)}

    def snapshot(self):
        return {selector: self.members(selector) for selector in self.users}


def gained(before, after):
    return {s: after[s] - before[s] for s in after if s in before and after[s] - before[s]}


def as_sets(reported):
    return {selector: set(members) for selector, members in reported.items()}


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=30))
def test_the_index_equals_naive_matching_after_any_sequence_of_changes(sequence):
    index, naive = SelectorIndex(), Naive()
    for step in sequence:
        before = naive.snapshot()
        match step:
            case ("add", identities):
                fresh = {n: s for n, s in identities.items() if n not in naive.identities}
                naive.identities.update(fresh)
                assert as_sets(index.add_identities(fresh)) == gained(before, naive.snapshot())
            case ("remove", gone):
                for number in gone:
                    naive.identities.pop(number, None)
                assert as_sets(index.remove_identities(gone)) == gained(naive.snapshot(), before)
            case ("relabel", number, labels):
                naive.identities[number] = labels
                added, removed = index.relabel(number, labels)
                assert as_sets(added) == gained(before, naive.snapshot())
                assert as_sets(removed) == gained(naive.snapshot(), before)
            case ("select", selector):
                naive.users[selector] = naive.users.get(selector, 0) + 1
                assert set(index.add_selector(selector)) == naive.members(selector)
            case ("deselect", nth) if naive.users:
                selector = list(naive.users)[nth % len(naive.users)]
                naive.users[selector] -= 1
                assert index.remove_selector(selector) is (naive.users[selector] == 0)
                if not naive.users[selector]:
                    del naive.users[selector]
        check(index, naive)


def check(index, naive):
    assert set(index.selectors()) == set(naive.users)
    for selector in naive.users:
        assert set(index.members(selector)) == naive.members(selector)
        assert set(index.evaluate(selector)) == naive.members(selector)
    for number, labels in naive.identities.items():
        assert index.labels(number) == labels
        chosen_by = index.selectors_of(number)
        assert len(chosen_by) == len(set(chosen_by))
        assert set(chosen_by) == {s for s in naive.users if s.matches(labels)}


def test_refiling_after_growth_loses_no_selector():
    chooser = random.Random(7)
    index, naive = SelectorIndex(), Naive()
    for key in KEYS:
        for value in VALUES:
            selector = Selector.parse(f"cluster=one,{key}={value}")
            index.add_selector(selector)
            naive.users[selector] = 1
    for number in range(1, 1500):
        labels = Labels(
            [Label("k8s", key, chooser.choice(VALUES)) for key in KEYS]
            + [Label("k8s", "cluster", "one")]
        )
        naive.identities[number] = labels
        index.add_identities({number: labels})
    check(index, naive)


def test_the_same_identity_twice_changes_nothing_and_other_labels_need_a_relabel():
    index = SelectorIndex()
    selector = Selector.parse("app=a")
    index.add_selector(selector)
    labels = Labels.parse(["k8s:app=a"])
    assert index.add_identities({300: labels}) == {selector: BitMap([300])}
    assert index.add_identities({300: labels}) == {}
    with pytest.raises(ValueError, match="relabel"):
        index.add_identities({300: Labels.parse(["k8s:app=b"])})


def test_an_unknown_selector_has_no_members():
    with pytest.raises(KeyError):
        SelectorIndex().members(Selector.EVERYTHING)


def test_emptied_postings_keep_nothing():
    postings = Postings()
    labels = Labels.parse(["k8s:app=a"])
    postings.add({300: labels})
    postings.remove(300, labels)
    assert postings.count("app", "a") == postings.count("app", None) == 0
    assert not postings.evaluate(Selector.EVERYTHING)
