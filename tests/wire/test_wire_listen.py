"""Where a server may listen, and what it says when it may not."""

from __future__ import annotations

import datetime
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.errors import Retry, Unusable
from services.wire.client import call, channel
from services.wire.server import serve
from services.wire.tls import ClientTls, ServerTls


def nothing(server: grpc.aio.Server) -> None:
    """Health alone is served."""


async def check(target: str, tls: ClientTls | None = None) -> bool:
    async with channel(target, tls=tls) as dialled:
        stub = health_pb2_grpc.HealthStub(dialled)
        answer = await call(stub.Check, health_pb2.HealthCheckRequest(), deadline_s=5)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_port_zero_is_bound_and_told() -> None:
    async with serve("127.0.0.1:0", nothing) as bound:
        assert bound.port > 0
        assert bound.target == f"127.0.0.1:{bound.port}"
        assert await check(bound.target)


async def test_a_port_in_use_is_named() -> None:
    async with serve("127.0.0.1:0", nothing) as bound:
        with pytest.raises(Unusable, match=f"{bound.target}: Address already in use"):
            async with serve(bound.target, nothing):
                pass
        assert await check(bound.target)


async def test_the_port_is_free_once_the_server_is_gone() -> None:
    async with serve("127.0.0.1:0", nothing) as bound:
        target = bound.target
    async with serve(target, nothing):
        assert await check(target)


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "nonsense", "192.0.2.1:0"])
async def test_an_address_that_is_none_is_named(listen: str) -> None:
    with pytest.raises(Unusable, match=f"cannot listen on {listen}"):
        async with serve(listen, nothing):
            pass


@pytest.mark.parametrize("mode", [0o600, 0o660])
async def test_the_socket_is_born_with_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "t.sock"
    async with serve(f"unix://{path}", nothing, socket_mode=mode) as bound:
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert await check(bound.target)


async def test_a_socket_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    async with serve(f"unix://{path}", nothing) as bound:
        assert await check(bound.target)


async def test_a_live_socket_is_not_taken_over(tmp_path: Path) -> None:
    listen = f"unix://{tmp_path}/t.sock"
    async with serve(listen, nothing):
        with pytest.raises(Unusable, match="another process serves it"):
            async with serve(listen, nothing):
                pass
        assert await check(listen)


async def test_a_file_that_is_no_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    path.write_text("precious")
    with pytest.raises(Unusable, match="is not a socket"):
        async with serve(f"unix://{path}", nothing):
            pass
    assert path.read_text() == "precious"


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=f"the folder {tmp_path}/none does not exist"):
        async with serve(f"unix://{tmp_path}/none/t.sock", nothing):
            pass


async def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="at most 107 bytes"):
        async with serve(f"unix://{tmp_path}/{'x' * 100}.sock", nothing):
            pass


# ------------------------------------------------------------------ TLS


@dataclass(frozen=True, slots=True)
class Files:
    ca: str
    cert: str
    key: str


def issue(folder: Path, name: str) -> Files:
    """A self-signed certificate, its own authority, for `name`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert_file.write_bytes(pem)
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Files(str(cert_file), str(cert_file), str(key_file))


async def test_mutual_tls_admits_the_known_client_only(tmp_path: Path) -> None:
    server, client = issue(tmp_path, "ipamd.test"), issue(tmp_path, "agent.test")
    stranger = issue(tmp_path, "stranger.test")
    tls = ServerTls(server.cert, server.key, client_ca_file=client.ca)
    async with serve("127.0.0.1:0", nothing, tls=tls) as bound:
        known = ClientTls(server.ca, client.cert, client.key, server_name="ipamd.test")
        assert await check(bound.target, known)
        for refused in (
            ClientTls(server.ca, stranger.cert, stranger.key, server_name="ipamd.test"),
            ClientTls(server.ca, server_name="ipamd.test"),
            ClientTls(stranger.ca, client.cert, client.key, server_name="ipamd.test"),
            None,
        ):
            with pytest.raises(Retry, match="cannot be reached"):
                await check(bound.target, refused)


async def test_tls_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("not pem")
    files = issue(tmp_path, "a.test")
    with pytest.raises(Unusable, match=r"key '/none\.key': No such file"):
        ServerTls(files.cert, "/none.key").credentials()
    with pytest.raises(Unusable, match="not in PEM format"):
        ServerTls(str(tmp_path / "bad.pem"), files.key).credentials()
    with pytest.raises(Unusable, match="both cert_file and key_file"):
        ClientTls(files.ca, cert_file=files.cert).credentials()
