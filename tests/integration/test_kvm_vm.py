"""A real VM: its registers and ports, its processors, and what it is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
from kit.kvm.guest import DEVICE_GPA, DEVICE_SIZE, PAGE_TABLES_GPA, count_of, eventfd, machine

from transports.kvm.cpu.cpuid import CpuidEntry, PlatformKey
from transports.kvm.host import Kvm
from transports.kvm.vm.entry import LongModeEntry
from transports.kvm.vm.ram import GuestRam
from transports.kvm.vm.vmm import Access, Vm, VmSetup
from virtio.errors import HostError
from virtio.fd import OwnedFd

EXIT = "mov $0, %al; out %al, $0xf4"


# ---- registers and ports ----


async def test_register_accesses_go_to_python_and_come_back_with_its_answer() -> None:
    async def answer(access: Access) -> int:
        await m.on_access(access)
        return 0xA1B2C3D4E5F60718

    with machine() as m:
        window = m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        end = await m.run(
            f"""
            mov $0xffffffff, %eax
            mov {DEVICE_GPA + 0x100}, %al
            out %eax, $0xe9
            mov {DEVICE_GPA + 0x102}, %ax
            out %ax, $0xe9
            mov {DEVICE_GPA}, %eax
            out %eax, $0xe9
            movl $0x11223344, {DEVICE_GPA + 0x70}
            movb $0x55, {DEVICE_GPA + 0x1FF}
            {EXIT}
            """,
            on_access=answer,
        )
        assert (end.kind, end.status) == ("exit", 0)
        assert bytes(m.output) == b"\x18\xff\xff\xff" + b"\x18\x07" + b"\x18\x07\xf6\xe5"
        assert m.accesses == [
            (0x100, 1, False, 0),
            (0x102, 2, False, 0),
            (0, 4, False, 0),
            (0x70, 4, True, 0x11223344),
            (0x1FF, 1, True, 0x55),
        ]
        assert window.index == 0
        assert m.vm.stats().handed_over == 5


async def test_eight_bytes_cross_whole_in_64_bit_mode() -> None:
    async def answer(access: Access) -> int:
        await m.on_access(access)
        return 0x1122334455667788

    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        await m.run(
            f"""
            mov ${DEVICE_GPA}, %esi
            mov 0x80(%rsi), %rax
            mov %rax, 0x88(%rsi)
            {EXIT}
            """,
            bits=64,
            on_access=answer,
        )
        assert m.accesses == [(0x80, 8, False, 0), (0x88, 8, True, 0x1122334455667788)]


async def test_each_window_gets_its_own_accesses() -> None:
    seen: list[tuple[int, int]] = []

    async def answer(access: Access) -> int:
        seen.append((access.window.index, access.offset))
        return 0

    with machine() as m:
        for place in range(3):
            m.vm.add_window(DEVICE_GPA + place * 0x1000, DEVICE_SIZE)
        await m.run(
            f"""
            mov {DEVICE_GPA + 0x2004}, %eax
            mov {DEVICE_GPA + 0x0008}, %eax
            mov {DEVICE_GPA + 0x11FC}, %eax
            {EXIT}
            """,
            on_access=answer,
        )
        assert seen == [(2, 4), (0, 8), (1, 0x1FC)]
        assert m.vm.stats().unknown_mmio == 0


async def test_what_nobody_owns_reads_as_all_ones_and_swallows_writes() -> None:
    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        end = await m.run(
            f"""
            xor %eax, %eax
            mov {DEVICE_GPA + DEVICE_SIZE}, %eax
            out %eax, $0xe9
            mov {DEVICE_GPA + DEVICE_SIZE - 2}, %ecx    # begins inside, ends outside
            movl $1, {DEVICE_GPA + 0x1000}
            movb $1, {DEVICE_GPA - 1}
            xor %eax, %eax
            in $0x77, %ax
            out %ax, $0xe9
            out %eax, $0x77
            {EXIT}
            """
        )
        assert end.kind == "exit"
        assert bytes(m.output) == b"\xff" * 6
        assert m.accesses == []
        stats = m.vm.stats()
        assert (stats.unknown_mmio, stats.unknown_pio, stats.handed_over) == (4, 2, 0)


async def test_the_serial_port_prints_but_not_its_divisor() -> None:
    with machine() as m:
        await m.run(
            f"""
            mov $0x3fb, %dx; mov $0x83, %al; out %al, %dx   # the divisor latch
            mov $0x3f8, %dx; mov $1, %al; out %al, %dx
            mov $0x3fb, %dx; mov $0x03, %al; out %al, %dx
            mov $0x3fd, %dx; in %dx, %al; mov %al, %bl      # may we send?
            mov $0x3f8, %dx; mov $'k', %al; out %al, %dx
            mov %bl, %al; out %al, $0xe9
            {EXIT}
            """
        )
        assert bytes(m.output) == b"k\x60"
        assert m.vm.stats().unknown_pio == 0


async def test_a_string_of_bytes_is_printed_in_order() -> None:
    with machine() as m:
        m.ram.write(0x3000, bytes(range(256)) * 4)
        await m.run(f"cld; mov $0x3000, %esi; mov $1024, %ecx; mov $0xe9, %dx; rep outsb; {EXIT}")
        assert bytes(m.output) == bytes(range(256)) * 4


async def test_a_guest_that_prints_faster_than_anybody_reads_keeps_nobody_else_waiting() -> None:
    """Each chunk is followed by as much again before it is taken; a task beside it still has its turn, and stops it."""
    chunks, stopped = 0, False

    def slow(_chunk: bytes) -> None:
        nonlocal chunks
        chunks += 1
        assert chunks < 50, "the task beside it never had a turn"
        dropped = m.vm.stats().output_dropped
        while m.vm.stats().output_dropped == dropped and not stopped:  # until there is a whole chunk again
            pass

    async def stop() -> None:
        nonlocal stopped
        while chunks < 3:
            await trio.lowlevel.checkpoint()
        stopped = True
        m.vm.stop()

    with machine() as m:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            end = await m.run(
                "cld; mov $0xe9, %dx; 1: mov $0x3000, %esi; mov $0x400, %ecx; rep outsl; jmp 1b", on_output=slow
            )
        assert end.kind == "stopped"


async def test_output_that_nobody_reads_is_dropped_and_counted() -> None:
    """The guest never waits for a reader: it prints on and on while Python sits in on_output."""

    def stuck(_chunk: bytes) -> None:
        while m.vm.stats().output_dropped < 1000:
            pass
        m.ram.write(0x5000, b"\1")  # now it may end

    with machine() as m:
        m.ram.write(0x3000, b"x" * 0x1000)
        end = await m.run(
            f"""
            cld
            mov $0xe9, %dx
            1: mov $0x3000, %esi
            mov $0x400, %ecx
            rep outsl
            cmpb $0, 0x5000
            je 1b
            {EXIT}
            """,
            on_output=stuck,
        )
        assert end.kind == "exit"
        dropped = m.vm.stats().output_dropped
        assert dropped >= 1000
        assert (len(m.output) + dropped) % 0x1000 == 0, "each byte was printed or counted"


# ---- processors ----

WAKE_THE_OTHERS = """
    movl $0x1ff, 0xfee000f0          # the local APIC: on
    movl $0x000c4500, 0xfee00300     # INIT to all but self
    movl $0x000c4608, 0xfee00300     # start-up at 0x8000
