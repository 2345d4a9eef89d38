from __future__ import annotations

from pathlib import Path

import pytest

from services.runtime.config import (
    CLASSES,
    PROCESS_SECTIONS,
    AgentConfig,
    ApidConfig,
    IdentitydConfig,
    IpamdConfig,
    PolicydConfig,
    PoolConfig,
    load,
    shown,
)
from services.runtime.errors import Invalid


def written(directory: Path, text: str) -> Path:
    path = directory / "tessera.toml"
    path.write_text(text)
    return path


def test_every_process_has_a_table() -> None:
    assert tuple(CLASSES) == PROCESS_SECTIONS


@pytest.mark.parametrize("section", PROCESS_SECTIONS)
def test_without_a_file_every_key_has_its_default(section: str) -> None:
    assert load(CLASSES[section], section, None, {}) == CLASSES[section]()


def test_a_file_sets_its_own_and_the_common_tables(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [etcd]
        endpoints = ["a:1", "b:2"]
        [log]
        level = "debug"
        [identityd]
        cluster = "east"
        cluster_id = 3
        [ipamd]
        listen = "other:1"
        """,
    )
    config = load(IdentitydConfig, "identityd", path, {})
    assert config.etcd.endpoints == ("a:1", "b:2")
    assert config.log.level == "debug"
    assert (config.cluster, config.cluster_id) == ("east", 3)
    assert config.listen == IdentitydConfig().listen


def test_the_environment_is_stronger_than_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[etcd]\nendpoints = ["a:1"]\nrequest_timeout_s = 9.0\n')
    environ = {
        "TESSERA_ETCD_ENDPOINTS": "x:1, y:2,",
        "TESSERA_LOG_JSON": "true",
        "TESSERA_AGENT_EVENTS_BYTES": "8192",
        "TESSERA_POLICYD_LISTEN": "unix:///run/p.sock",
        "PATH": "/bin",
        "TESSERA_HOME": "somebody else's",
    }
    policyd = load(PolicydConfig, "policyd", path, environ)
    assert policyd.etcd.endpoints == ("x:1", "y:2")
    assert policyd.etcd.request_timeout_s == 9.0
    assert policyd.log.json
    assert policyd.listen == "unix:///run/p.sock"
    assert load(AgentConfig, "agent", path, environ).events_bytes == 8192


def test_pools_are_tables_of_their_own(tmp_path: Path) -> None:
    path = written(tmp_path, '[ipamd.pools.blue]\ncidrs = ["10.1.0.0/16"]\n')
    assert load(IpamdConfig, "ipamd", path, {}).pools == {"blue": PoolConfig(("10.1.0.0/16",), 26)}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[identityd]\nlisten_to = 'x'", "identityd.listen_to"),
        ("[etcd]\nendpoint = 'x'", "etcd.endpoint"),
        ("[identity]\nlisten = 'x'", r"\[identity\]"),
        ("[identityd]\nlisten = 1", "identityd.listen: Expected"),
        ("[identityd]\ncluster_id = 512", "identityd.cluster_id: Expected"),
        ("[identityd]\nlisten = 'nonsense'", "identityd.listen: 'nonsense' is neither host:port"),
        ("[identityd]\nlisten = 'h:66000'", "identityd.listen: 'h:66000'"),
        ("[identityd]\nmetrics_listen = 'h'", "identityd.metrics_listen: 'h' is not host:port"),
        ("[log]\nlevel = 'loud'", "log.level: 'loud' is none of debug"),
        ("[etcd]\nendpoints = 'h:1'", "etcd.endpoints: Expected"),
        ("[etcd]\nendpoints = ['h:x']", "etcd.endpoints: 'h:x' is not host:port"),
        ("[etcd]\nrequest_timeout_s = 0", "request_timeout_s"),
        ("identityd = 1", "identityd must be a table"),
        ("[identityd", "not TOML"),
        # A process does not take the common tables of others for keys of its own.
        ("[identityd.etcd]\nusername = 'x'", "identityd.etcd"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(Invalid, match=named) as caught:
        load(IdentitydConfig, "identityd", path, {})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("attach = 'xdp'", "agent.attach: 'xdp' is none of auto, tcx, clsact"),
        ("node_name = ''", "agent.node_name: ''"),
        ("node_ip = '300.1.1.1'", "agent.node_ip: .*300.1.1.1"),
        ("state_dir = 'here'", "agent.state_dir: 'here' is not an absolute path"),
        ("policy_peer_max = 12", "agent.policy_peer_max: Expected"),
    ],
)
def test_a_mistake_about_a_node_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(Invalid, match=named):
        load(AgentConfig, "agent", written(tmp_path, f"[agent]\n{text}"), {})


def test_a_pool_that_is_none_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, '[ipamd.pools.blue]\ncidrs = ["10.0.0.0/99"]\n')
    with pytest.raises(Invalid, match=r"ipamd.pools.*10.0.0.0/99"):
        load(IpamdConfig, "ipamd", path, {})


def test_a_value_of_the_environment_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    with pytest.raises(Invalid, match=r"^environment variable TESSERA_LOG_LEVEL: log\.level"):
        load(AgentConfig, "agent", path, {"TESSERA_LOG_LEVEL": "loud"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TESSERA_IDENTITYD_LISTEN_TO", "x"),
        ("TESSERA_ETCD_ENDPOINT", "x"),
        ("TESSERA_LOG_JSON", "perhaps"),
        ("TESSERA_IDENTITYD_CLUSTER_ID", "-1"),
        ("TESSERA_IDENTITYD_LOG", "x"),
    ],
)
def test_a_mistake_in_the_environment_is_named(variable: str, value: str) -> None:
    with pytest.raises(Invalid, match=variable):
        load(IdentitydConfig, "identityd", None, {variable: value})


def test_pools_in_the_environment_are_refused() -> None:
    with pytest.raises(Invalid, match="TESSERA_IPAMD_POOLS"):
        load(IpamdConfig, "ipamd", None, {"TESSERA_IPAMD_POOLS": "x"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"none\.toml cannot be read"):
        load(IdentitydConfig, "identityd", tmp_path / "none.toml", {})


def test_apid_has_no_etcd_and_ignores_its_table(tmp_path: Path) -> None:
    path = written(tmp_path, "[etcd]\nusername = 'x'\n")
    assert load(ApidConfig, "apid", path, {}) == ApidConfig()


def test_secrets_are_not_shown() -> None:
    config = load(IdentitydConfig, "identityd", None, {"TESSERA_ETCD_PASSWORD": "hush"})
    assert config.etcd.password == "hush"
    assert "hush" not in str(shown(config))
    assert "'password': '***'" in str(shown(config))
