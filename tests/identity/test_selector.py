import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.labels import Invalid, Labels
from identity.selector import Operator, Requirement, Selector, key_problem, value_problem

WEB = Labels.parse(["k8s:app=web", "any:tier=api", "reserved:host", "k8s:empty="])

names = st.sampled_from(["app", "tier", "k8s:app", "any:tier", "reserved:host", "$host"])
requirements = st.one_of(
    st.builds(
        Requirement.of,
        names,
        st.sampled_from([Operator.IN, Operator.NOT_IN]),
        st.lists(st.sampled_from(["web", "api", "db", ""]), min_size=1, max_size=3),
    ),
    st.builds(Requirement.of, names, st.sampled_from([Operator.EXISTS, Operator.DOES_NOT_EXIST])),
)
selectors = st.lists(requirements, max_size=4).map(lambda rs: Selector(tuple(rs)))


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("*", True),
        ("!*", False),
        ("app=web", True),
        ("app==web", True),
        ("k8s:app = web", True),
        ("any:app=web", True),
        ("reserved:app=web", False),
        ("k8s:tier=api", False),
        ("tier=api", True),
        ("app=db", False),
        ("app!=web", False),
        ("app != db", True),
        ("nope!=x", True),
        ("reserved:app!=web", True),
        ("app in (db, web)", True),
        ("app notin (db,web)", False),
        ("nope notin (a)", True),
        ("app", True),
        ("!app", False),
        ("!nope", True),
        ("!reserved:app", True),
        ("$host", True),
        ("empty=", True),
        ("empty in (,x)", True),
        ("app=web,tier in (api,db),!nope", True),
        ("app=web,nope", False),
    ],
)
def test_a_selector_text_chooses(text, matches):
    assert Selector.parse(text).matches(WEB) is matches


@pytest.mark.parametrize(
    "text",
    ["app=web,", "app in web", "app in (a", "a)b", "app in (a),(b)", "a b", "=x", "!a=b", ","],
)
def test_an_unreadable_selector_says_which_forms_exist(text):
    with pytest.raises(Invalid, match="the forms are"):
        Selector.parse(text)


@given(selectors)
def test_the_canonical_text_reads_back_as_the_same_selector(selector):
    again = Selector.parse(str(selector))
    assert (again, hash(again)) == (selector, hash(selector))


def test_order_and_repetition_do_not_make_another_selector():
    one = Selector.parse("a in (x,y),b")
    other = Selector.parse("any:b,a in (y,x,y),b")
    assert (one, hash(one), str(one)) == (other, hash(other), str(other))
    assert str(one) == "a in (x,y),b"


def test_everything_and_nothing_are_what_they_say():
    assert Selector(()) == Selector.EVERYTHING
    assert Selector.EVERYTHING.matches(Labels.EMPTY)
    nothing = Selector(
        (Requirement.of("app", Operator.IN, ()), Requirement.of("b", Operator.EXISTS))
    )
    assert nothing == Selector.NOTHING
    assert not Selector.NOTHING.matches(WEB)
    assert Selector.NOTHING.and_(Requirement.of("app", Operator.EXISTS)) == Selector.NOTHING


def test_matched_labels_become_requirements():
    selector = Selector.of_labels({"k8s:app": "web", "tier": "api"})
    assert str(selector) == "k8s:app=web,tier=api"
    assert selector.mentions("app")
    assert not selector.mentions("k8s:app")


def test_values_on_an_existence_operator_are_refused():
    with pytest.raises(Invalid, match="Exists app: takes no values"):
        Requirement.of("app", Operator.EXISTS, ("x",))
    with pytest.raises(Invalid, match="holds a value"):
        Requirement.of("app=x", Operator.EXISTS)


@pytest.mark.parametrize("key", ["a", "app.kubernetes.io/name", "A_b-c.D", "x" * 63])
def test_kubernetes_label_keys_pass(key):
    assert key_problem(key) is None


@pytest.mark.parametrize("key", ["", "-a", "a-", "a/b/c", "A.io/x", "/x", "x/", "x" * 64, "a\n"])
def test_other_keys_are_explained(key):
    assert "label key" in key_problem(key)


def test_label_values_are_checked_like_kubernetes_does():
    assert value_problem("") is value_problem("a.b_c-D") is None
    for value in ("-a", "a b", "x" * 64, "a\n"):
        assert "label value" in value_problem(value)
