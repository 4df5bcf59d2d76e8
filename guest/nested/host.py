"""H: a machine that TCG emulates, with a processor that has AMD's SVM, so that mainline KVM runs in it for real.

It boots in seconds, and is what stands in for a server with hardware virtualization on a machine that has none.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from guest.boot.machine import QEMU
from guest.nested.images import Images
from guest.nested.level import BASE_SERIAL, PROJECT_SERIAL, Level
from guest.nested.lines import Line

MEMORY_MIB = 4096
# One: with two, H now and then panics or stands still, or a guest of it has a triple fault, most of all while two
# guests run. A CPU was once found going round for ever in a breakpoint that the kernel had long taken out of its
# scheduler (KVM patches that with its first VM and without its last one), so QEMU 7.2 keeps what it has translated of
# patched code; a VM that is always there did not help enough. With one CPU none of this was ever seen.
CPUS = 1
# On a busy machine an emulated timer may be late when Linux looks whether it ticks. It takes that for a broken board
# ("8254 timer not connected to IO-APIC"), goes on without it, and was seen to stand still minutes later.
TIMER = "no_timer_check"
LINES = 4  # two G1 at a time, each with a G2
LIFETIME_SECONDS = 3600
BOOT_SECONDS = 30.0
EXCHANGE_SIZE = 256 * 1024 * 1024
EXCHANGE_SERIAL = "hyperbell-exchange"
BLOCK = 65536


class Host:
    """The process and the lines of one H. What it and its guests say is recorded in ``folder``.

    ``devices`` are further QEMU arguments. It outlives the event loop that started it: many tests use one H, each in a
    loop of its own.
    """

    def __init__(self, images: Images, folder: Path, devices: Sequence[str] = ()) -> None:
        self.folder = folder
        self.lost = False
        self._booted = False
        self._exchange = folder / "exchange"
        with self._exchange.open("wb") as file:
            file.truncate(EXCHANGE_SIZE)
        self._lines: list[Line] = []
        with ExitStack() as stack:
            theirs = []
            for name, device in (("H", ""), *((f"line{n + 1}", f"/dev/hvc{n}") for n in range(LINES))):
                ours, other = socket.socketpair()
                theirs.append(stack.enter_context(other))
                self._lines.append(Line(ours, device, folder / f"{name}.log"))
            said = stack.enter_context((folder / "qemu.log").open("wb"))
            self._process = subprocess.Popen(
                [*self._command(images, [other.fileno() for other in theirs]), *devices],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                pass_fds=[other.fileno() for other in theirs],
                start_new_session=True,
            )

    def _command(self, images: Images, lines: list[int]) -> list[str]:
        console, *further = lines
        words = ["timeout", "--signal=KILL", str(LIFETIME_SECONDS), QEMU]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-machine", "pc", "-bios", "qboot.rom", "-accel", "tcg,thread=multi", "-cpu", "max"]
        words += ["-smp", str(CPUS), "-m", f"{MEMORY_MIB}M"]
        words += ["-kernel", str(images.kernel.image), "-initrd", str(images.initramfs)]
        words += ["-append", f"console=ttyS0 quiet panic=-1 {TIMER}"]
        words += ["-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"]
        words += ["-device", "virtio-serial-pci"]
        for number, descriptor in enumerate(further):
            words += ["-chardev", f"socket,id=line{number},fd={descriptor}"]
            words += ["-device", f"virtconsole,chardev=line{number}"]
        for serial, image, options in (
            (BASE_SERIAL, images.base, ",readonly=on"),
            (PROJECT_SERIAL, images.project, ",readonly=on"),
            (EXCHANGE_SERIAL, self._exchange, ""),
        ):
            words += ["-drive", f"if=none,id={serial},file={image},format=raw{options}"]
            words += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
        return words

    @property
    def runs(self) -> bool:
        """Whether it can be used (again)."""
        return not self.lost and self._process.poll() is None

    @asynccontextmanager
    async def level(self) -> AsyncIterator[Level]:
        """H for the event loop that runs now; waits for its boot the first time."""
        level = HostLevel("H", self._lines[0], self._lines[1:], self._exchange)
        try:
            if not self._booted:
                await level.expect_userspace(BOOT_SECONDS)
                await level.expect_ready()
                self._booted = True
            yield level
        finally:
            self.lost = self.lost or level.lost or not self._booted
            await level.close()

    def end(self) -> None:
        """End it, whatever it does, and remove what takes room."""
        self._process.terminate()  # timeout(1) hands it on to QEMU, and waits for it
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        for line in self._lines:
            line.ours.close()
        self._exchange.unlink(missing_ok=True)


class HostLevel(Level):
    """H's console. Files go by a disk that both sides see, so they may be large."""

    kind = "hosts"

    def __init__(self, name: str, line: Line, below: list[Line], exchange: Path) -> None:
        super().__init__(name, line, below)
        self._exchange = exchange

    async def write(self, path: str, content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        with self._exchange.open("r+b") as file:
            file.write(data)
        blocks = -(-len(data) // BLOCK)
        # Direct, because H would otherwise remember what was in the exchange before.
        await self.run(
            f"dd if=$exchange of={path} bs={BLOCK} count={blocks} iflag=direct 2>/dev/null"
            f" && truncate -s {len(data)} {path}"
        )

    async def read(self, path: str) -> bytes:
        answer = await self.run(
            f"result size $(stat -c %s {path}) && dd if={path} of=$exchange bs={BLOCK} conv=notrunc,fsync 2>/dev/null"
        )
        with self._exchange.open("rb") as file:
            return file.read(int(answer.results["size"]))
