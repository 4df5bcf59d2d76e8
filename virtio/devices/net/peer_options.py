"""What a network device's socket is told in the configuration: addresses, and which of them go together."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Final

from pydantic import Field, field_validator

from virtio.device import DeviceOptions

_KINDS: Final = ("tcp", "udp", "unix", "unixgram")
_FORMS: Final = "tcp:HOST:PORT, udp:HOST:PORT, unix:/PATH or unixgram:/PATH"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a socket is: a ``path`` for "unix" and "unixgram", a ``host`` and a ``port`` for "tcp" and "udp"."""

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def is_stream(self) -> bool:
        return self.kind in ("tcp", "unix")

    def __str__(self) -> str:
        if self.path:
            return f"{self.kind}:{self.path}"
        return f"{self.kind}:[{self.host}]:{self.port}" if ":" in self.host else f"{self.kind}:{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``ValueError`` says what is wrong with ``text``."""
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"{text} is no address; write {_FORMS}")
    if kind.startswith("unix"):
        if not rest.startswith("/") or len(os.fsencode(rest)) > 107:
            raise ValueError(f"{text}: a socket's path begins with / and has at most 107 bytes")
        return Address(kind, path=rest)
    host, _, port = rest.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text}: write {kind}:HOST:PORT, with a port from 1 to 65535")
    host = host.removeprefix("[").removesuffix("]")
    if _is_multicast(host):
        raise ValueError(f"{text}: multicast groups are not supported")
    return Address(kind, host=host, port=int(port))


def _is_multicast(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_multicast
    except ValueError:
        return False  # a name


class SocketOptions(DeviceOptions):
    """Options of ``backend = "socket"``."""

    local: str | None = Field(
        None,
        description='With backend = "socket", where it is met: "tcp:HOST:PORT" or "unix:/PATH" listens for a peer, '
        'which speaks QEMU\'s stream format; "udp:HOST:PORT" or "unixgram:/PATH" is where its datagrams come.',
        examples=["tcp:0.0.0.0:4433"],
    )
    remote: str | None = Field(
        None,
        description='With backend = "socket", where the peer is. A stream has this or local, datagrams have both.',
        examples=["tcp:192.0.2.7:4433"],
    )

    @field_validator("local", "remote")
    @classmethod
    def _is_an_address(cls, text: str | None) -> str | None:
        if text is not None:
            parse_address(text)
        return text

    def check_socket(self) -> None:
        """``ValueError`` unless ``local`` and ``remote`` go together."""
        given = [parse_address(text) for text in (self.local, self.remote) if text is not None]
        if not given:
            raise ValueError('local or remote is missing: name one, for instance remote = "tcp:192.0.2.7:4433"')
        if len(given) == 1 and not given[0].is_stream:
            raise ValueError("datagrams need both local, where they come, and remote, where they go")
        if len(given) == 2 and any(address.is_stream for address in given):
            raise ValueError("a stream has either local, where it listens, or remote, where it connects to")
        if len({address.kind for address in given}) > 1:
            raise ValueError("local and remote must be of one kind, udp or unixgram")
