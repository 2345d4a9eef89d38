"""The judge of the soak test: a good history passes, and each kind of bad one is found."""

import pytest

from tests.fakes.identity_history import (
    ID,
    IDX,
    REF,
    TOMB,
    Answer,
    Event,
    digest_of,
    leftovers,
    violations,
)

A, B = "k8s:app=a;", "k8s:app=b;"
QUARANTINE_S = 10.0


def made(revision, number, labels, node="n1", at_s=0.0):
    return [
        Event(revision, f"{IDX}{digest_of(labels)}", str(number), at_s),
        Event(revision, f"{ID}{number}", labels, at_s),
        Event(revision, f"{REF}{number}/{node}", digest_of(labels), at_s, lease=7),
    ]


def released(revision, number, node="n1", at_s=1.0):
    return [Event(revision, f"{REF}{number}/{node}", None, at_s)]


def collected(revision, number, labels, at_s=2.0):
    return [
        Event(revision, f"{IDX}{digest_of(labels)}", None, at_s),
        Event(revision, f"{ID}{number}", None, at_s),
        Event(revision, f"{TOMB}{number}", digest_of(labels), at_s, lease=9),
    ]


def risen(revision, number, at_s):
    return [Event(revision, f"{TOMB}{number}", None, at_s)]


GOOD = [
    *made(2, 300, A),
    *made(3, 301, B),
    *released(4, 300),
    *collected(5, 300, A),
    *risen(6, 300, 13.0),
    *released(7, 301, at_s=14.0),
    *collected(8, 301, B, at_s=15.0),
    # The same set may have its number back from the quarantine.
    *risen(9, 301, 16.0),
    *made(9, 301, B, at_s=16.0),
    *made(10, 300, "k8s:app=c;", at_s=20.0),
]


def judge(events, answers=()):
    return violations(events, answers, quarantine_s=QUARANTINE_S, slack_s=0.5)


def test_a_good_history_has_no_violation():
    assert judge(GOOD) == []
    used = Answer("n1", A, 300, 0.0, 0.1, 1.0)
    assert judge(GOOD, [used]) == []


def without(events, key):
    return [event for event in events if not event.key.startswith(key)]


BAD = {
    "two sets share a number": (
        [*made(2, 300, A), *made(3, 300, B, node="n2")],
        "went from 'k8s:app=a;' to 'k8s:app=b;' while in use",
    ),
    "two sets share a number, told by the index alone": (
        [*made(2, 300, A), Event(3, f"{IDX}{digest_of(B)}", "300", 0.0)],
        "2 label sets are said to have it",
    ),
    "a set has two numbers": (
        [*made(2, 300, A), Event(3, f"{ID}301", A, 0.0)],
        "has the numbers 301 and 300",
    ),
    "a set has two numbers and its index names the second": (
        [*made(2, 300, A), *made(3, 301, A, node="n2")],
        "has the numbers 301 and 300",
    ),
    "reused although a tombstone stands": (
        [*made(2, 300, A), *released(3, 300), *collected(4, 300, A), *made(5, 300, B, at_s=13.0)],
        "in quarantine",
    ),
    "a tombstone that ends too soon": (
        [*made(2, 300, A), *released(3, 300), *collected(4, 300, A), *risen(5, 300, 5.0)],
        "stood for 3.0 s only",
    ),
    "reused too soon after a tombstone that ended too soon": (
        [
            *made(2, 300, A),
            *released(3, 300),
            *collected(4, 300, A),
            *risen(5, 300, 5.0),
            *made(6, 300, B, at_s=6.0),
        ],
        "reused after 4.0 s",
    ),
    "collected without a tombstone": (
        [*made(2, 300, A), *released(3, 300), *without(collected(4, 300, A), TOMB)],
        "without quarantine",
    ),
    "a tombstone without a lease": (
        [
            *made(2, 300, A),
            *released(3, 300),
            *without(collected(4, 300, A), TOMB),
            Event(4, f"{TOMB}300", digest_of(A), 2.0),
        ],
        "would stay for ever",
    ),
    "collected while a node refers to it": (
        [*made(2, 300, A), *collected(3, 300, A)],
        "300 is gone while n1 refer to it",
    ),
    "a reference to what was collected": (
        [
            *made(2, 300, A),
            *released(3, 300),
            *collected(4, 300, A),
            Event(5, f"{REF}300/n2", digest_of(A), 3.0, lease=8),
        ],
        "300 is gone while n2 refer to it",
    ),
    "the index outlives the number": (
        [*made(2, 300, A), *released(3, 300), *without(collected(4, 300, A), IDX)],
        "the index still names 300",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_each_kind_of_broken_promise_is_found(name):
    events, words = BAD[name]
    assert any(words in told for told in judge(events)), judge(events)


def test_an_answer_that_was_never_true_is_found():
    for wrong in (
        Answer("n1", B, 300, 0.0, 0.1, 0.2),
        Answer("n1", A, 301, 0.0, 0.1, 0.2),
        # True long ago, or only later.
        Answer("n1", A, 300, 5.0, 5.1, 5.2),
        Answer("n1", A, 300, -5.0, -4.0, -3.0),
    ):
        events = [*made(2, 300, A), *released(3, 300), *collected(4, 300, A)]
        assert any("which it was not" in told for told in judge(events, [wrong]))


def test_a_number_taken_away_from_a_node_that_uses_it_is_found():
    events = [*made(2, 300, A), *released(3, 300), *collected(4, 300, A)]
    used = Answer("n1", A, 300, 0.0, 0.1, 9.0)
    assert any("was taken away while n1 used it" in told for told in judge(events, [used]))


def test_what_is_left_in_the_end_is_found():
    assert leftovers([*made(2, 300, A), *released(3, 300)]) == [
        f"{ID}300 = {A}",
        f"{IDX}{digest_of(A)} = 300",
    ]
    done = [*made(2, 300, A), *released(3, 300), *collected(4, 300, A)]
    assert leftovers(done) == []
