"""A machine that runs guests itself, by its console: files, background jobs, the daemon, and guests one level deeper.

H is what this machine emulates (``guest/nested/host.py``), G1 runs in H, G2 in G1; all three speak alike.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import shlex
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from guest.boot.console import MachineError
from guest.boot.machine import QEMU
from guest.boot.service import Metrics
from guest.nested.lines import Line, LineConsole

BASE_SERIAL = "hyperbell-base"
PROJECT_SERIAL = "hyperbell-project"
# With XSAVE, KVM under TCG shows the kernel a size that it warns about at length. Without it no AVX either: Linux 7.3
# takes AVX for usable where CPUID shows it (polyval in its start-up tests), and has an invalid opcode.
GUEST_CPU = "host,-xsave,-avx,-avx2"
# Where two levels handle each exit, and TCG both levels, an exit takes milliseconds and a tick of the clock several
# exits: at 250 ticks a second a newer kernel does nothing else. KVM keeps the ticks of a periodic timer this far apart.
RARE_TICK_US = 100_000
BOOT_SECONDS = 60.0
LIFETIME_SECONDS = 900  # no guest outlives this, even when nobody looks any more
SERVE_SECONDS = 60.0
LOOK_US = 250_000  # no oftener: to look is two programs, on the one CPU that the daemon starts on
CONSOLE_CHUNK = 2400  # of base64: a terminal takes no longer lines than 4,095 characters


@dataclass(frozen=True)
class NestedMachine:
    """A real QEMU guest under KVM of the level that boots it. ``devices`` are QEMU arguments.

    ``launcher`` stands before QEMU's name; ``with_images`` gives the guest the images too, so that it can run guests;
    ``rare_ticks`` makes its clock a periodic timer. Its memory is the shared ``mem``, as vhost-user needs it.
    """

    devices: Sequence[str] = ()
    cpu: str = GUEST_CPU
    memory_mib: int = 256
    cpus: int = 1
    board: str = "pc"
    bios: str = "qboot.rom"  # with a device passed on by VFIO qboot goes astray: bios-256k.bin then
    append: str = ""
    launcher: str = ""
    huge_pages: bool = False  # fewer page faults at two levels, and larger mappings behind an IOMMU
    with_images: bool = False
    rare_ticks: bool = False  # for a guest of a guest

    def command(self, console: str, lines: Sequence[str], images: Sequence[str]) -> str:
        """The shell command that runs it, its serial ports on the terminals ``console`` and ``lines``."""
        words = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-accel", "kvm", "-machine", f"{self.board},memory-backend=mem", "-bios", self.bios]
        cpu, append = self.cpu, f"console=ttyS0 quiet panic=-1 {self.append}".strip()
        if self.rare_ticks:
            cpu, append = f"{cpu},-tsc-deadline", f"{append} highres=off nohz=off"
        words += ["-cpu", cpu, "-smp", str(self.cpus), "-m", f"{self.memory_mib}M"]
        huge = ",hugetlb=on,hugetlbsize=2M" if self.huge_pages else ""
        words += ["-object", f"memory-backend-memfd,id=mem,size={self.memory_mib}M,share=on{huge}"]
        words += ["-kernel", "/boot/vmlinux", "-initrd", "/project/boot/guest.cpio"]
        words += ["-append", append]
        for number, terminal in enumerate((console, *lines)):
            words += ["-chardev", f"serial,id=line{number},path={terminal}", "-serial", f"chardev:line{number}"]
        if self.with_images:
            for serial, disk in zip((BASE_SERIAL, PROJECT_SERIAL), images, strict=True):
                words += ["-drive", f"if=none,id={serial},file={disk},format=raw,readonly=on"]
                words += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
        return f"{self.launcher} {shlex.join([*words, *self.devices])}".strip()


@dataclass
class Job:
    """A command that runs in the background of ``level``, in a process group of its own."""

    level: Level
    name: str
    pid: int
    status: int | None = None

    @property
    def log_path(self) -> str:
        return f"/run/{self.name}.log"

    async def log(self) -> str:
        """All it has said."""
        return (await self.level.read(self.log_path)).decode(errors="replace")

    async def wait(self, timeout_seconds: float = 30) -> int:
        """Wait for its end; its exit status."""
        if self.status is None:
            answer = await self.level.run(f"wait {self.pid}", status=None, timeout_seconds=timeout_seconds)
            self.status = answer.status
        return self.status

    async def stop(self, timeout_seconds: float = 30, signal: str = "TERM") -> int:
        """End it, and wait; its exit status."""
        if self.status is None:
            await self.level.run(f"kill -{signal} {self.pid} 2>/dev/null", status=None)
        return await self.wait(timeout_seconds)


@dataclass
class LevelDaemon:
    """``hyperbell serve`` in ``level``, ready."""

    job: Job
    metrics_port: int | None

    async def metrics(self, name: str = "hyperbell_") -> Metrics:
        """Scrape its metrics page; only what is called ``name...``, because a console is slow."""
        address = f"http://127.0.0.1:{self.metrics_port}/metrics"
        answer = await self.job.level.run(f"wget -q -O /run/metrics {address} && grep ^{name} /run/metrics")
        return Metrics("\n".join([*answer.lines, ""]))

    async def log(self) -> str:
        return await self.job.log()

    async def stop(self) -> None:
        """SIGTERM, and wait. ``MachineError`` unless it ends with status 0."""
        status = await self.job.stop()
        if status != 0:
            raise MachineError(f"the daemon ended with status {status} after SIGTERM:\n{await self.log()}")


class Level(LineConsole):
    """One machine. ``below`` are free lines for the consoles of guests of its own."""

    def __init__(self, name: str, line: Line, below: Sequence[Line] = ()) -> None:
        super().__init__(name, line)
        self._below = list(below)
        self._numbers = itertools.count(1)

    @abstractmethod
    async def write(self, path: str, content: str | bytes) -> None:
        """Make a file."""

    @abstractmethod
    async def read(self, path: str) -> bytes:
        """The content of a file."""

    @asynccontextmanager
    async def job(self, name: str, command: str) -> AsyncIterator[Job]:
        """Run ``command`` in the background; ended when the block is left. ``name`` is its log's, once a level."""
        log = f"/run/{name}.log"
        answer = await self.run(f"setsid {command} >{log} 2>&1 </dev/null & result pid $!")
        job = Job(self, name, int(answer.results["pid"]))
        try:
            yield job
        finally:
            with trio.CancelScope(shield=True):
                if job.status is None and not self.lost:
                    await self.run(f"kill -KILL -- -{job.pid} 2>/dev/null; wait {job.pid}", status=None)

    @asynccontextmanager
    async def serve(self, config: str, name: str = "daemon") -> AsyncIterator[LevelDaemon]:
        """``hyperbell serve`` from the moment it serves, with the configuration ``config`` (TOML, absolute paths)."""
        await self.write(f"/run/{name}.toml", config)
        async with self.job(name, f"hyperbell --log-format json serve /run/{name}.toml") as job:
            await self.run(
                f"""until grep -q '"event": *"serving"' {job.log_path}; do"""
                f" kill -0 {job.pid} || {{ cat {job.log_path}; break; }}; usleep {LOOK_US}; done; kill -0 {job.pid}",
                timeout_seconds=SERVE_SECONDS,
            )
            port = [line.rpartition(":")[2].strip(' "') for line in config.splitlines() if line.startswith("metrics")]
            yield LevelDaemon(job, int(port[0]) if port else None)

    @asynccontextmanager
    async def boot(self, machine: NestedMachine, name: str = "") -> AsyncIterator[Guest]:
        """A guest that takes commands; ended when the block is left, if it has not been powered off.

        ``MachineError`` when it does not boot, with what QEMU said.
        """
        name = name or f"G{int(self.name[1:] or 0) + 1}"
        line = self._below.pop(0)
        deeper = [self._below.pop(0)] if machine.with_images else []
        mark = f"GUEST line {next(self._numbers)} of {self.name}"
        command = machine.command(line.device, [each.device for each in deeper], await self._images())
        log = f"/run/{name}.log"
        script = (
            f"printf '\\n{mark}\\n' >{line.device};"
            f" timeout -s KILL {LIFETIME_SECONDS} env {command} </dev/null >{log} 2>&1;"
            f' status=$?; cat {log} >{line.device}; printf "\\nGUEST ended $status\\n" >{line.device}'
        )
        if machine.huge_pages:
            await self.run(f"n=/proc/sys/vm/nr_hugepages; echo $(($(cat $n) + {machine.memory_mib // 2})) >$n")
        if machine.rare_ticks:
            await self.run(f"echo {RARE_TICK_US} >/sys/module/kvm/parameters/min_timer_period_us")
        guest = Guest(name, line, [each.seen_as("/dev/ttyS1") for each in deeper])
        try:
            async with self.job(f"{name}-boot", f"sh -c {shlex.quote(script)}"):
                await guest.expect(mark, BOOT_SECONDS)
                await guest.expect_userspace(BOOT_SECONDS)
                await guest.expect_ready()
                yield guest
        finally:
            await guest.close()
            if machine.huge_pages and not self.lost:
                await self.run(f"n=/proc/sys/vm/nr_hugepages; echo $(($(cat $n) - {machine.memory_mib // 2})) >$n")
            if guest.lost:
                self.lost = True  # what it says later would mix with what comes next
            self._below[:0] = [line, *deeper]

    async def _images(self) -> tuple[str, str]:
        """The disks that hold the images here."""
        answer = await self.run("result base $base; result project $project")
        return answer.results["base"], answer.results["project"]


class Guest(Level):
    """A guest of a level; files travel by its console, so they should be small."""

    kind = "nested"

    async def write(self, path: str, content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        text = base64.b64encode(data).decode()
        await self.run(f": >{path}")
        for begin in range(0, len(text), CONSOLE_CHUNK):
            await self.run(f"echo {text[begin : begin + CONSOLE_CHUNK]} | base64 -d >>{path}")

    async def read(self, path: str) -> bytes:
        answer = await self.run(f"gzip -c {path} | base64", timeout_seconds=60)
        return gzip.decompress(base64.b64decode("".join(answer.lines)))

    async def power_off(self, timeout_seconds: float = 40) -> None:
        """Shut it down and wait until its QEMU has ended by itself."""
        await self._transmit(b"0 poweroff -f\n")
        status = await self.expect("GUEST ended ", timeout_seconds, "its power-off")
        if status != "GUEST ended 0":
            raise MachineError(f"{self.name}: QEMU ended with status {status.split()[-1]} at power-off", self.tail())

    def _examine(self, text: str, what: str) -> None:
        if text.startswith("GUEST ended "):
            raise MachineError(
                f"{self.name}: QEMU ended (status {text.split()[-1]}) while we waited for {what}", self.tail()
            )
        super()._examine(text, what)
