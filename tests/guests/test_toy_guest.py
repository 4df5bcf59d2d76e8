"""The toy guest's driver against QEMU's own virtio-mmio devices (machine microvm, TCG): an independent device side."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from guest.boot import toy as toy_module
from guest.boot.console import results_of
from guest.boot.machine import QEMU
from guest.boot.pattern import SECTOR_SIZE, check_pattern, check_zeroes
from guest.boot.toy import Toy, prepare_toy
from guest.debian.cache import PrepareError

DISK_SIZE = 1024 * 1024
RUN_SECONDS = 120
REQUESTS = 16
BYTES_PER_REQUEST = 2 * SECTOR_SIZE
# QEMU fills its eight windows of virtio-mmio from the last one down; the interrupts are 5 and up (with acpi=off).
WINDOWS = 0xFEB00000
LAST_WINDOW = 7
FIRST_GSI = 5
FRAME_TYPE = bytes.fromhex("88b5")
FRAME_MAGIC = (0x42726548).to_bytes(4, "little")
DOUBLED = 1  # isa-debug-exit ends QEMU with 2 * status + 1


def device_words(*virtio_ids: int) -> list[str]:
    """``device=`` words for devices in the order of QEMU's command line."""
    windows = range(LAST_WINDOW, LAST_WINDOW - len(virtio_ids), -1)
    return [
        f"device={virtio_id}:{WINDOWS + window * 0x200:#x}:{FIRST_GSI + window}:0"
        for virtio_id, window in zip(virtio_ids, windows, strict=True)
    ]


class Wire:
    """The other end of the guest's network: a UDP socket that keeps every frame, and sends it back if told to."""

    def __init__(self, reflects: bool) -> None:
        self.reflects = reflects
        self.frames: list[bytes] = []
        self._socket = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    async def bind(self) -> int:
        await self._socket.bind(("127.0.0.1", 0))
        port: int = self._socket.getsockname()[1]
        return port

    async def serve(self) -> None:
        while True:
            frame, sender = await self._socket.recvfrom(2048)
            self.frames.append(frame)
            if self.reflects:
                await self._socket.sendto(frame, sender)

    def close(self) -> None:
        self._socket.close()


@dataclass
class Run:
    """How one run of the program ended."""

    status: int
    results: dict[str, str]
    errors: list[str]
    output: str

    def number(self, key: str) -> int:
        return int(self.results[key])

    def assert_good(self) -> None:
        assert self.errors == []
        assert self.status == 0, self.output
        assert self.results["errors"] == "0"


@pytest.fixture(scope="session")
def toy() -> Toy:
    return prepare_toy(print)


@pytest.fixture(params=[32, 64], ids=["32-bit", "64-bit"])
def program(toy: Toy, request: pytest.FixtureRequest) -> Path:
    bits: int = request.param
    return toy.program(bits)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, DISK_SIZE)
    return image


