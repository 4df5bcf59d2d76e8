"""A file that cannot be opened or made: the error tells the remedy, and it fits the cause."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from virtio.devices.blk.device import Blk, BlkOptions
from virtio.devices.host.device_node import open_node
from virtio.devices.i2c.chips import EepromChip
from virtio.devices.i2c.options import ChipOptions
from virtio.devices.net.peer import open_socket
from virtio.devices.net.peer_options import SocketOptions
from virtio.errors import HostError
from virtio.remedies import remedy
from virtio.socket_file import Listen, SocketFile

REMEDIES = [
    # path, errno, under a unit, what helps
    ("/srv/images/a.img", errno.EROFS, True, "ReadWritePaths=/srv/images"),
    ("/srv/images/a.img", errno.EROFS, False, "mounted read-only"),
    ("/home/eva/a.img", errno.EACCES, True, "ProtectHome"),
    ("/root/a.img", errno.ENOENT, True, "ProtectHome"),
    ("/home/eva/a.img", errno.EACCES, False, "write access"),
    ("/dev/null", errno.EPERM, True, "DeviceAllow=/dev/null rw"),
    ("/srv/a.img", errno.EACCES, True, "write access"),
]


@pytest.mark.parametrize(("path", "number", "unit", "helps"), REMEDIES)
def test_the_remedy_fits_the_cause(
    path: str, number: int, unit: bool, helps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    if unit:
        monkeypatch.setenv("INVOCATION_ID", "0" * 32)

    def closed(*arguments: object, **more: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(HostError) as caught:
        Blk("disk", BlkOptions(path=Path(path)), 1, 64)
    assert helps in str(caught.value)
    assert helps in remedy(Path(path), number, writing=True)


@pytest.mark.parametrize("unit", [False, True])
def test_the_remedy_fits_whatever_cannot_be_made_or_opened(unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    if unit:
        monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    helps = "ReadWritePaths=/srv" if unit else "mounted read-only"

    def closed(*arguments: object, **more: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", closed)
    monkeypatch.setattr(socket.socket, "bind", closed)
    monkeypatch.setattr(Path, "symlink_to", closed)
    eeprom = ChipOptions(kind="eeprom", address=0x50, path=Path("/srv/eeprom"))
    for make in (
        lambda: SocketFile(Listen(Path("/srv/some.sock"))),
        lambda: EepromChip(eeprom),
        lambda: open_socket("net", SocketOptions(local="unix:/srv/peer")),
    ):
        with pytest.raises(HostError, match=helps):
            make()
    monkeypatch.setattr(
        os, "open", lambda *arguments, **more: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no"))
    )
    with pytest.raises(HostError, match="DeviceAllow=/dev/null rw"):
        open_node(Path("/dev/null"), "chip", missing="", forbidden="")


def test_what_is_only_read_is_not_told_to_be_read_only() -> None:
    assert "read_only" not in remedy(Path("/srv/a.img"), errno.EACCES, writing=False)


NOBODY: Final = 65534
MAKERS: Final[dict[str, Callable[[Path], object]]] = {
    "socket": lambda path: SocketFile(Listen(path)),
    "image": lambda path: Blk("disk", BlkOptions(path=path), 1, 64),
    "eeprom": lambda path: EepromChip(ChipOptions(kind="eeprom", address=0x50, path=path)),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
@pytest.mark.parametrize("kind", MAKERS)
def test_what_lies_in_a_closed_folder_is_told_so(kind: str) -> None:
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:  # mode 0700, and root's
        closed = Path(name)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(HostError, match="Permission denied; give the daemon's user write access") as caught:
                MAKERS[kind](closed / "deep" / "file")
        finally:
            os.seteuid(0)
        assert caught.value.errno == errno.EACCES
