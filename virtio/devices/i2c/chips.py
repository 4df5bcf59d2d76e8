"""Simulated chips of an I2C bus: a map of registers, and an EEPROM."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from virtio.devices.i2c.options import ChipOptions, RegisterOptions
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.remedies import with_remedy

Written = Callable[[int, bytes], None]
"""Called with the number of the register, or the place in the EEPROM, and the bytes that the guest wrote there."""

ERASED: Final = 0xFF
"""What an EEPROM's byte is before anything was written, and what a bus reads where nobody drives it."""


class Chip(Protocol):
    """One chip. Not thread-safe, but for ``save``."""

    kind: str
    dirty: bool
    """``save`` has something to do."""

    def write(self, data: bytes, written: Written) -> bool:
        """The guest writes a segment, empty where it only asks who is there. False: a byte is not acknowledged."""

    def read(self, length: int) -> bytes: ...
    def get(self, number: int) -> bytes:
        """What is in a register, or at a place, for somebody beside the guest. ``KeyError``: there is none."""

    def set(self, number: int, value: int) -> None:
        """``KeyError``: there is none; ``OverflowError``: the value is too large for it."""

    def save(self) -> None:
        """Write to the file what the guest wrote; may take a while. ``HostError``: it cannot be written."""

    def close(self) -> None: ...


def make_chip(options: ChipOptions) -> Chip:
    """``HostError``: its file cannot be had."""
    return EepromChip(options) if options.kind == "eeprom" else RegisterChip(options)


class RegisterChip:
    """The first byte of a write chooses a register; what follows is written to it, and a read begins with it.

    Registers that are not described read as if nobody drove the bus, and writes to them are lost.
    """

    kind = "registers"
    dirty = False

    def __init__(self, options: ChipOptions) -> None:
        self._registers: dict[int, RegisterOptions] = {register.number: register for register in options.registers}
        self._values = {register.number: register.value for register in options.registers}
        self._order = options.byte_order
        self._step = int(options.auto_increment)
        self._pointer = 0

    def write(self, data: bytes, written: Written) -> bool:
        if data:
            self._pointer, data = data[0], data[1:]
        while data:
            register = self._registers.get(self._pointer)
            size = register.size if register is not None else 1
            piece, data = data[:size], data[size:]
            if register is not None and len(piece) == size:  # half a register is not written at all
                old, new = self._values[register.number], int.from_bytes(piece, self._order)
                self._values[register.number] = old & ~register.writable | new & register.writable
                written(register.number, piece)
            self._advance()
        return True

    def read(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            found += self.get(self._pointer) if self._pointer in self._registers else bytes([ERASED])
            self._advance()
        return bytes(found[:length])

    def _advance(self) -> None:
        self._pointer = (self._pointer + self._step) & 0xFF

    def get(self, number: int) -> bytes:
        return self._values[number].to_bytes(self._registers[number].size, self._order)

    def set(self, number: int, value: int) -> None:
        value.to_bytes(self._registers[number].size)
        self._values[number] = value

    def save(self) -> None:
        """It has no file."""

    def close(self) -> None:
        """It has no file."""


class EepromChip:
    """A memory such as the 24C02 (or, with more than 256 bytes, the 24C32 and larger: an address of two bytes).

    A write stays within a page and wraps around in it; a read goes on to the end of the memory, and from its start.
    """

    kind = "eeprom"

    def __init__(self, options: ChipOptions) -> None:
        self.dirty = False
        self._page = options.page
        self._protected = options.read_only
        self._address_size = 1 if options.size <= 256 else 2
        self._pointer = 0
        self._memory = bytearray([ERASED]) * options.size
        self._fd = self._open(options.path, options.size) if options.path is not None else None

    def _open(self, path: Path, size: int) -> OwnedFd:
        flags = os.O_RDONLY if self._protected else os.O_RDWR | os.O_CREAT
        try:
            fd = OwnedFd(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600))
        except OSError as error:
            raise _trouble(path, error) from error
        try:
            found = os.fstat(fd.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise HostError(f"eeprom {path}: {eeprom_fault(found, size, writable=True)}")
            fcntl.flock(fd.fileno(), (fcntl.LOCK_SH if self._protected else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if found.st_size == 0 and not self._protected:
                os.pwrite(fd.fileno(), self._memory, 0)
            elif fault := eeprom_fault(found, size, writable=not self._protected):
                raise HostError(f"eeprom {path}: {fault}")
            else:
                self._memory[:] = os.pread(fd.fileno(), size, 0).ljust(size, bytes([ERASED]))
        except OSError as error:
            fd.close()
            if isinstance(error, BlockingIOError):
                raise HostError(f"eeprom {path}: the file is used by another device or daemon") from error
            raise _trouble(path, error) from error
        except BaseException:
            fd.close()
            raise
        self._path = path
        return fd

    def write(self, data: bytes, written: Written) -> bool:
        if not data:
            return True
        address, data = data[: self._address_size], data[self._address_size :]
        if len(address) < self._address_size:
            return True
        self._pointer = int.from_bytes(address, "big") % len(self._memory)
        if not data:
            return True
        if self._protected:
            return False
        first = self._pointer
        start = first - first % self._page
        for offset, byte in enumerate(data):
            self._memory[start + (first - start + offset) % self._page] = byte
        self._pointer = start + (first - start + len(data)) % self._page
        self.dirty = self._fd is not None
        written(first, data)
        return True

    def read(self, length: int) -> bytes:
        size = len(self._memory)
        turns = (self._pointer + length) // size + 1
        found = bytes(self._memory * turns)[self._pointer : self._pointer + length]
        self._pointer = (self._pointer + length) % size
        return found

    def get(self, number: int) -> bytes:
        if not 0 <= number < len(self._memory):
            raise KeyError(number)
        return bytes(self._memory[number : number + 1])

    def set(self, number: int, value: int) -> None:
        self.get(number)
        self._memory[number : number + 1] = value.to_bytes(1)
        self.dirty = self._fd is not None and not self._protected

    def save(self) -> None:
        assert self._fd is not None, "dirty says so"
        self.dirty = False
        try:
            os.pwrite(self._fd.fileno(), bytes(self._memory), 0)
        except OSError as error:
            self.dirty = True
            raise _trouble(self._path, error) from error

    def close(self) -> None:
        if self._fd is not None:
            self._fd.close()


def eeprom_fault(found: os.stat_result, size: int, *, writable: bool) -> str:
    """Why the file that was ``found`` holds no memory of ``size`` bytes; "" if it does, or may be filled."""
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_size == size or (found.st_size == 0 and writable):
        return ""
    return f"it has {found.st_size} bytes, and the chip {size} (size)"


def _trouble(path: Path, error: OSError) -> HostError:
    number = error.errno or 0
    text = with_remedy(f"eeprom {path}: {os.strerror(number)}", path, number, writing=True, read_only_key=True)
    return HostError(text, errno=number)