def overwrite(image: Path, offset: int, content: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(content)


async def run_qemu(program: Path, words: Sequence[str], devices: Sequence[str]) -> Run:
    """Run the program under QEMU's TCG to its end."""
    command = [
        *(QEMU, "-machine", "microvm,acpi=off", "-accel", "tcg", "-cpu", "max", "-m", "64"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-global", "virtio-mmio.force-legacy=false", *devices),
        *("-chardev", "stdio,id=out", "-device", "isa-debugcon,iobase=0xe9,chardev=out"),
        *("-device", "isa-debug-exit,iobase=0xf4", "-kernel", str(program), "-append", " ".join(words)),
    ]
    with trio.fail_after(RUN_SECONDS):
        done = await trio.run_process(command, capture_stdout=True, check=False, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    assert "RESULT errors=" in output, f"the program did not come to its end:\n{output}"
    lines = output.splitlines()
    errors = [line.removeprefix("RESULT error=") for line in lines if line.startswith("RESULT error=")]
    return Run(done.returncode >> DOUBLED, results_of(lines), errors, output)


def blk(image: Path, options: str = "num-queues=2,serial=TOY-1", drive: str = "") -> list[str]:
    return [
        *("-drive", f"if=none,id=disk,file={image},format=raw{drive}"),
        *("-device", f"virtio-blk-device,drive=disk,{options}"),
    ]


async def run_all_three(program: Path, disk: Path, wire: Wire, *words: str) -> Run:
    """The program with a disk, an rng and a network card, whose other end is ``wire``."""
    try:
        port = await wire.bind()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.serve)
            run = await run_qemu(
                program,
                [*device_words(2, 4, 1), f"requests={REQUESTS}", *words],
                [
                    *blk(disk),
                    *("-device", "virtio-rng-device", "-device", "virtio-net-device,netdev=wire"),
                    *(
                        "-netdev",
                        "dgram,id=wire,local.type=inet,local.host=127.0.0.1,local.port=0"
                        f",remote.type=inet,remote.host=127.0.0.1,remote.port={port}",
                    ),
                ],
            )
            nursery.cancel_scope.cancel()
    finally:
        wire.close()
    return run


@pytest.mark.parametrize("event_idx", [0, 1])
async def test_driver_works_with_the_devices_of_qemu(program: Path, disk: Path, event_idx: int) -> None:
    wire = Wire(reflects=True)
    run = await run_all_three(program, disk, wire, "net=reflect", "seed=5", f"event_idx={event_idx}")
    run.assert_good()
    assert run.results["bits"] == program.name[3:5]
    assert run.number("blk.bytes_written") == REQUESTS * BYTES_PER_REQUEST
    assert run.number("blk.bytes_checked") == (REQUESTS + 1) * BYTES_PER_REQUEST
    assert run.results["blk.id"] == "TOY-1"
    assert run.number("blk.queues") == 2
    assert all(run.number(f"blk.queue{index}.plain") for index in range(2))
    assert run.number("rng.bytes") == REQUESTS * 64
    assert (run.number("net.sent"), run.number("net.received")) == (REQUESTS, REQUESTS)
    assert run.number("net.bytes_checked") == sum(len(frame) for frame in wire.frames)
    for device in ("blk", "rng", "net"):
        assert run.number(f"{device}.interrupts") > 0
        assert (int(run.results[f"{device}.features"], 16) >> 29 & 1) == event_idx
    # The bytes that the host has are those that the guest means.
    assert check_pattern(disk, 0, REQUESTS * BYTES_PER_REQUEST, seed=5) == ""
    assert check_zeroes(disk, REQUESTS * BYTES_PER_REQUEST, DISK_SIZE - REQUESTS * BYTES_PER_REQUEST) == ""


async def test_frames_leave_the_guest_as_they_were_made_and_none_returns(program: Path, disk: Path) -> None:
    wire = Wire(reflects=False)
    run = await run_all_three(program, disk, wire, "net=drop")
    run.assert_good()
    assert (run.number("net.sent"), run.number("net.received")) == (REQUESTS, 0)
    assert len(wire.frames) == REQUESTS
    for number, frame in enumerate(wire.frames):
        assert frame[12:14] == FRAME_TYPE
        assert int.from_bytes(frame[14:16], "little") == len(frame)
        assert frame[16:20] == FRAME_MAGIC
        assert frame[20:24] == number.to_bytes(4, "little")
    assert {len(frame) for frame in wire.frames} >= {60, 1512}


async def test_a_frame_that_returns_changed_is_an_error(toy: Toy, disk: Path) -> None:
    class Spoiler(Wire):
        async def serve(self) -> None:
            while True:
                frame, sender = await self._socket.recvfrom(2048)
                await self._socket.sendto(frame[:-1] + bytes([frame[-1] ^ 1]), sender)

    run = await run_all_three(toy.bits64, disk, Spoiler(reflects=True), "net=reflect")
    assert run.status == 1
    assert any("net: frame 0 came back with another byte" in error for error in run.errors)


async def test_without_a_platform_leaf_no_hypercall_is_tried(toy: Toy, disk: Path) -> None:
    run = await run_qemu(toy.bits64, [*device_words(2), "doorbell=auto"], blk(disk))
    run.assert_good()
    assert run.results["platform"] == "no platform leaf"
    assert run.results["blk.queue0.plain_reason"] == "no platform leaf"
    assert (run.number("blk.hypercall"), run.number("blk.refused")) == (0, 0)
    assert run.number("blk.plain") > 0


async def test_32_bit_guest_does_not_even_look_for_a_platform_leaf(toy: Toy, disk: Path) -> None:
    run = await run_qemu(toy.bits32, [*device_words(2), "doorbell=auto"], blk(disk))
    run.assert_good()
    assert run.results["blk.queue0.plain_reason"] == "a 32-bit guest"
    assert (run.number("blk.hypercall"), run.number("blk.refused")) == (0, 0)


async def test_hypercall_that_was_demanded_and_cannot_be_is_an_error(program: Path, disk: Path) -> None:
    run = await run_qemu(program, [*device_words(2), "doorbell=hypercall"], blk(disk))
    assert run.status == 1
    assert any("is to ring by hypercall, but cannot" in error for error in run.errors)


async def test_read_only_disk_refuses_writes_and_keeps_its_bytes(program: Path, disk: Path) -> None:
    words = [*device_words(2), "seed=9", "requests=4"]
    (await run_qemu(program, words, blk(disk))).assert_good()
    before = await trio.Path(disk).read_bytes()
    run = await run_qemu(program, words, blk(disk, drive=",readonly=on"))
    run.assert_good()
    assert run.results["blk.read_only"] == "1"
    assert run.number("blk.bytes_written") == 0
    assert run.number("blk.bytes_checked") == 5 * BYTES_PER_REQUEST
    assert await trio.Path(disk).read_bytes() == before


async def test_a_byte_that_the_host_changed_is_found(toy: Toy, disk: Path) -> None:
    words = [*device_words(2), "requests=4"]
    (await run_qemu(toy.bits64, words, blk(disk))).assert_good()
    overwrite(disk, 3 * SECTOR_SIZE + 100, b"\xff\x00\xff\x00")
    run = await run_qemu(toy.bits64, words, blk(disk, drive=",readonly=on"))
    assert run.status == 1
    assert any("blk: byte 612 of sector 0x2 on is not what was written" in error for error in run.errors)


async def test_device_survives_nonsense_in_every_register(program: Path, disk: Path) -> None:
    run = await run_qemu(program, [*device_words(2, 4), "mode=nonsense"], [*blk(disk), "-device", "virtio-rng-device"])
    run.assert_good()
    assert run.number("nonsense.accesses") > 3000
    assert run.number("blk.bytes_checked") == (REQUESTS + 1) * BYTES_PER_REQUEST


async def test_device_survives_a_flood_of_doorbells(program: Path, disk: Path) -> None:
    run = await run_qemu(program, [*device_words(2), "mode=flood"], blk(disk))
    run.assert_good()
    assert run.number("flood.mmio") == 500
    assert run.number("blk.bytes_checked") == (REQUESTS + 1) * BYTES_PER_REQUEST


async def test_device_that_took_impossible_rings_works_after_a_reset(program: Path, disk: Path) -> None:
    # QEMU takes most of them as they come; what our own devices must say is asked of them, not of QEMU.
    run = await run_qemu(program, [*device_words(2), "mode=outside", "lenient=1"], blk(disk))
    run.assert_good()
    outcomes = [value for key, value in run.results.items() if key.startswith("outside.")]
    assert len(outcomes) == 12
    assert set(outcomes) <= {"accepted", "needs_reset", "not_ready"}
    assert run.number("blk.bytes_checked") == (REQUESTS + 1) * BYTES_PER_REQUEST


async def test_rings_that_a_device_should_have_refused_are_errors(toy: Toy, disk: Path) -> None:
    run = await run_qemu(toy.bits64, [*device_words(2), "mode=outside"], blk(disk))
    assert run.status == 1
    assert any("rings accepted with descriptors_misaligned" in error for error in run.errors)


async def test_devices_work_again_after_a_reset_with_requests_in_flight(program: Path, disk: Path) -> None:
    wire = Wire(reflects=True)
    run = await run_all_three(program, disk, wire, "mode=reset", "net=reflect")
    run.assert_good()
    assert run.results["resets"] == "3"
    assert run.number("blk.bytes_checked") == 4 * (REQUESTS + 1) * BYTES_PER_REQUEST
    assert run.number("net.received") == 4 * REQUESTS


async def test_loop_tells_its_progress_and_ends_when_the_host_says_so(program: Path, disk: Path) -> None:
    words = [*device_words(2, 4), "mode=loop", "every=50"]
    devices = [*blk(disk), "-device", "virtio-rng-device"]
    run = await run_qemu(program, [*words, "requests=120"], devices)
    run.assert_good()
    progress = [line for line in run.output.splitlines() if line.startswith("RESULT progress=")]
    assert progress == ["RESULT progress=50", "RESULT progress=100", "RESULT progress=120"]
    assert run.results["stopped"] == "0"
    assert run.number("blk.bytes_checked") == 120 * BYTES_PER_REQUEST
    overwrite(disk, DISK_SIZE - SECTOR_SIZE, b"STOP")
    run = await run_qemu(program, [*words, "requests=1000000000"], devices)
    run.assert_good()
    assert (run.results["progress"], run.results["stopped"]) == ("50", "1")


async def test_device_that_is_not_there_is_named(program: Path) -> None:
    run = await run_qemu(program, ["device=2:0xfeb00000:5:0"], [])
    assert run.status == 1
    assert any(error.startswith("blk: the device says it is id 0") for error in run.errors)


@pytest.mark.parametrize("word", ["device=2:0x10", "device=2:0:0:0x", "mode=dance", "requests=many", "every=0", ""])
async def test_bad_command_line_is_an_error(toy: Toy, word: str) -> None:
    run = await run_qemu(toy.bits64, [word], [])
    assert run.status == 1
    assert any(error.startswith("command line: ") for error in run.errors)


async def test_lost_interrupt_is_an_error_and_not_a_hang(toy: Toy) -> None:
    words = [f"device=2:{WINDOWS + LAST_WINDOW * 0x200:#x}:{FIRST_GSI}:0", "patience=1"]
    # A disk of 0.1 s a request: what one on a tmpfs answers at once the program finds without any interrupt.
    slow = ["-blockdev", f"driver=null-co,node-name=disk,size={DISK_SIZE},latency-ns=100000000,read-zeroes=on"]
    run = await run_qemu(toy.bits64, words, [*slow, "-device", "virtio-blk-device,drive=disk"])
    assert run.status == 1
    assert any("the used ring moved, but no interrupt came" in error for error in run.errors)


def test_programs_are_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERBELL_CACHE", str(tmp_path))
    said: list[str] = []
    first = prepare_toy(said.append)
    assert said == ["compiling the toy guest for 32 bit", "compiling the toy guest for 64 bit"]
    assert [program.read_bytes()[:5] for program in (first.bits32, first.bits64)] == [b"\x7fELF\x01", b"\x7fELF\x02"]
    assert prepare_toy(said.append) == first
    assert len(said) == 2


def test_a_machine_without_gcc_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERBELL_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="install the Debian package 'gcc'"):
        prepare_toy(print)


def test_a_source_that_does_not_compile_is_shown_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERBELL_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "toy"
    shutil.copytree(toy_module.SOURCES, sources)
    (sources / "main.c").write_text("int main(void) { return broken; }")
    monkeypatch.setattr(toy_module, "SOURCES", sources)
    with pytest.raises(PrepareError, match=r"does not compile for 32 bit:\n[^$]*'broken' undeclared"):
        prepare_toy(print)
