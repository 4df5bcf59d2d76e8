"""``hyperbell microvm`` as a process, with guests that need no operating system. Linux is in tests/nested."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from kit.guest.console import receive_exactly
from kit.host.failing_storage import failing_image
from kit.kvm.elf_kernel import PT_LOAD, PT_NOTE, Part, elf, pvh_note
from kit.project import ROOT

from guest.boot.toy import prepare_toy
from transports.kvm.host import Kvm

LIMIT = 60  # seconds; only a failing run gets there
LOAD_GPA = 0x100000

# 32-bit code, as PVH enters it.
OUT = b"\x66\xba%b\xb0%b\xee"  # mov dx, port; mov al, value; out dx, al
SLEEP = b"\xf4\xeb\xfd"  # hlt, again and again
SAY = b"".join(OUT % (b"\xf8\x03", bytes([letter])) for letter in b"hello\n")
PROGRAMS = {
    "off": OUT % (b"\x00\x06", b"\x34"),
    "reset": OUT % (b"\x02\x06", b"\x01"),
    "crash": b"\x0f\x01\x1d\x00\x40\x00\x00\x0f\x0b",  # lidt of zeroes; ud2
    "status": OUT % (b"\xf4\x00", b"\x03"),
    "sleep": SAY + SLEEP,
}


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """A kernel that does one thing."""

    def make(name: str) -> Path:
        path = tmp_path / name
        parts = [Part(PT_LOAD, LOAD_GPA, PROGRAMS[name] + SLEEP), Part(PT_NOTE, 0, pvh_note(LOAD_GPA, 4))]
        path.write_bytes(elf(parts, bits=32))
        return path

    return make


@pytest.fixture(scope="module", autouse=True)
def kvm() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm that this user may open")


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "daemon.cli", "microvm", "--memory", "4M", "--kernel", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def microvm(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), env=environment(), capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("off", 0, "hyperbell: the guest switched itself off\n"),
        ("reset", 1, "hyperbell: the guest asked for a reset\n"),
        ("crash", 1, "hyperbell: the guest broke down: a triple fault\n"),
        ("status", 1, "hyperbell: the guest ended with status 3\n"),
    ],
)
def test_each_end_has_a_line_and_an_exit_status(
    name: str, status: int, said: str, program: Callable[[str], Path]
) -> None:
    done = microvm(program(name))
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


def test_a_driver_of_our_own_finds_the_devices_where_the_command_line_puts_them(tmp_path: Path) -> None:
    """The guest program is a whole virtio driver: it checks every byte. The terminal is device 0."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    toy = prepare_toy(lambda text: None).program(64)
    devices = "device=2:0xd0001000:17:0x1002 device=4:0xd0002000:18:0x1004 device=1:0xd0003000:19:0x1006"
    done = microvm(
        *(toy, "--append", f"{devices} doorbell=pio requests=20", "--early-serial"),
        *("--device", f"blk,path={disk}", "--device", "rng", "--device", "net"),
    )
    assert done.returncode == 0, done.stderr
    results = dict(line.removeprefix("RESULT ").split("=", 1) for line in done.stderr.splitlines() if "=" in line)
    assert results["errors"] == "0"
    assert int(results["blk.bytes_written"]) > 0
    assert int(results["rng.bytes"]) > 0
    assert any(disk.read_bytes())


