"""The command as its user runs it: arguments in, two streams and an exit status out."""

import json
import os
import subprocess
import sys

import pytest

from services.cli import client
from services.runtime.errors import Conflict
from tests.fakes.http_door import http_door

POLICY = b"""apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api}
spec: {endpointSelector: {}, ingress: [{}]}
"""
STORED = ("GET", "/v1/policies")
LISTED = (200, b'{"policies":[]}')
APPLIED = {"kind": "CiliumNetworkPolicy", "namespace": "shop", "name": "api", "action": "created"}


def tessera(*arguments, stdin=b"", **environ):
    env = {k: v for k, v in os.environ.items() if not k.startswith("TESSERA_")} | environ
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", *map(str, arguments)],
        input=stdin, capture_output=True, env=env, check=False, timeout=60,
    )  # fmt: skip


def encoded(value):
    return json.dumps(value).encode()


def test_version_is_one_word_for_people_and_json_for_programs():
    assert tessera("version").stdout.startswith(b"tessera ")
    assert json.loads(tessera("version", "-o", "json").stdout)["version"]


def test_starting_up_imports_no_async_or_rpc_stack():
    heavy = "{'grpc', 'aiohttp', 'opentelemetry', 'structlog', 'yaml'}"
    source = (
        f"import sys, services.cli.main; print({heavy} & {{m.split('.')[0] for m in sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"


def test_nobody_at_the_address_is_one_line_that_says_what_to_do():
    done = tessera("identity", "list", "--server", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stdout == b""
    line = done.stderr.decode()
    assert line.count("\n") == 1
    assert "http://127.0.0.1:1 does not answer" in line
    assert "tessera up" in line


@pytest.mark.parametrize("address", ["nonsense", "ftp://x", "http://:80", "http://x:99999999"])
def test_an_address_that_is_no_url_is_refused_by_name(address):
    done = tessera("identity", "list", "--server", address)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert address in done.stderr.decode()


def test_a_long_list_is_read_page_by_page_and_shown_as_one():
    pages = [
        (200, encoded({"identities": [{"id": 1}, {"id": 2}], "revision": 7, "next": "abc"})),
        (200, encoded({"identities": [{"id": 3}], "revision": 7, "next": ""})),
    ]
    with http_door({("GET", "/v1/identities"): pages}) as door:
        done = tessera("identity", "list", "-o", "json", "--server", door.address)
    whole = json.loads(done.stdout)
    assert ([one["id"] for one in whole["identities"]], whole["next"]) == ([1, 2, 3], "")
    assert [asked.query.get("cursor") for asked in door.asked] == [None, "abc"]


def test_a_list_that_moved_on_too_far_is_begun_anew():
    page = (200, encoded({"identities": [{"id": 1}], "next": "abc"}))
    gone = (410, b'{"detail":"the list can no longer be read"}')
    end = (200, encoded({"identities": [{"id": 2}], "next": ""}))
    with http_door({("GET", "/v1/identities"): [page, gone, page, end]}) as door:
        whole = client.server(door.address).all_of("/v1/identities", "identities")
    assert [one["id"] for one in json.loads(whole)["identities"]] == [1, 2]
    with http_door({("GET", "/v1/identities"): [page, gone] * 9}) as door:
        with pytest.raises(Conflict, match="no longer be read"):
            client.server(door.address).all_of("/v1/identities", "identities")
        assert len(door.asked) == 6


def test_a_stream_that_breaks_is_taken_up_where_it_broke(monkeypatch):
    monkeypatch.setattr(client, "RECONNECT_S", 0.0)
    first = b'retry: 1000\n\nevent: synced\nid: 7\ndata: {"revision":7}\n\n: keep-alive\n\n'
    second = b'event: created\nid: 8\ndata: {"id":300}\n\n'
    away = (503, b'{"detail":"identityd is away"}')
    answers = [(200, first), away, away, (200, second)]
    with http_door({("GET", "/v1/identities/watch"): answers}) as door:
        events = client.server(door.address).events("/v1/identities/watch")
        seen = [next(events) for _ in range(3)]
        events.close()
    assert [(event.name, event.id) for event in seen] == [
        ("synced", "7"), ("problem", ""), ("created", "8")
    ]  # fmt: skip
    assert b"identityd is away; trying again" in seen[1].data
    assert [asked.headers.get("last-event-id") for asked in door.asked] == [None, "7", "7", "7"]


def test_a_stream_that_never_began_is_an_error():
    with http_door({("GET", "/v1/identities/watch"): (422, b'{"detail":"no selector"}')}) as door:
        done = tessera("identity", "watch", "-l", "((", "--server", door.address)
    assert (done.returncode, done.stderr) == (1, b"tessera: no selector\n")


def test_the_forecast_is_told_in_words_and_pressure_beside_it():
    body = {
        "cluster": "c1", "total": 1000, "used": 890, "quarantined": 10, "free": 100,
        "pressure": "high", "exhausted_in_s": 7260.0, "window_s": 600.0,
    }  # fmt: skip
    with http_door({("GET", "/v1/identities/stats"): (200, encoded(body))}) as door:
        done = tessera("identity", "stats", "--server", door.address)
    assert "in 2 h 1 min, if it goes on as over the last 10 min" in done.stdout.decode()
    assert done.stderr.decode().startswith("90% of the numbers are taken; see which labels")


def test_label_rules_change_as_named_and_only_if_they_are_still_those_read():
    now = {"label_filter": ["!k8s:uid"], "policy_relevant": False, "namespace_quota": 9,
           "warn_values": 50, "revision": 7, "relevant_keys": []}  # fmt: skip
    path = "/v1/identities/rules"
    answers = {("GET", path): (200, encoded(now)), ("PUT", path): (200, encoded(now))}
    with http_door(answers) as door:
        arguments = ("--policy-relevant", "--namespace-quota", 0, "--server", door.address)
        done = tessera("identity", "rules", "set", *arguments)
    assert done.returncode == 0, done.stderr
    put = door.asked[-1]
    assert put.headers["if-match"] == '"7"'
    assert json.loads(put.body) == {
        "label_filter": ["!k8s:uid"], "policy_relevant": True, "namespace_quota": 0,
        "warn_values": 50,
    }  # fmt: skip


def test_whois_tells_in_sentences_and_says_what_is_missing():
    body = {
        "query": "10.0.0.7", "kind": "address", "says": ["10.0.0.7 is endpoint shop/api"],
        "policies": [{"identity": 300, "ingress_enforced": True,
                      "ingress": [{"kind": "NetworkPolicy", "name": "p", "namespace": "shop"}]}],
        "unknown": ["ipamd at x cannot be reached"],
    }  # fmt: skip
    with http_door({("GET", "/v1/whois"): (200, encoded(body))}) as door:
        done = tessera("whois", "10.0.0.7", "--server", door.address)
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "10.0.0.7 is endpoint shop/api"
    assert lines[-2].split() == ["300", "ingress", "yes", "NetworkPolicy", "shop/p"]
    assert lines[-1].split() == ["300", "egress", "no,", "open", "-"]
    assert done.stderr == b"not all is told: ipamd at x cannot be reached\n"
    assert door.asked[0].query == {"q": "10.0.0.7"}


def test_the_server_may_come_from_the_environment():
    with http_door({("GET", "/v1/identities"): (200, b'{"identities":[]}')}) as door:
        done = tessera("identity", "list", "-o", "json", TESSERA_SERVER=door.address)
    assert json.loads(done.stdout) == {"identities": []}
    assert done.stderr == b""


def test_identities_are_a_table_and_the_same_body_as_json():
    body = {
        "identities": [{"id": 300, "labels": ["k8s:app=a"], "nodes": ["n1"], "new": 1}],
        "revision": 7,
        "next": "",
    }
    with http_door({("GET", "/v1/identities"): (200, encoded(body))}) as door:
        table = tessera("identity", "list", "-l", "app=a", "--server", door.address)
        text = tessera("identity", "list", "-o", "json", "--server", door.address)
    assert table.stdout.decode().splitlines()[1].split() == ["300", "-", "1", "0", "k8s:app=a"]
    assert door.asked[0].query["labels"] == "app=a"
    assert json.loads(text.stdout) == body


def test_an_unknown_identity_is_the_servers_own_words():
    with http_door({("GET", "/v1/identities/9"): (404, b'{"detail":"no identity 9"}')}) as door:
        done = tessera("identity", "get", "9", "--server", door.address)
    assert (done.returncode, done.stderr) == (1, b"tessera: no identity 9\n")


def test_an_answer_of_another_version_is_said_to_be_one():
    with http_door({("GET", "/v1/identities/9"): (200, b'{"id":"x"}')}) as door:
        done = tessera("identity", "get", "9", "--server", door.address)
    assert done.returncode == 1
    assert b"do the versions match?" in done.stderr


def test_an_endpoint_is_added_over_the_agents_socket(tmp_path):
    made = {"id": 3, "ip": "10.244.0.2", "identity": 300, "state": "ready", "interface": "ts3"}
    answers = {("POST", "/v1/endpoints"): (201, encoded(made))}
    with http_door(answers, tmp_path / "a.sock") as door:
        done = tessera(
            "endpoint", "add", "shop/api", "--netns", "x", "-l", "app=api", "-l", "any:tier=1",
            "--agent-socket", door.address,
        )  # fmt: skip
    assert done.stdout == b"endpoint shop/api is ready: address 10.244.0.2, identity 300\n"
    assert json.loads(door.asked[0].body) == {
        "namespace": "shop", "name": "api", "labels": ["k8s:app=api", "any:tier=1"],
        "netns": "x", "interface": "eth0",
    }  # fmt: skip


def test_an_endpoint_without_a_namespace_is_refused_before_the_agent_is_asked(tmp_path):
    done = tessera("endpoint", "add", "api", "--netns", "x")
    assert done.returncode == 1
    assert b"needs a namespace and a name" in done.stderr


def test_apply_sends_the_file_its_name_and_a_trace(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(POLICY)
    answer = {"revision": 7, "policies": [APPLIED], "problems": []}
    answers = {("POST", "/v1/policies"): (200, encoded(answer)), STORED: LISTED}
    with http_door(answers) as door:
        done = tessera("policy", "apply", "-f", path, "-n", "shop", "--server", door.address)
    assert done.returncode == 0, done.stderr
    assert b"CiliumNetworkPolicy shop/api created" in done.stdout
    asked = door.asked[0]
    assert asked.body == POLICY
    assert (asked.query["source"], asked.query["namespace"]) == (str(path), "shop")
    assert asked.headers["traceparent"].startswith("00-")


def test_what_is_kept_but_not_enforced_is_said_at_once(tmp_path):
    (tmp_path / "p.yaml").write_bytes(POLICY)
    stored = APPLIED | {"state": "not enforced yet: host firewall"}
    answers = {
        ("POST", "/v1/policies"): (200, encoded({"revision": 7, "policies": [APPLIED]})),
        STORED: (200, encoded({"policies": [stored]})),
    }
    with http_door(answers) as door:
        done = tessera("policy", "apply", "-f", tmp_path, "--server", door.address)
    assert b"shop/api created  (not enforced yet: host firewall)" in done.stdout


def test_waiting_for_what_changed_nothing_waits_for_what_is_stored(tmp_path):
    (tmp_path / "p.yaml").write_bytes(POLICY)
    unchanged = {"revision": 0, "policies": [APPLIED | {"action": "unchanged"}]}
    node = {"node": "n1", "connected": True, "realised": 41, "reason": ""}
    answers = {
        ("POST", "/v1/policies"): (200, encoded(unchanged)),
        STORED: LISTED,
        ("GET", "/v1/nodes"): (200, encoded({"nodes": [node], "revision": 41})),
        ("GET", "/v1/policies/wait"): (200, encoded({"done": True, "nodes": [node]})),
    }
    with http_door(answers) as door:
        done = tessera("policy", "apply", "-f", tmp_path, "--wait", "--server", door.address)
    assert b"1 of 1 nodes realised revision 41" in done.stdout
    assert door.asked[-1].query["revision"] == "41"


def test_apply_reads_standard_input():
    answer = {"revision": 7, "policies": [APPLIED], "problems": []}
    answers = {("POST", "/v1/policies"): (200, encoded(answer)), STORED: LISTED}
    with http_door(answers) as door:
        tessera("policy", "apply", "-f", "-", "--server", door.address, stdin=POLICY)
    assert (door.asked[0].query["source"], door.asked[0].body) == ("stdin", POLICY)


def test_one_refused_file_leaves_none_applied(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_bytes(POLICY)
    good = (200, encoded({"revision": 0, "policies": [APPLIED], "problems": []}))
    problem = {"source": "b.yaml", "line": 4, "column": 7, "severity": "error", "message": "bad"}
    bad = (422, encoded({"revision": 0, "policies": [], "problems": [problem]}))
    with http_door({("POST", "/v1/policies"): [good, bad]}) as door:
        done = tessera("policy", "apply", "-f", tmp_path, "--server", door.address)
    assert done.returncode == 1
    assert done.stderr == b"b.yaml:4:7: bad; nothing was applied\n"
    assert done.stdout == b""
    assert all(asked.query["dry_run"] == "1" for asked in door.asked)


@pytest.mark.parametrize("output", ["table", "json"])
def test_waiting_in_vain_names_the_node_and_its_reason(tmp_path, output):
    (tmp_path / "p.yaml").write_bytes(POLICY)
    nodes = [
        {"node": "n1", "connected": True, "realised": 7, "reason": ""},
        {"node": "n2", "connected": True, "realised": 6, "reason": "policy map is full"},
        {"node": "n3", "connected": False, "realised": 5, "reason": ""},
    ]
    waited = {"done": False, "revision": 7, "nodes": nodes}
    answers = {
        ("POST", "/v1/policies"): (200, encoded({"revision": 7, "policies": [APPLIED]})),
        ("GET", "/v1/policies/wait"): (200, encoded(waited)),
        STORED: LISTED,
    }
    with http_door(answers) as door:
        done = tessera(
            "policy", "apply", "-f", tmp_path, "--wait", "--timeout", "2s", "-o", output,
            "--server", door.address,
        )  # fmt: skip
    assert done.returncode == 1
    assert door.asked[-1].query == {"revision": "7", "timeout_s": "2"}
    if output == "json":
        assert json.loads(done.stdout)["realised"]["done"] is False
    else:
        line = done.stderr.decode()
        assert "1 of 3 nodes realised revision 7" in line
        assert "n2: policy map is full" in line
        assert "n3: not connected, last realised revision 5" in line


def test_delete_by_name_and_by_file(tmp_path):
    (tmp_path / "p.yaml").write_bytes(POLICY)
    deleted = encoded({"revision": 8, "policies": [APPLIED | {"action": "deleted"}]})
    answers = {
        ("DELETE", "/v1/policies/CiliumNetworkPolicy/shop/api"): (200, deleted),
        ("DELETE", "/v1/policies/CiliumClusterwideNetworkPolicy/_/x"): (200, deleted),
        ("POST", "/v1/policies/delete"): (200, deleted),
    }
    with http_door(answers) as door:
        server = ("--server", door.address)
        by_name = tessera("policy", "delete", "cnp", "api", "-n", "shop", *server)
        cluster = tessera("policy", "delete", "ccnp", "x", *server)
        by_file = tessera("policy", "delete", "-f", tmp_path, *server)
    assert [one.returncode for one in (by_name, cluster, by_file)] == [0, 0, 0]
    assert b"CiliumNetworkPolicy shop/api deleted" in by_name.stdout


def test_delete_of_nothing_named_is_refused():
    done = tessera("policy", "delete")
    assert done.returncode == 1
    assert b"name a policy" in done.stderr


def test_a_policy_asked_for_by_name_and_absent_is_an_error():
    with http_door({("GET", "/v1/policies"): (200, b'{"policies":[]}')}) as door:
        done = tessera("policy", "get", "cnp", "x", "-n", "shop", "--server", door.address)
    assert done.returncode == 1
    assert b"no policy 'x' in namespace shop" in done.stderr


def _flow(name, port, verdict="FORWARDED"):
    end = {"ip": "10.0.0.1", "port": 4000, "identity": 300, "namespace": "shop", "name": name}
    return {
        "time": "2026-01-02T03:04:05.678901Z", "verdict": verdict, "direction": "INGRESS",
        "source": end, "destination": end | {"port": port, "name": "db"}, "proto": "TCP",
        "tcp_flags": "SYN", "drop_reason": 133 if verdict == "DROPPED" else 0,
        "drop_reason_desc": "POLICY_DENIED" if verdict == "DROPPED" else "",
        "rule_id": 2, "rule": "default deny: selected by CiliumNetworkPolicy shop/api",
        "endpoint": {"id": 3},
    }  # fmt: skip


def test_observe_chooses_by_name_and_port_and_keeps_the_last(tmp_path):
    flows = [_flow("web", 80), _flow("api", 80), _flow("api", 443), _flow("api", 80, "DROPPED")]
    body = b"".join(encoded(flow) + b"\n" for flow in flows)
    with http_door({("GET", "/v1/events"): (200, body)}, tmp_path / "a.sock") as door:
        args = ("observe", "--from", "shop/api", "--port", "80", "--agent-socket", door.address)
        text = tessera(*args, "--last", "1", "--verdict", "dropped")
        lines = tessera(*args, "-o", "json")
    assert len(lines.stdout.splitlines()) == 2
    assert door.asked[0].query == {"verdict": "DROPPED"}
    line = text.stdout.decode()
    assert line.startswith("03:04:05.678 DROPPED   INGRESS shop/api 10.0.0.1:4000 (300) -> shop/db")
    assert "POLICY_DENIED: default deny: selected by CiliumNetworkPolicy shop/api" in line


def test_status_says_which_half_does_not_answer(tmp_path):
    with http_door({("GET", "/v1/status"): (200, b'{"policies":3}')}) as door:
        done = tessera(
            "status", "-o", "json", "--server", door.address,
            "--agent-socket", tmp_path / "none.sock",
        )  # fmt: skip
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"control_plane": {"policies": 3}, "agent": None}
    assert b"none.sock does not answer (no such socket)" in done.stderr
