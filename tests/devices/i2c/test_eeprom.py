"""EEPROMs with a file: what the guest wrote is there, byte by byte, and nobody else's file is harmed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from kit.front_end.vhost_user_wire import no_fd_leaks

from virtio.devices.i2c.device import I2c
from virtio.devices.i2c.options import I2cOptions
from virtio.errors import HostError
from virtio.testing import TestDriver, attach

ADDRESS = 0x50


def eeprom(path: Path, *, size: int = 256, read_only: bool = False) -> I2c:
    chip = {"kind": "eeprom", "address": ADDRESS, "size": size, "path": path, "read_only": read_only}
    return I2c("bus", I2cOptions.model_validate({"chips": [chip]}), 1, 64)


async def write(driver: TestDriver, data: bytes) -> int:
    return (await driver.request(0, struct.pack("<HHI", ADDRESS << 1, 0, 0) + data, 1))[0]


async def read(driver: TestDriver, length: int) -> bytes:
    return (await driver.request(0, struct.pack("<HHI", ADDRESS << 1, 0, 2), length + 1))[:-1]


async def test_a_file_is_made_erased_and_holds_what_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "e"
    async with attach(eeprom(path)) as driver:
        assert path.read_bytes() == b"\xff" * 256
        assert path.stat().st_mode & 0o777 == 0o600
        assert await write(driver, b"\x10kept") == 0
        assert path.read_bytes()[0x10:0x14] == b"kept"
    async with attach(eeprom(path)) as driver:
        assert await write(driver, b"\x10") == 0
        assert await read(driver, 4) == b"kept"


async def test_a_protected_one_is_read_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(bytes(range(256)))
    path.chmod(0o400)
    async with attach(eeprom(path, read_only=True)) as driver:
        assert await write(driver, b"\x10X") == 1
        assert await write(driver, b"\x10") == 0
        assert await read(driver, 3) == b"\x10\x11\x12"
    assert path.read_bytes() == bytes(range(256))


async def test_a_file_that_cannot_be_written_any_more_fails_the_request_and_not_the_bus(tmp_path: Path) -> None:
    path = tmp_path / "e"
    device = eeprom(path)
    async with attach(device) as driver:
        # As if the disk had gone: the descriptor behind the chip cannot be written to.
        fd = device.bus._chips[ADDRESS]._fd.fileno()  # type: ignore[attr-defined]
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        kept = os.dup(fd)
        os.dup2(nothing, fd, inheritable=False)
        assert await write(driver, b"\x00A") == 1
        os.dup2(kept, fd, inheritable=False)
        os.close(nothing)
        os.close(kept)
        assert await write(driver, b"\x01B") == 0
        assert path.read_bytes()[:2] == b"AB"


def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(bytes(100))
    with no_fd_leaks(), pytest.raises(HostError, match="it has 100 bytes, and the chip 256"):
        eeprom(tmp_path / "e")
    assert (tmp_path / "e").read_bytes() == bytes(100)


def test_a_file_that_somebody_uses_is_refused(tmp_path: Path) -> None:
    with no_fd_leaks():
        first = eeprom(tmp_path / "e")
        with pytest.raises(HostError, match="used by another device or daemon"):
            eeprom(tmp_path / "e")
        first.close()
        eeprom(tmp_path / "e").close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with no_fd_leaks():
        with pytest.raises(HostError, match="not a regular file"):
            eeprom(tmp_path / "fifo")
        with pytest.raises(HostError, match="Is a directory"):
            eeprom(tmp_path)
        with pytest.raises(HostError, match="No such file or directory"):
            eeprom(tmp_path / "e", read_only=True)
        with pytest.raises(HostError, match="No such file or directory"):
            eeprom(tmp_path / "no" / "e")