"""
# 16-bit real mode at 0x8000, as the processors wake: leaf 0xb says who it is.
TELL_WHO_IT_IS = bytes.fromhex(
    "66b80b000000"  # mov $0xb, %eax
    "6631c9"  # xor %ecx, %ecx
    "0fa2"  # cpuid
    "88d0"  # mov %dl, %al
    "e6e9"  # out %al, $0xe9
    "f4ebfd"  # hlt, for ever
)


async def test_every_processor_wakes_and_knows_its_number() -> None:
    with machine(vcpus=4) as m:
        m.ram.write(0x8000, TELL_WHO_IT_IS)

        def enough(_chunk: bytes) -> None:
            if len(m.output) == 3:
                m.vm.stop()

        end = await m.run(f"{WAKE_THE_OTHERS} 1: hlt; jmp 1b", on_output=enough)
        assert end.kind == "stopped"
        assert sorted(m.output) == [1, 2, 3]


async def test_a_device_answers_one_access_at_a_time() -> None:
    """Two processors at the same device; at another device a third is not kept waiting by them."""
    inside: list[int] = []
    overlaps: list[int] = []
    both = trio.Event()
    seen: set[int] = set()

    async def answer(access: Access) -> int:
        if access.window.index == 0:
            if inside:
                overlaps.append(access.vcpu)
            inside.append(access.vcpu)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            inside.remove(access.vcpu)
            seen.add(access.vcpu)
            if len(seen) == 2:
                both.set()
                m.vm.stop()
        return 0

    with machine(vcpus=2) as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        # Big real mode, as INIT leaves the segments, reaches 64 KiB only: so the second processor loads a GDT.
        m.place(
            f"""
            {WAKE_THE_OTHERS}
            1: mov {DEVICE_GPA}, %eax
            jmp 1b
            .org 0x100
            .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
            .org 0x130
            .word 23
            .long 0x1100
            .org 0x140
            2: mov $0x10, %ax
            mov %ax, %ds
            3: mov {DEVICE_GPA + 4}, %eax
            jmp 3b
            """
        )
        m.ram.write(
            0x8000,
            bytes.fromhex(
                "fa"  # cli
                "31c0"  # xor %ax, %ax
                "8ed8"  # mov %ax, %ds
                "660f01163011"  # lgdtl 0x1130
                "0f20c0"  # mov %cr0, %eax
                "6683c801"  # or $1, %eax
                "0f22c0"  # mov %eax, %cr0
                "66ea401100000800"  # ljmpl $8, $0x1140
            ),
        )
        end = await m.run(on_access=answer)
        assert end.kind == "stopped"
        assert both.is_set()
        assert overlaps == []
        assert seen == {0, 1}


async def test_the_guest_finds_the_platform_key_in_its_cpuid() -> None:
    with machine(platform=PlatformKey(0xABCDEF)) as m:
        await m.run(
            f"""
            .macro show leaf
            mov $\\leaf, %eax; cpuid
            out %eax, $0xe9; mov %ebx, %eax; out %eax, $0xe9
            mov %ecx, %eax; out %eax, $0xe9; mov %edx, %eax; out %eax, $0xe9
            .endm
            show 0x40000000
            show 0x40000200
            show 0x40000201
            {EXIT}
            """
        )
        words = [m.output[at : at + 16] for at in range(0, 48, 16)]
        assert words[0][4:] == b"Microsoft Hv"
        assert words[1] == (0x4000_0201).to_bytes(4, "little") + b"HyperBellVMM"
        assert words[2] == b"".join(word.to_bytes(4, "little") for word in (1, 0xABCDEF, 1, 0))


# ---- making one ----


def test_more_vcpus_than_kvm_has_are_refused_by_number() -> None:
    with (
        pytest.raises(HostError, match="1000 vCPUs: a VM here can have between 1 and "),
        machine(vcpus=1000),
    ):
        pass


def test_more_cpuid_than_kvm_has_room_for_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = tuple(CpuidEntry(leaf) for leaf in range(0x100, 0x100 + 5000))
    monkeypatch.setattr(Kvm, "supported_cpuid", lambda _kvm: plenty)
    with pytest.raises(HostError, match="no room for the 5000 CPUID entries") as caught, machine():
        pass
    assert caught.value.errno == errno.E2BIG


def test_windows_do_not_overlap_memory_or_each_other() -> None:
    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE, notify_port=0x1000)
        for gpa, port in [(DEVICE_GPA + 0x1FF, None), (0x1000, None), (DEVICE_GPA + 0x1000, 0x1000)]:
            with pytest.raises(HostError, match="taken already"):
                m.vm.add_window(gpa, DEVICE_SIZE, notify_port=port)
        for place in range(1, 32):
            m.vm.add_window(DEVICE_GPA + place * 0x1000, DEVICE_SIZE)
        with pytest.raises(HostError, match="room for 32 devices"):
            m.vm.add_window(DEVICE_GPA + 32 * 0x1000, DEVICE_SIZE)


def test_guest_memory_cannot_be_shrunk_and_keeps_to_its_bounds() -> None:
    with GuestRam(0x2000) as ram:
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd.fileno(), 0x1000)
        ram.write(0x1FFE, b"ab")
        assert ram.read(0x1FFC, 4) == b"\0\0ab"
        for gpa, length in [(0x1FFF, 2), (-1, 1), (0x3000, 0)]:
            with pytest.raises(ValueError):
                ram.read(gpa, length)
        with pytest.raises(ValueError):
            ram.write(0x1FFF, b"ab")
    for size in (0, 100, 0xC000_1000):
        with pytest.raises(ValueError):
            GuestRam(size)


async def test_a_long_mode_entry_passes_its_arguments() -> None:
    with machine() as m:
        m.place("add %rsi, %rdi; add %rdx, %rdi; add %rcx, %rdi; mov %edi, %eax; push %rax; out %al, $0xf4", bits=64)
        entry = LongModeEntry(0x1000, PAGE_TABLES_GPA, rdi=1, rsi=2, rdx=4, rcx=8, rsp=0x9000)
        end = await m.vm.run(entry, m.on_access, lambda _chunk: None)
        assert end.status == 15
        assert m.ram.read(0x8FF8, 1) == b"\x0f"


def test_a_machine_takes_its_descriptors_with_it() -> None:
    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with machine(vcpus=2) as m, eventfd() as fd:
        window = m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        window.set_kick(0, fd)
        m.vm.ioeventfd_pio(0x1000, 2, 0, fd)
        m.vm.irqfd(5, fd)
        assert count_of(fd) == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_vm_in_no_memory_at_all_is_refused_by_the_step_that_failed() -> None:
    with GuestRam(0x1000) as ram, OwnedFd(os.open("/dev/null", os.O_RDWR)) as null:
        real, ram.fd = ram.fd, null
        with pytest.raises(HostError, match="mapping guest memory"):
            Vm(VmSetup(ram))
        ram.fd = real
