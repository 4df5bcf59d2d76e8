"""The processes that are measured: hyperbell and qemu-storage-daemon, started and watched the same way."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Self

START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 10.0
SOCKET_NAME: Final = "device.sock"
NULL_DISK: Final = f"{Path(__file__).parent / 'null_disk.py'}:NullDisk"
CPUCLOCK_SCHED: Final = 2  # of clock ids made from a process id, see clock_getcpuclockid(3)


class ServerError(Exception):
    """A server did not start, or ended early; the text has its last words."""


@dataclass(frozen=True, slots=True)
class Disk:
    """What a server serves: ``path`` None is the null back end; ``size`` in bytes. ``python``: ours is in Python."""

    path: Path | None
    size: int
    direct: bool = False
    python: bool = False


def hyperbell_command(folder: Path, disk: Disk, queues: int, cpu: int, poll_us: int | None = None) -> list[str]:
    """The command that serves ``disk``."""
    lines = ["[daemon]", 'metrics = "off"', "[workers.w0]", f"cpus = [{cpu}]"]
    if poll_us is not None:
        lines.append(f"poll_us = {poll_us}")
    lines += ["[devices.disk]", f'socket = "{folder / SOCKET_NAME}"', f"queues = {queues}", "packed = true"]
    if disk.python:
        lines += [f'type = "{NULL_DISK}"', f"size = {disk.size}"]
    elif disk.path is None:
        lines += ['type = "blk"', 'worker = "w0"', 'backend = "null"', f"size = {disk.size}"]
    else:
        lines += ['type = "blk"', 'worker = "w0"', f'path = "{disk.path}"', f"direct = {str(disk.direct).lower()}"]
    return serve_command(folder, lines)


def serve_command(folder: Path, lines: Sequence[str]) -> list[str]:
    """Write a configuration into ``folder`` and return the command that serves it."""
    program = Path(sys.executable).parent / "hyperbell"
    if not program.exists():
        raise ServerError(f"{program} is missing: run make setup")
    config = folder / "bench.toml"
    config.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return [str(program), "serve", str(config)]


def qemu_command(folder: Path, disk: Disk, queues: int, aio: str) -> list[str]:
    """The qemu-storage-daemon command; ``aio`` is "io_uring" or "threads". Its I/O thread polls as it does by default.

    It does not lock the file, so that all servers can have the same one open.
    """
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        raise ServerError("qemu-storage-daemon is missing: apt-get install qemu-system-common")
    if disk.path is None:
        blockdev = f"driver=null-co,node-name=disk,read-zeroes=off,size={disk.size}"
    else:
        direct = "on" if disk.direct else "off"
        blockdev = f"driver=file,node-name=disk,filename={disk.path},aio={aio},cache.direct={direct},locking=off"
    export = "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io0,addr.type=unix"
    export += f",addr.path={folder / SOCKET_NAME},num-queues={queues}"
    return [program, "--object", "iothread,id=io0", "--blockdev", blockdev, "--export", export]


class Server:
    """A running server whose threads may use ``cpu`` only; ``with`` ends it. Its vhost-user socket is ``socket``."""

    def __init__(self, name: str, command: list[str], folder: Path, cpu: int) -> None:
        self.name = name
        self.cpu = cpu
        self.socket = folder / SOCKET_NAME
        self._log: IO[bytes] = (folder / "log").open("w+b")
        with pinned(cpu):  # a child inherits it, with every thread it makes
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, cwd=folder
            )
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _wait_until_it_listens(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not _is_listened_at(self.socket):
            self.check()
            if time.monotonic() > end:
                raise ServerError(f"{self.name} has no socket after {START_SECONDS:g} s: {self.last_words()}")
            time.sleep(0.02)

    def check(self) -> None:
        """Raise ``ServerError`` if the process has ended."""
        if (status := self._process.poll()) is not None:
            raise ServerError(f"{self.name} ended with status {status}: {self.last_words()}")

    def last_words(self) -> str:
        """The end of what the process printed."""
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").strip()
        return text[-1000:] or "it printed nothing"

    def cpu_seconds(self) -> float:
        """User and system time of all threads so far, also of ended ones."""
        return process_cpu_seconds(self._process.pid)

    def memory_bytes(self) -> int:
        """Resident memory without the guest's own pages (they are the same for every server)."""
        fields = read_status(Path(f"/proc/{self._process.pid}/status"))
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))

    def wakeups(self) -> int:
        """How often a thread of the process went to sleep so far; each was a wake-up before or is one to come."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int(read_status(task / "status")["voluntary_ctxt_switches"]) for task in tasks)

    def strayed_threads(self) -> list[str]:
        """Names of threads that may run elsewhere than on ``cpu`` (older kernels let io_uring's workers)."""
        names = []
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, KeyError):  # it ended meanwhile
                fields = read_status(task / "status")
                if fields["Cpus_allowed_list"] != str(self.cpu):
                    names.append(fields["Name"])
        return sorted(set(names))

    def send_signal(self, number: int) -> None:
        """Send a signal to the process; after SIGSTOP all of its threads stand still when this returns."""
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def close(self) -> None:
        """End the process, by force if it does not go."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def _is_listened_at(path: Path) -> bool:
    """A socket's file is there a moment before anybody may connect; connecting would take the front-end's place."""
    lines = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:]
    fields = [line.split(maxsplit=7) for line in lines]
    return any(len(each) == 8 and each[7] == str(path) and int(each[3], 16) & 0x10000 for each in fields)


def process_cpu_seconds(pid: int) -> float:
    """The sum of utime and stime of ``/proc/PID/stat``, but from the process's CPU clock: in nanoseconds, not ticks."""
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def read_status(path: Path) -> dict[str, str]:
    """The fields of a ``/proc/.../status`` file."""
    fields = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.strip()
    return fields


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Within it the calling thread, and what it starts, runs on ``cpu`` only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
