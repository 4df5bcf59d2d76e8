"""Run QEMU with a guest whose console takes commands and answers with results."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from daemon.attach.qemu_front_ends import RECONNECT_MS_SINCE
from daemon.attach.qemu_version import installed_version
from guest.boot.accel import Acceleration, choose_acceleration
from guest.boot.console import Console, Listener, MachineError
from guest.debian.cache import PrepareError, Progress

QEMU = "qemu-system-x86_64"
END_SECONDS = 3
BOOT_SECONDS = {"kvm": 20.0, "tcg": 90.0}
REBOOT_SECONDS = 90.0
LIFETIME_SECONDS = 600  # no QEMU outlives this, even when the process that started it is killed


@dataclass(frozen=True)
class Machine:
    """What QEMU is to be. ``devices`` are QEMU arguments, shared memory included (see ``shared_memory``)."""

    kernel: Path
    initramfs: Path
    devices: Sequence[str]
    memory_mib: int = 256
    cpus: int = 1
    board: str = "pc"
    append: str = ""
    reboots: bool = False

    def command(self, acceleration: Acceleration) -> list[str]:
        """The whole QEMU command line."""
        return [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
            *([] if self.reboots else ["-no-reboot"]),
            *("-machine", self.board, "-bios", "qboot.rom", *acceleration.qemu_arguments),
            *("-m", f"{self.memory_mib}M", "-smp", str(self.cpus)),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", f"console=ttyS0 quiet panic=-1 {self.append}".strip()),
            *self.devices,
        ]


def reconnecting() -> str:
    """What a chardev's options end with for QEMU to connect again after its back-end was restarted."""
    version = installed_version(QEMU)
    if version is None:
        raise PrepareError(f"{QEMU} is not installed; install the Debian package 'qemu-system-x86'")
    return ",reconnect-ms=1000" if version >= RECONNECT_MS_SINCE else ",reconnect=1"


def shared_memory(mib: int) -> list[str]:
    """Guest memory that a vhost-user back-end can map; the size must be the machine's."""
    return ["-object", f"memory-backend-memfd,id=mem,size={mib}M,share=on", "-machine", "memory-backend=mem"]


class Guest(Console):
    """A booted guest on the standard streams of its QEMU, or of another program that is its machine (``kind``)."""

    def __init__(self, process: trio.Process, listen: Listener) -> None:
        super().__init__(listen)
        self._process = process

    async def reboot(self) -> None:
        """Reset the machine (``Machine.reboots`` must be set) and wait until it takes commands again."""
        await self._transmit(b"0 reboot -f\n")
        await self.expect_userspace(REBOOT_SECONDS)
        await self.expect_ready()

    async def power_off(self, timeout_seconds: float = 20) -> None:
        """Shut the guest down and wait for its machine to end by itself."""
        await self._transmit(b"0 poweroff -f\n")
        with trio.move_on_after(timeout_seconds):
            while await self._read():
                pass
            status = await self._process.wait()
            if status != 0:
                raise MachineError(f"{self.kind} ended with status {status} at power-off", self.tail())
            return
        raise MachineError(f"{self.kind} did not end within {timeout_seconds:.0f} s of the power-off", self.tail())

    async def _receive(self) -> bytes:
        assert self._process.stdout is not None
        return bytes(await self._process.stdout.receive_some(65536))

    async def _transmit(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise MachineError(f"{self.kind} is gone", self.tail()) from error

    async def _why_ended(self) -> str:
        return f"{self.kind} ended (status {await self._process.wait()})"

    async def end(self) -> None:
        """End the machine, whatever it does. Safe to call twice."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(END_SECONDS):
                if self._process.returncode is None:
                    self._process.terminate()  # timeout(1) hands it on, and waits for it
                await self._process.wait()
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    await stream.aclose()


async def start_machine(command: Sequence[str]) -> trio.Process:
    """The program that is a machine, its console on its standard streams."""
    return await trio.lowlevel.open_process(
        ["timeout", "--signal=KILL", str(LIFETIME_SECONDS), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, which end() ends as a whole
    )


class Hypervisor:
    """Boots guests, with KVM where Linux really runs on it, and remembers when it does not.

    ``say`` gets the line that tells which and why, ``listen`` every console line as it is read.
    """

    def __init__(self, say: Progress, listen: Listener | None = None) -> None:
        if shutil.which(QEMU) is None:
            raise PrepareError(f"{QEMU} is not installed; install the Debian package 'qemu-system-x86'")
        if shutil.which("timeout") is None:
            raise PrepareError("'timeout' is not installed; install the Debian package 'coreutils'")
        self._say = say
        self._listen = listen or (lambda line: None)
        self.acceleration = choose_acceleration()
        say(f"guests run with {self.acceleration.name.upper()}: {self.acceleration.why}")

    @asynccontextmanager
    async def boot(self, machine: Machine) -> AsyncIterator[Guest]:
        """A guest that takes commands; QEMU is ended when the block is left. ``MachineError`` if it does not boot."""
        guest = await self._start(machine)
        try:
            try:
                await guest.expect_userspace(BOOT_SECONDS[self.acceleration.name])
            except MachineError as failure:
                if self.acceleration.name != "kvm":
                    raise
                # The toy guest ran at full speed, Linux does not: believe Linux.
                await guest.end()
                self.acceleration = Acceleration("tcg", f"Linux does not come up with KVM ({failure.args[0]})")
                self._say(f"guests run with TCG: {self.acceleration.why}")
                guest = await self._start(machine)
                await guest.expect_userspace(BOOT_SECONDS["tcg"])
            await guest.expect_ready()
            yield guest
        finally:
            await guest.end()

    async def _start(self, machine: Machine) -> Guest:
        return Guest(await start_machine(machine.command(self.acceleration)), self._listen)
