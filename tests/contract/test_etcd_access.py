"""The etcd store behind TLS and behind a login."""

from __future__ import annotations

import base64
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from services.runtime.config import EtcdConfig
from services.runtime.errors import Retry, Unusable
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.etcd import EtcdStore
from services.store.model import LeaseId
from tests.fakes.certificates import Authority
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD, Follower

pytestmark = pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD)


# -- TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
async def tls_etcd(tmp_path: Path, authority: Authority) -> AsyncIterator[EmbeddedEtcd]:
    pair = authority.issue("server")
    plain = EmbeddedEtcd(tmp_path / "data")
    secure = f"https://{plain.endpoint}"
    port = int(plain.endpoint.rpartition(":")[2])
    arguments = (
        f"--listen-client-urls={secure}",
        f"--advertise-client-urls={secure}",
        f"--cert-file={pair.cert}",
        f"--key-file={pair.key}",
        f"--trusted-ca-file={authority.ca}",
        "--client-cert-auth",
    )
    async with EmbeddedEtcd(tmp_path / "data", port, extra_arguments=arguments) as server:
        yield server


async def test_a_client_certificate_opens_etcd(
    tls_etcd: EmbeddedEtcd, authority: Authority
) -> None:
    pair = authority.issue("client")
    access = EtcdConfig(
        endpoints=(f"https://{tls_etcd.endpoint}",),
        ca_file=str(authority.ca),
        cert_file=str(pair.cert),
        key_file=str(pair.key),
    )
    async with EtcdStore(access) as store:
        await store.put("p/a", b"1")
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        assert seen.values == {"p/a": b"1"}


async def test_a_certificate_of_another_authority_is_refused(
    tls_etcd: EmbeddedEtcd, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "elsewhere", "stranger")
    pair = authority.issue("client")
    access = EtcdConfig(
        endpoints=(tls_etcd.endpoint,),
        ca_file=str(stranger.ca),
        cert_file=str(pair.cert),
        key_file=str(pair.key),
        request_timeout_s=1.0,
    )
    async with EtcdStore(access) as store:
        with pytest.raises(Retry, match=r"TLS handshake failed; check etcd\.ca_file"):
            await store.get("a")


async def test_unreadable_and_half_given_certificates_are_named(
    tmp_path: Path, authority: Authority
) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(Unusable, match=r"missing\.pem"):
        EtcdStore(EtcdConfig(ca_file=str(missing)))
    with pytest.raises(Unusable, match=r"cert_file and etcd\.key_file go together"):
        EtcdStore(EtcdConfig(cert_file=str(authority.ca)))


# -- login


@pytest.fixture
async def locked_etcd(own_etcd: EmbeddedEtcd) -> EmbeddedEtcd:
    """With the users root, and reader who may read and write p/ only."""
    start, end = (base64.b64encode(text).decode() for text in (b"p/", b"p0"))
    permission = {"permType": "READWRITE", "key": start, "range_end": end}
    steps: list[tuple[str, dict[str, object]]] = [
        ("user/add", {"name": "root", "password": "secret"}),
        ("user/add", {"name": "reader", "password": "word"}),
        ("role/add", {"name": "root"}),
        ("role/add", {"name": "p"}),
        ("role/grant", {"name": "p", "perm": permission}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("user/grant", {"user": "reader", "role": "p"}),
        ("enable", {}),
    ]
    async with aiohttp.ClientSession() as session:
        for path, body in steps:
            url = f"http://{own_etcd.endpoint}/v3/auth/{path}"
            async with session.post(url, data=msgspec.json.encode(body)) as answer:
                assert answer.status == 200, await answer.text()
    return own_etcd


def login(server: EmbeddedEtcd, username: str, password: str) -> EtcdConfig:
    return EtcdConfig(endpoints=(server.endpoint,), username=username, password=password)


async def test_a_user_and_password_open_etcd(locked_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(login(locked_etcd, "root", "secret")) as store:
        await store.put("p/a", b"1")
        lease = await store.grant(60)
        assert await store.keep_alive(lease) == 60
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        assert seen.values == {"p/a": b"1"}


async def test_a_login_that_expired_is_made_again(locked_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(login(locked_etcd, "root", "secret")) as store:
        await store.put("p/a", b"1")
        lease = await store.grant(60)
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        # A restart forgets the tokens that etcd handed out.
        locked_etcd.send_signal(signal.SIGKILL)
        await locked_etcd.stop()
        await locked_etcd.start()
        await store.put("p/a", b"2")
        assert await store.keep_alive(lease) > 0
        await seen.until_values({"p/a": b"2"})


async def test_a_wrong_password_is_unusable(locked_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(login(locked_etcd, "root", "wrong")) as store:
        with pytest.raises(Unusable, match=r"check etcd\.username and etcd\.password"):
            await store.get("a")
        with pytest.raises(Unusable):
            await anext(store.watch("p/"))
        with pytest.raises(Unusable):
            await store.keep_alive(LeaseId(7))


async def test_no_login_where_one_is_needed_is_unusable(locked_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(EtcdConfig(endpoints=(locked_etcd.endpoint,))) as store:
        with pytest.raises(Unusable, match=r"check etcd\.username"):
            await store.get("a")


async def test_a_user_is_held_to_the_role(locked_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(login(locked_etcd, "reader", "word")) as store:
        await store.put("p/a", b"1")
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        with pytest.raises(Unusable, match="permission denied"):
            await store.put("q", b"")
        with pytest.raises(Unusable, match="permission denied"):
            await anext(store.watch("q/"))


async def test_a_login_nobody_asked_for_is_unusable(own_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(login(own_etcd, "root", "secret")) as store:
        with pytest.raises(Unusable, match="authentication is not enabled"):
            await store.get("a")
