"""Options of ``type = "vsock"``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field, field_validator

from virtio.claims import Claims, Unique
from virtio.device import DeviceOptions
from virtio.devices.vsock.host import CLIENTS_MAX, PORT_MAX
from virtio.devices.vsock.packet import CID_FIRST_GUEST, CID_LAST_GUEST

OF_A_CONNECTION: Final = 2  # descriptors: its socket, and what waits for the other end to leave
OF_CLIENTS: Final = 2 * (CLIENTS_MAX + 1)
LAST_WORDS_MAX: Final = 64
"""Connections that the guest has closed and whose host has yet to read what it sent: 16 MiB of it at most."""
OF_OTHERS: Final = OF_CLIENTS + OF_A_CONNECTION * LAST_WORDS_MAX


class VsockOptions(DeviceOptions):
    """Who the guest is, and where the host meets it."""

    cid: int = Field(
        ge=CID_FIRST_GUEST, le=CID_LAST_GUEST, description="The guest's context id: its address, 3 or more."
    )
    path: Path = Field(
        description="The Unix socket on which the host connects to the guest (CONNECT PORT); the guest's connections "
        "to port N of the host come to path_N, which is no other socket of this file."
    )
    group: str | None = Field(
        None,
        min_length=1,
        max_length=63,
        description="Guests of one group may connect to each other. Default: to the host only.",
    )
    connections: int = Field(
        512,
        ge=1,
        le=16384,
        description="Connections at most; further ones are refused. Another guest of the group has at most as many as "
        "it leaves free, and an eighth is left to the host and to this guest.",
    )

    @field_validator("path")
    @classmethod
    def _path_has_a_name(cls, value: Path) -> Path:
        if not value.name:
            raise ValueError(f"{value} is a folder, and a socket needs a name")
        return value

    @property
    def descriptors_max(self) -> int:
        """Those of its connections, and of those that are over for the guest; clients that have not said yet which port
        they want, and the sockets on which they come."""
        return OF_A_CONNECTION * self.connections + OF_OTHERS

    def connections_of(self, descriptors: int) -> int:
        """How many connections so many descriptors are enough for; one at least."""
        return max(1, min(self.connections, (descriptors - OF_OTHERS) // OF_A_CONNECTION))

    @property
    def seqpacket_path(self) -> Path:
        """The socket like ``path`` for whole messages."""
        return self.path.with_name(f"{self.path.name}.seqpacket")

    def claims(self, name: str) -> Claims:
        """Without a group nobody asks for a guest by its cid. Its longest path is that of the last port."""
        unique = Unique(f'cid {self.cid} of group "{self.group}"', "cid") if self.group is not None else None
        return Claims(
            unique=unique,
            sockets={("path",): self.path_of_port(PORT_MAX)},
            derived={"path": self.seqpacket_path},
            numbered=self.path,
        )

    def path_of_port(self, port: int) -> Path:
        """Where a program of the host waits for the guest's connections to ``port``."""
        return self.path.with_name(f"{self.path.name}_{port}")
