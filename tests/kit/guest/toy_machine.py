"""The toy guest in a machine of our own, with a disk, entropy and a network interface, and what it made of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from guest.boot.console import results_of
from guest.boot.pattern import SECTOR_SIZE, check_pattern
from guest.boot.toy import Toy, prepare_toy
from transports.hypercall import Policy
from transports.kvm.boot import pvh
from transports.kvm.host import Kvm
from transports.kvm.machine.machine import DeviceSetup, Machine, MachineSetup, open_machine
from transports.kvm.vm.ending import VmEnd
from transports.kvm.vm.entry import PvhEntry
from virtio.backend.backend import Backend
from virtio.device import DeviceOptions
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.devices.net.device import Net, NetOptions
from virtio.devices.rng import Rng
from virtio.errors import HostError
from virtio.native.worker import Worker

GUARD: Final = 120.0
"""Seconds after which a guest has failed. Where every instruction is emulated one takes about half a second."""
RAM_SIZE: Final = 64 << 20
DISK_SIZE: Final = 1 << 20
KEY: Final = 0x3C5A69
REQUESTS: Final = 16
NAMES: Final = {1: "net", 2: "blk", 4: "rng"}


def need_toy() -> Toy:
    """The programs; a test skips by name where there is no KVM to run them."""
    try:
        Kvm.open().close()
    except HostError as error:
        pytest.skip(f"no /dev/kvm: {error}")
    return prepare_toy(print)


def why_no_hypercall() -> str | None:
    with Kvm.open() as kvm:
        return kvm.why_no_hypercall


def need_hypercalls() -> None:
    reason = why_no_hypercall()
    if reason is not None:
        pytest.skip(f"no hypercall doorbell: {reason}")


@dataclass
class Run:
    """How one run of the program ended, and what it said."""

    end: VmEnd
    output: str

    @property
    def results(self) -> dict[str, str]:
        return results_of(self.output.splitlines())

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("RESULT error=") for line in self.output.splitlines() if "RESULT error=" in line]

    def number(self, key: str) -> int:
        return int(self.results[key])

    def assert_good(self) -> None:
        assert self.errors == [], self.output
        assert (self.end.kind, self.end.status) == ("exit", 0), self.output
        assert self.results["errors"] == "0"


@dataclass
class ToyMachine:
    """A machine with its three devices; it runs once."""

    machine: Machine
    toy: Toy
    image: Path
    disk: Blk
    output: bytearray = field(default_factory=bytearray)
    _watchers: list[tuple[bytes, trio.Event]] = field(default_factory=list)

    async def run(self, bits: int, *words: str) -> Run:
        """Run the program for ``bits`` with ``words`` on its command line, to its end."""
        kernel = pvh.read_kernel(self.toy.program(bits))
        line = " ".join([*self.device_words(), "net=reflect", f"requests={REQUESTS}", *words])
        boot = pvh.lay_out(kernel, self.machine.ram.size, command_line=line)
        for gpa, data in boot.placements:
            self.machine.ram.write(gpa, bytes(data))
        with trio.fail_after(GUARD):
            end = await self.machine.run(PvhEntry(boot.entry_gpa, boot.start_info_gpa), self._print)
        return Run(end, self.output.decode(errors="replace"))

    def device_words(self) -> list[str]:
        return [
            f"device={device.backend.device_id}:{device.slot.gpa:#x}:{device.slot.gsi}:{device.slot.port:#x}"
            for device in self.machine.devices
        ]

    def _print(self, chunk: bytes) -> None:
        self.output += chunk
        for text, event in self._watchers:
            if text in self.output:
                event.set()

    async def says(self, text: str) -> None:
        """Wait until the guest has printed ``text``."""
        event = trio.Event()
        self._watchers.append((text.encode(), event))
        self._print(b"")
        with trio.fail_after(GUARD):
            await event.wait()

    def says_now(self, prefix: str) -> int:
        """How many lines so far begin with ``prefix``."""
        return sum(line.startswith(prefix) for line in self.output.decode(errors="replace").splitlines())

    def tell_to_stop(self) -> None:
        """The looping guest looks at the last sector of its disk."""
        with self.image.open("r+b") as file:
            os.pwrite(file.fileno(), b"STOP", DISK_SIZE - SECTOR_SIZE)

    def kicks(self, name: str, queue: int = 0) -> dict[str, int]:
        """How often a queue was rung, by kind, as the back end counted; kinds that never rang are left out."""
        (device,) = [each for each in self.machine.devices if NAMES[each.backend.device_id] == name]
        backend: Any = device.backend
        return {kind: count for kind, count in backend.stats().queues[queue].doorbells.items() if count}

    async def rung(self, name: str, queue: int = 0, **kinds: int) -> None:
        """Wait until a queue was rung exactly so often, by kind: a count is read some time after its work is done."""
        with trio.fail_after(GUARD):
            while (counts := self.kicks(name, queue)) != kinds:
                assert all(count <= kinds.get(kind, 0) for kind, count in counts.items()), (name, queue, counts, kinds)
                await trio.lowlevel.checkpoint()

    def check_disk(self, requests: int = REQUESTS) -> None:
        """The disk holds the pattern, byte for byte: checked on the host's side."""
        assert check_pattern(self.image, 0, requests * 2 * SECTOR_SIZE, 1) == ""


@contextlib.asynccontextmanager
async def toy_machine(
    folder: Path,
    toy: Toy,
    *,
    policies: Sequence[Policy] = ("offer", "offer", "offer"),
    disk_queues: int = 2,
    ram_size: int = RAM_SIZE,
    **setup: Any,
) -> AsyncIterator[ToyMachine]:
    """``setup`` as of ``MachineSetup``."""
    image = folder / "disk.img"
    image.touch()
    os.truncate(image, DISK_SIZE)
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(Worker("toy"))
        disk = Blk("disk", BlkOptions(path=image, serial="TOY-1"), disk_queues, 256)
        devices = [
            disk,
            Rng("entropy", DeviceOptions(), 1, 64),
            Net("lan", NetOptions(frames="reflect"), 1, 256),
        ]
        backends = []
        for device in devices:
            stack.callback(device.close)
            backends.append(await stack.enter_async_context(Backend(device, workers=[worker])))
        chosen = [DeviceSetup(backend, policy) for backend, policy in zip(backends, policies, strict=True)]
        machine = await stack.enter_async_context(open_machine(MachineSetup(ram_size, **setup), chosen))
        yield ToyMachine(machine, toy, image, disk)