async def test_a_disk_that_hangs_does_not_keep_the_machine_from_ending() -> None:
    """The kernel may keep the process until the read of its file system has ended; ours is to give it up."""
    toy = prepare_toy(lambda text: None).program(64)
    said = b""
    async with failing_image(1 << 20) as image:
        await image.hang("read")
        words = ["--append", "device=2:0xd0001000:17:0x1002", "--stop-seconds", "1"]
        words += ["--device", f"blk,path={image.path}"]
        process = await trio.lowlevel.open_process(
            command(toy, *words), env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        try:
            with trio.fail_after(LIMIT):
                await image.hung("read")
                process.send_signal(signal.SIGTERM)
                while b"the daemon ends without waiting any longer" not in said:
                    piece = await process.stderr.receive_some()
                    assert piece, said
                    said += piece
                await image.hang()
                assert await process.wait() == 1
        finally:
            process.kill()
            await image.hang()
    assert b"blk queue 0: " in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "hyperbell: nothing: No such file or directory"),
        (["PROGRAM", "--initrd", "nothing"], "hyperbell: nothing: No such file or directory"),
        (["PROGRAM", "--device", "blk,path=missing.img"], "hyperbell: --device blk,path=missing.img: "),
        (["PROGRAM", "--kvm", "/dev/nokvm"], "hyperbell: no /dev/nokvm: load kvm_intel or kvm_amd"),
        (["PROGRAM", "--kvm", "/dev/null"], "hyperbell: /dev/null is not a KVM device"),
        (["PROGRAM", "--cpus", "255"], "hyperbell: 255 vCPUs: a VM here can have between 1 and"),
        (["PROGRAM", "--control", "/nowhere/ctl.sock"], "/nowhere/ctl.sock"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(words: list[str], said: str, program: Callable[[str], Path]) -> None:
    done = microvm(*(str(program("off")) if word == "PROGRAM" else word for word in words))
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


class Running:
    """A machine whose guest sleeps; what it and the guest say."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.errors = b""

    async def until(self, text: bytes) -> None:
        assert self.process.stderr is not None
        while text not in self.errors:
            more = await self.process.stderr.receive_some()
            assert more, self.errors
            self.errors += more

    async def end(self) -> int:
        assert self.process.stderr is not None
        async for more in self.process.stderr:
            self.errors += more
        return await self.process.wait()


@asynccontextmanager
async def running(stdin: int, stdout: int, *words: str | Path) -> AsyncIterator[Running]:
    with trio.fail_after(LIMIT):
        process = await trio.lowlevel.open_process(
            command(*words, "--early-serial"),
            env=environment(), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
        )  # fmt: skip
        machine = Running(process)
        try:
            await machine.until(b"hello\n")
            yield machine
        finally:
            process.kill()
            await process.wait()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


async def test_it_ends_after_its_stop_seconds_though_an_image_hangs_and_the_terminal_is_as_before(
    program: Callable[[str], Path], terminal: tuple[int, int]
) -> None:
    _, theirs = terminal
    before = termios.tcgetattr(theirs)
    async with failing_image(1 << 20) as image:
        words = ("--stop-seconds", "1", "--device", f"blk,path={image.path}")
        async with running(theirs, theirs, program("sleep"), *words) as machine:
            await image.hang("flush")
            machine.process.send_signal(signal.SIGTERM)
            await machine.until(b"ends without waiting any longer")
            await image.hang()  # the kernel itself waits for this answer
            assert await machine.end() == 1
            assert termios.tcgetattr(theirs) == before


def test_stop_seconds_that_make_no_sense_are_refused_by_name(program: Callable[[str], Path]) -> None:
    done = microvm(program("off"), "--stop-seconds", "0")
    assert done.returncode == 78
    assert "--stop-seconds" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_ends_it_and_the_terminal_is_as_before(
    number: signal.Signals, program: Callable[[str], Path], terminal: tuple[int, int]
) -> None:
    _, theirs = terminal
    before = termios.tcgetattr(theirs)
    async with running(theirs, theirs, program("sleep")) as machine:
        assert termios.tcgetattr(theirs) != before
        machine.process.send_signal(number)
        assert await machine.end() == 0
        assert b"hyperbell: stopped from outside\n" in machine.errors
    assert termios.tcgetattr(theirs) == before


async def test_the_escape_ends_it_and_control_c_does_not(
    program: Callable[[str], Path], terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    async with running(theirs, theirs, program("sleep")) as machine:
        os.write(ours, b"\x03\x01h")
        shown = b""
        while b"Ctrl-A x" not in shown:
            await trio.lowlevel.wait_readable(ours)
            shown += os.read(ours, 4096)
        assert machine.process.poll() is None
        os.write(ours, b"\x01x")
        assert await machine.end() == 0
    assert termios.tcgetattr(theirs) == before


async def test_metrics_and_the_control_socket_show_its_devices(tmp_path: Path, program: Callable[[str], Path]) -> None:
    control = tmp_path / "ctl.sock"
    words = ("--device", "rng,name=entropy", "--control", control, "--metrics", "127.0.0.1:0", "--log-level", "info")
    async with running(
        subprocess.DEVNULL, subprocess.DEVNULL, program("sleep"), *words, "--log-format", "json", "--key", "5a5a5a"
    ) as machine:
        await machine.until(b"/metrics")
        (line,) = [line for line in machine.errors.splitlines() if b"/metrics" in line]
        url = json.loads(line)["url"]

        def look() -> tuple[str, dict[str, object], str, str]:
            def hyperbell(*words: str) -> str:
                done = subprocess.run(
                    [sys.executable, "-m", "daemon.cli", *words, "--control", str(control)],
                    env=environment(), capture_output=True, text=True, timeout=LIMIT, check=True,
                )  # fmt: skip
                return done.stdout

            with urllib.request.urlopen(url, timeout=LIMIT) as page:
                metrics = page.read().decode()
            table = hyperbell("show")
            changed = hyperbell("hypercall", "entropy", "withhold")
            return metrics, json.loads(hyperbell("show", "--json")), table, changed

        metrics, stats, table, changed = await trio.to_thread.run_sync(look)
        assert 'hyperbell_doorbells_total{device="entropy",kind="hypercall",queue="0"} 0.0' in metrics
        assert "hyperbell_frontend_connected{" not in metrics
        devices = stats["devices"]
        assert isinstance(devices, list)
        assert [(device["transport"], device["connection"]) for device in devices] == [("kvm", None)] * 2
        assert "no driver" in table
        assert 'hyperbell_stray_doorbells_total{device="entropy"} 0.0' in metrics
        with Kvm.open() as kvm:
            reason = kvm.why_no_hypercall or ""
        can = "0.0" if reason else "1.0"  # the id is in KVM before any driver asks
        assert f'hyperbell_hypercall_doorbells{{device="entropy",queue="0"}} {can}' in metrics
        assert ('hyperbell_hypercall_refusals_total{reason="no_capability"} 1.0' in metrics) == bool(reason)
        assert reason in table
        (before,) = [line.split() for line in table.splitlines() if line.startswith("entropy") and "(own)" in line]
        assert before == ["entropy", "0", "(own)", "000200", "offer", "no" if reason else "registered"]
        assert stats["policies"] == {"terminal": "offer", "entropy": "withhold"}
        assert devices[1]["own"]["bells"] == [{"queue": 0, "bell": 0x200, "registered": False, "accepted": False}]
        assert changed == "entropy: withhold\n"
        machine.process.terminate()
        assert await machine.end() == 0
    assert not control.exists()


async def test_a_command_whose_image_hangs_obeys_the_keyboard(program: Callable[[str], Path]) -> None:
    """The kernel keeps the process itself until the file system answers, however it is ended."""
    async with failing_image(1 << 20) as image, trio.open_nursery() as nursery:
        await image.hang("open")
        words = command(program("sleep"), "--device", f"blk,path={image.path}")
        start = partial(trio.run_process, words, env=environment(), check=False, stderr=subprocess.PIPE)
        process = await nursery.start(start)
        try:
            await image.hung("open")
            process.send_signal(signal.SIGINT)
            with trio.fail_after(LIMIT):
                assert await receive_exactly(process.stderr, 23) == b"hyperbell: interrupted\n"
        finally:
            await image.hang()
            process.kill()
