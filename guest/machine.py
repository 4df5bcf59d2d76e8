"""Run QEMU with a guest whose console takes commands and answers with results."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from guest.accel import Acceleration, choose_acceleration
from guest.cache import PrepareError, Progress

QEMU = "qemu-system-x86_64"
TAIL_LINES = 25
END_SECONDS = 3
BOOT_SECONDS = {"kvm": 20.0, "tcg": 90.0}
REBOOT_SECONDS = 90.0
READY_SECONDS = 60.0
LIFETIME_SECONDS = 600  # no QEMU outlives this, even when the process that started it is killed


class MachineError(Exception):
    """The guest did not do what it was asked. ``tail`` is the end of its console, for the reader of the error."""

    def __init__(self, message: str, tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.tail = list(tail)

    def __str__(self) -> str:
        if not self.tail:
            return str(self.args[0])
        return "\n  | ".join([f"{self.args[0]}\nthe end of the guest's console:", *self.tail])


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


def shared_memory(mib: int) -> list[str]:
    """Guest memory that a vhost-user back-end can map; the size must be the machine's."""
    return ["-object", f"memory-backend-memfd,id=mem,size={mib}M,share=on", "-machine", "memory-backend=mem"]


@dataclass(frozen=True)
class ConsoleLine:
    """One line of the console; ``seconds`` since QEMU was started."""

    seconds: float
    text: str


Listener = Callable[[ConsoleLine], None]


@dataclass(frozen=True)
class Answer:
    """What a command in the guest said: its exit status, its ``RESULT key=value`` lines, and all its lines."""

    status: int
    results: dict[str, str]
    lines: list[str]


class Guest:
    """A booted guest. One task at a time talks to it; its console is read while somebody waits for it."""

    def __init__(self, process: trio.Process, listen: Listener) -> None:
        self.console: list[ConsoleLine] = []
        self._process = process
        self._listen = listen
        self._started = trio.current_time()
        self._partial = b""
        self._seen = 0  # console lines already examined by expect()
        self._commands = 0

    async def run(self, command: str, *, status: int | None = 0, timeout_seconds: float = 30) -> Answer:
        """Run a shell command line in the guest. ``MachineError`` if late or if the status is another (None: any)."""
        self._commands += 1
        mark = f"GUEST exit {self._commands} "
        begin = len(self.console)
        await self._send(f"{self._commands} {command}\n")
        text = await self.expect(mark, timeout_seconds, f"the end of '{command}'")
        lines = [line.text for line in self.console[begin : self._seen - 1]]
        answer = Answer(int(text.removeprefix(mark)), results_of(lines), lines)
        if status is not None and answer.status != status:
            said = "; ".join(f"{key}: {value}" for key, value in answer.results.items() if key.endswith("error"))
            raise MachineError(
                f"'{command}' ended with status {answer.status}, not {status}{said and ': ' + said}", self.tail()
            )
        return answer

    async def expect(self, start: str, timeout_seconds: float, what: str = "") -> str:
        """The next console line that begins with ``start``, not looking twice at any line. ``MachineError`` if late."""
        what = what or f"'{start}'"
        with trio.move_on_after(timeout_seconds):
            while True:
                while self._seen < len(self.console):
                    text = self.console[self._seen].text
                    self._seen += 1
                    if text.startswith(start):
                        return text
                    if "Kernel panic" in text:
                        raise MachineError(f"the guest's kernel panicked while we waited for {what}", self.tail())
                if not await self._read():
                    status = await self._process.wait()
                    raise MachineError(f"QEMU ended (status {status}) while we waited for {what}", self.tail())
        raise MachineError(f"the guest did not come to {what} within {timeout_seconds:.0f} s", self.tail())

    async def reboot(self) -> None:
        """Reset the machine (``Machine.reboots`` must be set) and wait until it takes commands again."""
        await self._send("0 reboot -f\n")
        await self.expect_userspace(REBOOT_SECONDS)
        await self.expect_ready()

    async def expect_userspace(self, timeout_seconds: float) -> None:
        """Wait for init's first word, before it loads any driver of ours."""
        await self.expect("GUEST userspace", timeout_seconds, "its userspace")

    async def expect_ready(self) -> None:
        """Wait until init has loaded the drivers and takes commands."""
        await self.expect("GUEST ready", READY_SECONDS, "the end of its init")

    async def power_off(self, timeout_seconds: float = 20) -> None:
        """Shut the guest down and wait for QEMU to end by itself."""
        await self._send("0 poweroff -f\n")
        with trio.move_on_after(timeout_seconds):
            while await self._read():
                pass
            status = await self._process.wait()
            if status != 0:
                raise MachineError(f"QEMU ended with status {status} at power-off", self.tail())
            return
        raise MachineError(f"QEMU did not end within {timeout_seconds:.0f} s of the guest's power-off", self.tail())

    def tail(self) -> list[str]:
        """The last lines of the console."""
        return [f"{line.seconds:7.2f}  {line.text}" for line in self.console[-TAIL_LINES:]]

    async def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(text.encode())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise MachineError("QEMU is gone", self.tail()) from error

    async def _read(self) -> bool:
        """Wait for more of the console; False at its end."""
        assert self._process.stdout is not None
        data = await self._process.stdout.receive_some(65536)
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data and self._partial:
            lines, self._partial = [self._partial], b""
        seconds = trio.current_time() - self._started
        for text in (line.decode(errors="replace").strip("\r") for line in lines):
            if text:
                self.console.append(ConsoleLine(seconds, text))
                self._listen(self.console[-1])
        return bool(data)

    async def end(self) -> None:
        """End QEMU, whatever it does. Safe to call twice."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(END_SECONDS):
                if self._process.returncode is None:
                    self._process.terminate()  # timeout(1) hands it on to QEMU, and waits for it
                await self._process.wait()
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    await stream.aclose()


def results_of(lines: Iterable[str]) -> dict[str, str]:
    """The ``RESULT key=value`` lines among ``lines``, as a dict; a later value of a key wins."""
    pairs = (line.removeprefix("RESULT ").partition("=") for line in lines if line.startswith("RESULT "))
    return {key: value for key, _, value in pairs}


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
        process = await trio.lowlevel.open_process(
            ["timeout", "--signal=KILL", str(LIFETIME_SECONDS), *machine.command(self.acceleration)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which end() ends as a whole
        )
        return Guest(process, self._listen)
