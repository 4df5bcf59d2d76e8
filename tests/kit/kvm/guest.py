"""What the tests of real VMs share: a machine with a small program in it, and a way to watch it."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kit.kvm.guest_code import assemble

from transports.kvm.host import Kvm
from transports.kvm.vm.ending import VmEnd
from transports.kvm.vm.entry import LongModeEntry, PvhEntry, write_identity_map
from transports.kvm.vm.ram import GuestRam
from transports.kvm.vm.vmm import Access, Vm, VmSetup
from virtio.errors import HostError
from virtio.fd import OwnedFd

CODE_GPA = 0x1000
PAGE_TABLES_GPA = 0x10000
RAM_SIZE = 1 << 20
DEVICE_GPA = 0xD000_0000
DEVICE_SIZE = 0x200


def need_kvm() -> Kvm:
    """The open /dev/kvm; a test that needs it skips by name where there is none."""
    try:
        return Kvm.open()
    except HostError as error:
        pytest.skip(f"no /dev/kvm: {error}")


def eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def count_of(fd: OwnedFd) -> int:
    """How often the eventfd was signalled since it was last looked at."""
    try:
        return os.eventfd_read(fd.fileno())
    except BlockingIOError:
        return 0


def vcpu_threads() -> int:
    """Threads of vCPUs that this process has."""
    count = 0
    for path in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            count += (path / "comm").read_text().startswith("hb-vcpu")
    return count


def no_vcpu_thread_is_left() -> bool:
    """The kernel lists a joined thread for a moment longer; one that was not joined would stay."""
    until = time.monotonic() + 5
    while vcpu_threads() > 0 and time.monotonic() < until:
        os.sched_yield()
    return vcpu_threads() == 0


@dataclass
class Machine:
    """A VM with one program. ``output`` is what it printed; ``accesses`` the registers that came out to Python."""

    vm: Vm
    ram: GuestRam
    output: bytearray = field(default_factory=bytearray)
    accesses: list[tuple[int, int, bool, int]] = field(default_factory=list)

    def place(self, source: str, *, bits: int = 32) -> None:
        self.ram.write(CODE_GPA, assemble(source, origin=CODE_GPA, bits=bits))

    async def on_access(self, access: Access) -> int:
        self.accesses.append((access.offset, access.length, access.is_write, access.data))
        return 0

    async def run(
        self,
        source: str | None = None,
        *,
        bits: int = 32,
        on_access: Callable[[Access], Awaitable[int]] | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> VmEnd:
        if source is not None:
            self.place(source, bits=bits)

        def printed(chunk: bytes) -> None:
            self.output += chunk
            if on_output is not None:
                on_output(chunk)

        entry = PvhEntry(CODE_GPA, 0x6000) if bits == 32 else LongModeEntry(CODE_GPA, PAGE_TABLES_GPA, rsp=0x9000)
        return await self.vm.run(entry, on_access or self.on_access, printed)


@contextmanager
def machine(**setup: object) -> Iterator[Machine]:
    need_kvm().close()
    with GuestRam(RAM_SIZE) as ram:
        write_identity_map(ram, PAGE_TABLES_GPA)
        with Vm(VmSetup(ram, **setup)) as vm:  # type: ignore[arg-type]
            yield Machine(vm, ram)
    assert no_vcpu_thread_is_left()
