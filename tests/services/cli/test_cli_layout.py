import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.layout import Layout, child_environ, dump, layout_of, node_config
from services.runtime import config
from services.runtime.errors import Invalid

LAYOUT = Layout(Path("/s"), Path("/r"), Path("/sys/fs/bpf/x"))

_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
_plain = st.one_of(
    _text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, width=32)
).filter(lambda value: value not in (float("inf"), float("-inf")))
_values = st.recursive(
    _plain | st.lists(_text, max_size=3),
    lambda inner: st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_text, _values, max_size=4))
def test_what_is_written_as_toml_is_read_back_unchanged(content):
    assert tomllib.loads(dump(content)) == content


def test_every_process_accepts_the_file_that_up_writes(tmp_path):
    path = tmp_path / "tessera.toml"
    path.write_text(dump(node_config({}, LAYOUT, ["127.0.0.1:7479"])))
    for name, cls in (
        ("identityd", config.IdentitydConfig),
        ("ipamd", config.IpamdConfig),
        ("policyd", config.PolicydConfig),
        ("apid", config.ApidConfig),
    ):
        config.load(cls, name, path, {})
    agent = config.load(config.AgentConfig, "agent", path, {})
    assert agent.policyd == "unix:///r/policyd.sock"
    assert agent.run_dir == "/r"


def test_the_users_file_wins_and_targets_follow_a_listener_it_moves():
    user = {"policyd": {"listen": "127.0.0.1:9999"}, "agent": {"attach": "clsact"}}
    tables = node_config(user, LAYOUT, ["e:1"])
    assert tables["agent"]["policyd"] == tables["apid"]["policyd"] == "127.0.0.1:9999"
    assert tables["agent"]["attach"] == "clsact"
    assert user == {"policyd": {"listen": "127.0.0.1:9999"}, "agent": {"attach": "clsact"}}


def test_policyd_is_told_the_cluster_of_identityd():
    assert "cluster" not in node_config({}, LAYOUT, ["e:1"])["policyd"]
    tables = node_config({"identityd": {"cluster": "north"}}, LAYOUT, ["e:1"])
    assert tables["policyd"]["cluster"] == "north"


def test_the_command_line_wins_over_the_file_for_directories():
    user = {"agent": {"run_dir": "/from/file", "state_dir": "/state/file"}}
    layout = layout_of(user, run_dir=Path("/from/line"))
    assert (layout.run_dir, layout.state_dir) == (Path("/from/line"), Path("/state/file"))


def test_a_run_directory_too_long_for_a_socket_is_refused_by_name():
    with pytest.raises(Invalid, match="too long for the sockets"):
        Layout(run_dir=Path("/" + "x" * 100))


def test_a_section_that_is_not_a_table_is_refused():
    with pytest.raises(Invalid, match=r"\[agent\] must be a table"):
        node_config({"agent": 3}, LAYOUT, ["e:1"])


def test_children_do_not_inherit_the_command_lines_own_variables():
    environ = {"TESSERA_SERVER": "x", "TESSERA_AGENT_SOCKET": "y", "TESSERA_LOG_LEVEL": "debug"}
    assert child_environ(environ) == {"TESSERA_LOG_LEVEL": "debug"}
