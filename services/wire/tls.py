"""TLS material from files, for both ends of a connection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from services.runtime.errors import Unusable


@dataclass(frozen=True, slots=True)
class ServerTls:
    """`client_ca_file` set: only clients with a certificate of that authority may connect."""

    cert_file: str
    key_file: str
    client_ca_file: str = ""

    def credentials(self) -> grpc.ServerCredentials:
        pair = (_read(self.key_file, "key"), _read(self.cert_file, "certificate"))
        authority = _read(self.client_ca_file, "client CA") if self.client_ca_file else None
        return grpc.ssl_server_credentials(
            [pair], root_certificates=authority, require_client_auth=authority is not None
        )


@dataclass(frozen=True, slots=True)
class ClientTls:
    """`server_name`: the name the certificate must carry when it is not the one dialled."""

    ca_file: str
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        if bool(self.cert_file) != bool(self.key_file):
            raise Unusable("a client certificate needs both cert_file and key_file")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca_file, "CA"),
            private_key=_read(self.key_file, "key") if self.key_file else None,
            certificate_chain=_read(self.cert_file, "certificate") if self.cert_file else None,
        )


def _read(path: str, what: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise Unusable(f"cannot read the TLS {what} {path!r}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise Unusable(f"the TLS {what} {path!r} is not in PEM format")
    return content
