"""A VM whose guest does nothing but ring doorbells and note how long each took (``native/ring_guest.c``)."""

from __future__ import annotations

import array
import enum
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import trio

from transports.kvm.native import check, ffi, lib
from transports.kvm.vm.entry import LongModeEntry, write_identity_map
from transports.kvm.vm.ram import GuestRam
from transports.kvm.vm.vmm import Access, Vm
from virtio.errors import HostError
from virtio.fd import OwnedFd

RINGS_MAX: Final = 2000
"""Rings of one step: what there is room for in the guest's memory."""

_PAGE_TABLES: Final = 0x1000  # six pages
_CODE: Final = 0x10000
_STEPS: Final = 0x20000
_ACKNOWLEDGEMENT: Final = 0x30000  # a page: what the waiter saw, what the guest rang
_SAMPLES: Final = 0x100000
_SAMPLE_BYTES: Final = 8
_STEPS_MAX: Final = 64
RAM_SIZE: Final = _SAMPLES + 0x100000

_PAUSE_CYCLES: Final = 60_000  # about 20 us: long enough to fall asleep
_PATIENCE_CYCLES: Final = 2_000_000_000  # about a second; then nobody will acknowledge
_CATCH_UP_SECONDS: Final = 5.0
_RUN_SECONDS: Final = 60.0

GUEST_OS_ID_MSR: Final = 0x4000_0000
GUEST_OS_ID: Final = 0x8100_0000_0000_0001  # "open source", and anything but 0


class Ring(enum.IntEnum):
    """What a step does again and again; the first and the last two ring nothing."""

    NOTHING = lib.RING_NOTHING
    CPUID = lib.RING_CPUID
    OUT = lib.RING_OUT
    STORE = lib.RING_STORE
    VMCALL = lib.RING_VMCALL
    VMMCALL = lib.RING_VMMCALL
    WRMSR = lib.RING_WRMSR
    LOOP = lib.RING_LOOP


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do ``count`` times. ``to_thread``: wait each time until the thread has acknowledged."""

    kind: Ring
    address: int = 0
    value: int = 0
    count: int = 1
    to_thread: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the guest noted. ``samples``: cycles of each ring, the two time stamps included."""

    samples: Sequence[int]
    refused: int
    status: int
    unanswered: int
    begin: int
    end: int

    @property
    def cycles_each(self) -> float:
        """What one ring took in all, on average, the guest's own work around it included."""
        return (self.end - self.begin) / max(1, len(self.samples) + self.refused)


GREETING: Final = Step(Ring.WRMSR, GUEST_OS_ID_MSR, GUEST_OS_ID)
"""Without it KVM takes no Hyper-V hypercall. Only where the guest has the Hyper-V leaves."""


def make_ram() -> GuestRam:
    """Memory with the guest in it."""
    ram = GuestRam(RAM_SIZE)
    write_identity_map(ram, _PAGE_TABLES)
    ram.write(_CODE, bytes(ffi.buffer(lib.ring_guest_code(), lib.ring_guest_size())))
    return ram


@contextmanager
def running_on(cpu: int | None) -> Iterator[None]:
    """The calling thread, and the threads it starts meanwhile, on ``cpu``."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def acknowledging(ram: GuestRam, fd: OwnedFd) -> Iterator[None]:
    """A thread waits for ``fd`` and acknowledges in the guest's memory, on the CPUs of the caller."""
    error = ffi.new("int *")
    pointer = lib.acknowledger_new(fd.fileno(), ram.fd.fileno(), _ACKNOWLEDGEMENT, error)
    if pointer == ffi.NULL:
        check(error[0], "the thread that waits for doorbells")
    try:
        yield
    finally:
        lib.acknowledger_free(pointer)


async def run_steps(vm: Vm, steps: Sequence[Step]) -> list[StepResult]:
    """Let the guest do ``steps`` in their order. ``HostError`` when it does not come to its end."""
    assert len(steps) <= _STEPS_MAX
    ram = vm.setup.ram
    placed, at = [], _SAMPLES
    for step in steps:
        assert step.count <= RINGS_MAX
        placed.append(_raw(step, at))
        at += step.count * _SAMPLE_BYTES
    assert at <= RAM_SIZE
    ram.write(_STEPS, b"".join(bytes(ffi.buffer(raw)) for raw in placed))
    entry = LongModeEntry(rip=_CODE, page_tables_gpa=_PAGE_TABLES, rdi=_STEPS, rsi=len(steps))
    with trio.move_on_after(_RUN_SECONDS):
        end = await vm.run(entry, _no_device, _no_output)
        if end.kind != "exit":
            raise HostError(f"the measuring guest came to a bad end: {end.kind} {end.reason}".rstrip())
        return [_result(ram, index, step) for index, step in enumerate(steps)]
    raise HostError(f"the measuring guest did not come to its end in {_RUN_SECONDS:.0f} s")


def _raw(step: Step, samples_gpa: int) -> object:
    return ffi.new(
        "struct ring_step *",
        {
            "kind": step.kind,
            "count": step.count,
            "address": step.address,
            "value": step.value,
            "samples_gpa": samples_gpa,
            "ack_gpa": _ACKNOWLEDGEMENT if step.to_thread else 0,
            "pause": _PAUSE_CYCLES,
            "patience": _PATIENCE_CYCLES,
        },
    )


def _result(ram: GuestRam, index: int, step: Step) -> StepResult:
    raw = ffi.new("struct ring_step *")
    size = len(ffi.buffer(raw))
    ffi.buffer(raw)[:] = ram.read(_STEPS + index * size, size)
    samples = array.array("Q")
    samples.frombytes(ram.read(raw.samples_gpa, raw.done * _SAMPLE_BYTES))
    return StepResult(samples, raw.refused, raw.status, raw.unanswered, raw.begin, raw.end)


async def settle(ram: GuestRam) -> bool:
    """After a ring nobody acknowledged in time: whether it was only late. The guest's count is right afterwards."""
    with trio.move_on_after(_CATCH_UP_SECONDS):
        while True:
            seen, rung = _counts(ram)
            if seen >= rung:
                return True
            await trio.sleep(0.01)
    ram.write(_ACKNOWLEDGEMENT + 8, ram.read(_ACKNOWLEDGEMENT, 8))
    return False


def _counts(ram: GuestRam) -> tuple[int, int]:
    words = array.array("Q")
    words.frombytes(ram.read(_ACKNOWLEDGEMENT, 16))
    return words[0], words[1]


async def _no_device(access: Access) -> int:
    raise AssertionError(f"the measuring guest has no device at {access.offset:#x}")


def _no_output(chunk: bytes) -> None:
    """It prints nothing."""


def times(step: Step, count: int) -> Step:
    return replace(step, count=count)
