"""Manifests: what is accepted, what is refused with which words and where, and never a raise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.policy.clauses import PolicyRef, PortRange
from services.policy.model import CidrPeer, EntityPeer, Stance
from services.policy.parse import parse

SEED = sorted((Path(__file__).parents[2] / "policies" / "seed").glob("*.yaml"))
HEAD = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\n"


def read(text, namespace="shop"):
    return parse(text.encode() if isinstance(text, str) else text, "file.yaml", namespace)


def errors(text):
    parsed = read(text)
    assert not parsed.policies
    return [p for p in parsed.problems if p.severity == "error"]


def spec_error(spec):
    (problem, *_) = errors(f"{HEAD}spec: {spec}\n")
    return problem


def rule_of(spec, head=HEAD):
    parsed = read(f"{head}spec: {spec}\n")
    assert not parsed.refused, parsed.problems
    return parsed.policies[0].policy.rules[0]


# ------------------------------------------------------------------ documents


@pytest.mark.parametrize("path", SEED, ids=lambda path: path.stem)
def test_the_seed_policies_are_accepted(path):
    parsed = read(path.read_bytes())
    assert not parsed.refused
    assert parsed.policies[0].manifest_text == path.read_text()


def test_documents_keep_their_text_and_comments():
    first = "# who may call\n" + HEAD + "spec: {endpointSelector: {}, ingress: []}\n"
    second = first.replace("name: p", "name: q") + "# end\n"
    parsed = read(f"{first}---\n{second}")
    assert [p.manifest_text for p in parsed.policies] == [first, second]
    assert [p.policy.ref.name for p in parsed.policies] == ["p", "q"]


def test_reading_the_kept_text_again_gives_the_same_rules():
    text = "".join(path.read_text() + "---\n" for path in SEED)
    for each in read(text).policies:
        (again,) = read(each.manifest_text).policies
        assert again.policy.ref == each.policy.ref
        assert [r.subject for r in again.policy.rules] == [r.subject for r in each.policy.rules]


def test_a_list_gives_its_items_with_their_own_text():
    text = (
        "kind: List\nitems:\n- apiVersion: cilium.io/v2 # first\n  kind: CiliumNetworkPolicy\n"
        "  metadata: {name: a}\n  spec:\n    endpointSelector: {}\n    ingres: []\n"
        "- apiVersion: cilium.io/v2\n  kind: CiliumNetworkPolicy\n  metadata: {name: b}\n"
        "  spec:\n    endpointSelector: {} # all\n"
    )
    parsed = read(text)
    (kept,) = parsed.policies
    assert kept.manifest_text == (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: b}\n"
        "spec:\n  endpointSelector: {} # all\n"
    )
    (problem,) = parsed.problems
    assert (problem.path, problem.line, problem.column) == ("items[0].spec.ingres", 8, 5)


def test_a_list_item_that_borrows_an_anchor_is_rewritten():
    text = (
        "kind: List\nitems:\n- apiVersion: cilium.io/v2\n  kind: CiliumNetworkPolicy\n"
        "  metadata: {name: a}\n  spec: &s {endpointSelector: {}}\n"
        "- apiVersion: cilium.io/v2\n  kind: CiliumNetworkPolicy\n  metadata: {name: b}\n"
        "  spec: *s\n"
    )
    kept = read(text).policies[1].manifest_text
    assert json.loads(kept)["spec"] == {"endpointSelector": {}}


def test_json_is_read_even_with_tabs():
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": {"endpointSelector": {}, "description": "a\tb"},
    }
    text = json.dumps(document, indent="\t")
    (policy,) = read(text).policies
    assert policy.manifest_text == text


def test_the_default_namespace_is_for_objects_that_name_none():
    assert read(f"{HEAD}spec: {{endpointSelector: {{}}}}").policies[0].policy.ref == PolicyRef(
        "CiliumNetworkPolicy", "shop", "p"
    )
    own = HEAD.replace("{name: p}", "{name: p, namespace: own}")
    assert read(f"{own}spec: {{endpointSelector: {{}}}}").policies[0].policy.ref.namespace == "own"


# ------------------------------------------------------------------ hostile input


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no policy in it"),
        (b"# nothing\n---\n", "no policy in it"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"kind: CiliumNetworkPolicy\n\xe4: 1", "not UTF-8"),
        (b"x" * ((1 << 20) + 1), "at most 1048576"),
        (b"[" * 5000, "nested more than 64 levels"),
        (b"a: " + b"{b: " * 100 + b"1" + b"}" * 100, "nested more than 64 levels"),
        (b"a: *nowhere", "names no anchor"),
        (b"? [a]\n: b", "mapping key must be a plain word"),
        (b"just words", "must be a mapping"),
        (b"- a\n- b", "must be a mapping"),
        (b"kind: Deployment", "kind 'Deployment' is not known"),
        (b"kind: CiliumNetworkPolcy", "did you mean 'CiliumNetworkPolicy'?"),
        (b"apiVersion: v1", "kind is missing"),
    ],
)
def test_unreadable_text_is_a_problem_not_an_exception(text, words):
    assert any(words in problem.message for problem in errors(text)), errors(text)


def test_an_alias_bomb_is_refused():
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (problem,) = errors("\n".join(lines))
    assert "aliases add more than" in problem.message


def test_aliases_of_a_reasonable_size_are_followed():
    text = (
        f"{HEAD}spec:\n  endpointSelector: &s {{matchLabels: {{app: a}}}}\n"
        "  ingress:\n  - fromEndpoints: [*s]\n"
    )
    assert not read(text).refused


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise(text):
    read(text)


FIELDS = (
    *("matchLabels", "matchExpressions", "key", "operator", "values", "fromEndpoints", "app"),
    *("toPorts", "ports", "port", "endPort", "protocol", "icmps", "fields", "type"),
    *("cidr", "except", "fromCIDRSet", "fromEntities"),
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.sampled_from(["endpointSelector", "ingress", "egressDeny", "enableDefaultDeny"]), TREES)
@settings(max_examples=300, deadline=None)
def test_no_shape_of_a_spec_raises(field, tree):
    for kind, api in (
        ("CiliumNetworkPolicy", "cilium.io/v2"),
        ("NetworkPolicy", "networking.k8s.io/v1"),
    ):
        document = {
            "apiVersion": api,
            "kind": kind,
            "metadata": {"name": "p"},
            "spec": {"endpointSelector": {}, field: tree},
        }
        read(json.dumps(document))


# ------------------------------------------------------------------ refusals


def test_an_unknown_field_is_refused_with_its_place_and_the_nearest_known():
    (problem,) = errors(f"{HEAD}spec:\n  endpointSelector: {{}}\n  ingres: []\n")
    assert (problem.path, problem.line, problem.column) == ("spec.ingres", 6, 3)
    assert problem.message == "unknown field 'ingres'; did you mean 'ingress'?"
    assert problem.ref == PolicyRef("CiliumNetworkPolicy", "shop", "p")
    assert problem.source == "file.yaml"


def test_a_key_given_twice_is_refused():
    (problem,) = errors(f"{HEAD}spec: {{endpointSelector: {{}}}}\nspec: {{}}\n")
    assert "given twice" in problem.message
    assert problem.line == 5


def test_a_policy_given_twice_is_refused():
    text = f"{HEAD}spec: {{endpointSelector: {{}}}}\n---\n" * 2
    assert any("given twice" in p.message for p in read(text).problems)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("kind: CiliumNetworkPolicy\nmetadata: {name: p}\n", "apiVersion is missing"),
        (HEAD.replace("v2", "v9"), "write cilium.io/v2"),
        (HEAD.replace("{name: p}", "{}"), "name is missing"),
        (HEAD.replace("{name: p}", "{name: P_}"), "lower-case"),
        (HEAD.replace("{name: p}", "{name: 12}"), 'quote it: "12"'),
        (HEAD.replace("{name: p}", "{name: p, namespace: A}"), "namespace 'A'"),
        (
            HEAD.replace("Network", "ClusterwideNetwork").replace(
                "{name: p}", "{name: p, namespace: x}"
            ),
            "has no namespace",
        ),
    ],
)
def test_the_object_around_a_spec_is_checked(head, words):
    found = errors(f"{head}spec: {{endpointSelector: {{}}}}\n")
    assert any(words in problem.message for problem in found), found


def clause(text):
    return f"{{endpointSelector: {{}}, {text}}}"


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ("{}", "spec", "endpointSelector is missing"),
        ("{endpointSelector: {}, nodeSelector: {}}", "spec.nodeSelector", "cannot stand together"),
        ("{nodeSelector: {}}", "spec.nodeSelector", "CiliumClusterwideNetworkPolicy"),
        (
            "{endpointSelector: {matchLabels: {app: '-x'}}}",
            "spec.endpointSelector.matchLabels.app",
            "invalid label selector",
        ),
        (
            "{endpointSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}",
            "spec.endpointSelector.matchExpressions[0].operator",
            "did you mean 'In'?",
        ),
        (
            "{endpointSelector: {matchExpressions: [{key: a, operator: In}]}}",
            "spec.endpointSelector.matchExpressions[0]",
            "at least one value",
        ),
        (clause("ingress: {}"), "spec.ingress", "must be a list"),
        (
            clause("ingress: [{fromEndpoints: [{}], fromEntities: [all]}]"),
            "spec.ingress[0]",
            "combining fromEndpoints and fromEntities",
        ),
        (
            clause("egressDeny: [{toEntities: [wrold]}]"),
            "spec.egressDeny[0].toEntities[0]",
            "did you mean 'world'?",
        ),
        (clause("ingress: [{fromCIDR: [10.0.0.0/33]}]"), "spec.ingress[0].fromCIDR[0]", "CIDR"),
        (clause("ingress: [{fromCIDR: ['1.2.3.4/255.0.0.0']}]"), "spec.ingress[0].fromCIDR[0]", ""),
        (
            clause("ingress: [{fromCIDRSet: [{cidr: 10.0.0.1}]}]"),
            "spec.ingress[0].fromCIDRSet[0].cidr",
            "not a prefix",
        ),
        (
            clause("ingress: [{fromCIDRSet: [{cidr: 10.0.0.0/10, except: [10.64.0.0/11]}]}]"),
            "spec.ingress[0].fromCIDRSet[0].except[0]",
            "does not lie within",
        ),
        (
            clause("ingressDeny: [{fromEndpoints: [{}], authentication: {mode: required}}]"),
            "spec.ingressDeny[0].authentication",
            "unknown field",
        ),
        (
            clause("ingress: [{toPorts: [{ports: [{port: 80}]}]}]"),
            "spec.ingress[0].toPorts[0].ports[0].port",
            'quote it: "80"',
        ),
        (
            clause("ingress: [{toPorts: [{ports: [{}]}]}]"),
            "spec.ingress[0].toPorts[0].ports[0]",
            "port",
        ),
        (
            clause("ingress: [{toPorts: [{ports: [{port: '65536'}]}]}]"),
            "spec.ingress[0].toPorts[0].ports[0].port",
            "not within 0..65535",
        ),
        (
            clause("ingress: [{toPorts: [{ports: [{port: '1', protocol: ICMP}]}]}]"),
            "spec.ingress[0].toPorts[0].ports[0].protocol",
            "use icmps",
        ),
        (
            clause(
                "ingress: [{toPorts: [{ports: [{port: '1'}]}], icmps: [{fields: [{type: 8}]}]}]"
            ),
            "spec.ingress[0]",
            "two clauses",
        ),
        (
            clause("ingress: [{icmps: [{fields: [{type: 256}]}]}]"),
            "spec.ingress[0].icmps[0].fields[0].type",
            "0..255",
        ),
        (
            clause("ingress: [{icmps: [{fields: [{type: 8, family: IPv5}]}]}]"),
            "spec.ingress[0].icmps[0].fields[0]",
            "wrong family",
        ),
    ],
)
def test_refusals_name_the_field_and_the_remedy(spec, path, words):
    problem = spec_error(spec)
    assert problem.path == path
    assert words in problem.message
    assert problem.line > 0
    assert problem.column > 0


@pytest.mark.parametrize(
    "text",
    [
        "ingress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}]}]",
        "egress: [{toFQDNs: [{matchName: a.b}]}]",
        "egress: [{toServices: [{k8sService: {serviceName: a}}]}]",
        "egress: [{toGroups: [{aws: {}}]}]",
        "ingress: [{fromNodes: [{}]}]",
        "ingress: [{fromRequires: [{}]}]",
        "egress: [{toPorts: [{ports: [{port: '443', protocol: TCP}], serverNames: [a.b]}]}]",
        "ingress: [{fromEndpoints: [{}], authentication: {mode: required}}]",
        "ingress: [{fromCIDRSet: [{cidrGroupRef: g}]}]",
        "ingress: [{toPorts: [{ports: [{port: http}]}]}]",
    ],
)
def test_what_is_legal_but_not_supported_is_refused_and_says_so(text):
    assert "not supported" in spec_error(clause(text)).message


# ------------------------------------------------------------------ meaning


@pytest.mark.parametrize(
    ("text", "peers", "ports"),
    [
        ("{}", (), None),
        ("{fromEndpoints: []}", (), None),
        ("{fromEntities: [], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}", (), "80"),
        ("{toPorts: [{ports: [{port: '80', protocol: TCP}]}]}", None, "80"),
        ("{fromEntities: [host], toPorts: []}", "host", None),
        ("{toPorts: []}", (), None),
        ("{toPorts: [{}]}", None, ()),
        ("{fromEntities: [host], toPorts: [{ports: []}]}", "host", ()),
        ("{icmps: []}", (), None),
        ("{icmps: [{}]}", None, ()),
        ("{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {}}]}", None, "80"),
        ("{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: []}}]}", None, "80"),
    ],
)
def test_empty_and_absent_differ(text, peers, ports):
    (found,) = rule_of(clause(f"ingress: [{text}]")).clauses
    assert found.peers == ((EntityPeer("host"),) if peers == "host" else peers)
    assert found.ports == ((PortRange(6, 80, 80),) if ports == "80" else ports)


def test_no_list_and_an_empty_list_leave_a_direction_open():
    assert rule_of(clause("ingress: []")).ingress is Stance.UNTOUCHED
    assert rule_of("{endpointSelector: {}}").ingress is Stance.UNTOUCHED
    assert rule_of(clause("ingressDeny: [{}]")).ingress is Stance.DEFAULT_DENY


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        ("{port: '0', protocol: TCP}", [(6, 0, 65535)]),
        ("{port: '80'}", [(6, 80, 80), (17, 80, 80), (132, 80, 80)]),
        ("{port: '80', protocol: any}", [(6, 80, 80), (17, 80, 80), (132, 80, 80)]),
        ("{port: '80', endPort: 90, protocol: udp}", [(17, 80, 90)]),
        ("{port: '80', endPort: 70, protocol: TCP}", [(6, 80, 80)]),
        ("{port: '0', endPort: 100, protocol: TCP}", [(6, 0, 100)]),
    ],
)
def test_ports_become_ranges(port, expected):
    (found,) = rule_of(clause(f"ingress: [{{toPorts: [{{ports: [{port}]}}]}}]")).clauses
    assert found.ports == tuple(PortRange(*each) for each in expected)


def test_icmp_types_are_numbers_or_names_and_zero_is_only_zero():
    (found,) = rule_of(
        clause(
            "ingress: [{icmps: [{fields: [{type: 0}, {type: EchoRequest},"
            " {type: EchoRequest, family: IPv6}, {type: '3'}]}]}]"
        )
    ).clauses
    expected = [(1, 0, 0), (1, 8, 8), (58, 128, 128), (1, 3, 3)]
    assert found.ports == tuple(PortRange(*each) for each in expected)


def test_host_bits_of_a_prefix_are_masked_off():
    (found,) = rule_of(clause("egress: [{toCIDR: [10.1.2.3/8, 1.2.3.4, '2001:db8::1']}]")).clauses
    assert found.peers == (
        CidrPeer("10.0.0.0/8"),
        CidrPeer("1.2.3.4/32"),
        CidrPeer("2001:db8::1/128"),
    )


OWN = "k8s:io.kubernetes.pod.namespace=shop"
CLUSTERWIDE = HEAD.replace("Network", "ClusterwideNetwork")


@pytest.mark.parametrize(
    ("head", "peer", "selector"),
    [
        (HEAD, "{}", OWN),
        (HEAD, "{matchLabels: {app: a}}", f"app=a,{OWN}"),
        (HEAD, "{matchLabels: {k8s:io.kubernetes.pod.namespace: x}}", OWN.replace("shop", "x")),
        (
            HEAD,
            "{matchLabels: {io.cilium.k8s.namespace.labels.team: x}}",
            "io.cilium.k8s.namespace.labels.team=x",
        ),
        (HEAD, "{matchLabels: {'reserved:host': ''}}", "reserved:host="),
        (CLUSTERWIDE, "{}", "k8s:io.kubernetes.pod.namespace"),
        (CLUSTERWIDE, "{matchLabels: {'reserved:host': ''}}", "reserved:host="),
    ],
)
def test_peers_are_confined_to_a_namespace_unless_they_speak_of_one(head, peer, selector):
    (found,) = rule_of(clause(f"ingress: [{{fromEndpoints: [{peer}]}}]"), head).clauses
    assert found.peers is not None
    assert str(found.peers[0].selector) == selector


def test_a_subject_stays_in_its_namespace():
    parsed = read(
        f"{HEAD}spec: {{endpointSelector: {{matchLabels:"
        " {k8s:io.kubernetes.pod.namespace: other}}}\n"
    )
    assert str(parsed.policies[0].policy.rules[0].subject) == OWN
    assert "not the policy's own" in parsed.problems[0].message
    assert rule_of("{endpointSelector: {}}", CLUSTERWIDE).subject.requirements == ()


NETWORK = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\n"


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        ("{podSelector: {}}", Stance.DEFAULT_DENY, Stance.UNTOUCHED),
        ("{podSelector: {}, egress: []}", Stance.DEFAULT_DENY, Stance.UNTOUCHED),
        ("{podSelector: {}, egress: [{}]}", Stance.DEFAULT_DENY, Stance.DEFAULT_DENY),
        ("{podSelector: {}, policyTypes: [Egress]}", Stance.UNTOUCHED, Stance.DEFAULT_DENY),
    ],
)
def test_policy_types_decide_which_directions_a_network_policy_isolates(spec, ingress, egress):
    rule = rule_of(spec, NETWORK)
    assert (rule.ingress, rule.egress) == (ingress, egress)


def test_rules_outside_of_the_policy_types_say_nothing():
    parsed = read(f"{NETWORK}spec: {{policyTypes: [Egress], ingress: [{{}}]}}\n")
    assert parsed.policies[0].policy.rules[0].clauses == ()
    assert "policyTypes leaves ingress out" in parsed.problems[0].message


def test_network_policy_clauses_open_what_they_leave_out():
    everything, tcp, nothing = rule_of(
        "{ingress: [{}, {from: [], ports: [{}]}, {from: [{}]}]}", NETWORK
    ).clauses
    assert (everything.peers, everything.ports) == (None, None)
    assert (tcp.peers, tcp.ports) == (None, (PortRange(6, 0, 65535),))
    assert nothing.grants_nothing


def test_network_policy_peers_combine_namespaces_and_pods():
    (found,) = rule_of(
        "{ingress: [{from: [{podSelector: {matchLabels: {a: b}}}, {namespaceSelector: {}},"
        " {namespaceSelector: {matchLabels: {t: u}}, podSelector: {matchLabels: {a: b}}}]}]}",
        NETWORK,
    ).clauses
    managed = "k8s:io.kubernetes.pod.namespace"
    assert found.peers is not None
    assert [str(peer.selector) for peer in found.peers] == [
        f"k8s:a=b,{OWN}",
        managed,
        f"k8s:a=b,k8s:io.cilium.k8s.namespace.labels.t=u,{managed}",
    ]


def test_an_ip_block_with_a_selector_is_refused():
    peer = "{ipBlock: {cidr: 1.0.0.0/8}, podSelector: {}}"
    (problem,) = errors(f"{NETWORK}spec: {{ingress: [{{from: [{peer}]}}]}}\n")
    assert "cannot stand in one peer" in problem.message


# ------------------------------------------------------------------ warnings


def warnings_of(spec):
    parsed = read(f"{HEAD}spec: {spec}\n")
    assert not parsed.refused
    return [problem.message for problem in parsed.problems]


def test_a_clause_that_grants_nothing_is_warned_about():
    (message,) = warnings_of(clause("ingress: [{fromEndpoints: []}, {fromEntities: [host]}]"))
    assert "allows nothing" in message


@pytest.mark.parametrize("side", ["ingress", "egress"])
def test_an_empty_clause_alone_closes_its_direction_and_is_no_mistake(side):
    assert warnings_of(clause(f"{side}: [{{}}]")) == []


def test_egress_without_dns_is_warned_about():
    (message,) = warnings_of(
        clause("egress: [{toEntities: [world], toPorts: [{ports: [{port: '443'}]}]}]")
    )
    assert "port 53" in message
    assert not warnings_of(clause("egress: [{toEndpoints: [{}]}]"))
    https = "egress: [{toEntities: [world], toPorts: [{ports: [{port: '443'}]}]}]"
    twice = f"{HEAD}specs: [{clause(https)}, {clause(https)}]\n"
    assert len(read(twice).problems) == 1
    assert not warnings_of(clause("egress: [{toPorts: [{ports: [{port: '53', protocol: UDP}]}]}]"))


@pytest.mark.parametrize(("text", "line"), [(b"{", 1), (b"a: [", 1), (b"a:\n  b: {", 2)])
def test_text_that_ends_too_early_is_refused_on_its_last_line(text, line):
    (problem,) = parse(text, "file", "default").problems
    assert problem.line == line


def test_a_log_value_stands_with_the_rule_and_in_what_is_said_of_it():
    rule = rule_of('{endpointSelector: {}, log: {value: "team a"}, ingress: [{}]}')
    assert rule.log == "team a"
    assert rule_of("{endpointSelector: {}, log: {}, ingress: [{}]}").log == ""


@pytest.mark.parametrize("value", [r'"two\nlines"', '"' + "x" * 257 + '"', r'"\e[31m"', "7"])
def test_a_log_value_that_would_break_a_line_is_refused(value):
    problem = spec_error(f"{{endpointSelector: {{}}, log: {{value: {value}}}}}")
    assert problem.path == "spec.log.value"
    assert problem.line > 1
