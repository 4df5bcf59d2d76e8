"""A real VM's doorbells: what the guest rings, what interrupts it, and what of it a vCPU's thread does by itself."""

from __future__ import annotations

import errno
import os

import pytest
from kit.kvm.guest import DEVICE_GPA, DEVICE_SIZE, Machine, count_of, eventfd, machine, need_kvm

from transports.kvm.cpu.cpuid import AMD_SIGNATURES, PlatformKey, signature_of
from transports.kvm.native import check, lib
from virtio.errors import HostError
from virtio.native.interrupt import InterruptStatus

EXIT = "mov $0, %al; out %al, $0xf4"
QUEUE_NOTIFY = DEVICE_GPA + 0x50
PORT = 0x1000


def notify(*values: int) -> str:
    return "; ".join(f"movl ${value}, {QUEUE_NOTIFY}" for value in values)


def notify_port(*values: int) -> str:
    return f"mov ${PORT}, %dx; " + "; ".join(f"mov ${value}, %ax; out %ax, %dx" for value in values)


# ---- ioeventfds ----


async def test_a_memory_doorbell_with_a_value_rings_for_that_value_alone() -> None:
    with machine() as m, eventfd() as first, eventfd() as second:
        m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 0, first)
        m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 1, second)
        await m.run(f"{notify(1, 0, 1, 7, 1)}; movw $1, {QUEUE_NOTIFY}; {EXIT}")
        assert (count_of(first), count_of(second)) == (1, 3)
        assert m.vm.stats().unknown_mmio == 2, "value 7, and the write of another length"


async def test_a_wildcard_rings_for_every_value_and_length() -> None:
    with machine() as m, eventfd() as fd:
        m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 0, None, fd)
        await m.run(f"{notify(0, 9)}; movw $1, {QUEUE_NOTIFY}; movb $1, {QUEUE_NOTIFY}; {EXIT}")
        assert count_of(fd) == 4
        assert m.vm.stats().unknown_mmio == 0


async def test_a_port_doorbell_rings_for_its_value_alone() -> None:
    with machine() as m, eventfd() as first, eventfd() as second:
        m.vm.ioeventfd_pio(PORT, 2, 0, first)
        m.vm.ioeventfd_pio(PORT, 2, 1, second)
        await m.run(f"{notify_port(0, 1, 1, 2)}; out %al, %dx; {EXIT}")
        assert (count_of(first), count_of(second)) == (1, 2)
        assert m.vm.stats().unknown_pio == 2, "value 2, and the write of another length"


async def test_a_removed_doorbell_rings_no_more_and_the_others_go_on() -> None:
    with machine() as m, eventfd() as memory, eventfd() as port:
        in_memory = m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 1, memory)
        at_port = m.vm.ioeventfd_pio(PORT, 2, 1, port)
        code = f"{notify(1)}; {notify_port(1)}; {EXIT}"
        await m.run(code)
        assert (count_of(memory), count_of(port)) == (1, 1)
        in_memory.remove()
        in_memory.remove()
        await m.run(code)
        assert (count_of(memory), count_of(port)) == (0, 1)
        m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 1, memory)
        at_port.remove()
        await m.run(code)
        assert (count_of(memory), count_of(port)) == (1, 0)


async def test_a_doorbell_can_be_removed_while_the_guest_runs_and_after_its_fd_was_closed() -> None:
    with machine() as m, eventfd() as kept:
        closed = kept.duplicate()
        bell = m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 1, closed)
        closed.close()

        def printed(_chunk: bytes) -> None:
            bell.remove()
            m.ram.write(0x5000, b"\1")

        await m.run(
            f"""
            {notify(1)}
            mov $'R', %al; out %al, $0xe9
            1: cmpb $0, 0x5000
            je 1b
            {notify(1)}
            {EXIT}
            """,
            on_output=printed,
        )
        assert count_of(kept) == 1
        assert m.vm.stats().unknown_mmio == 1


async def test_a_doorbell_that_kvm_does_not_give_back_can_be_asked_for_again() -> None:
    with machine() as m, eventfd() as fd:
        bell = m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 1, fd)
        as_bell = (m.vm._pointer, QUEUE_NOTIFY, 4, 1, lib.VM_BELL_DATAMATCH)
        check(lib.vm_ioeventfd(*as_bell[:-1], as_bell[-1] | lib.VM_BELL_REMOVE, fd.fileno()), "behind its back")
        for _ in range(2):
            with pytest.raises(HostError, match="taking away the doorbell at address 0xd0000050 for value 0x1"):
                bell.remove()
        check(lib.vm_ioeventfd(*as_bell, fd.fileno()), "and back")
        bell.remove()
        await m.run(f"{notify(1)}; {EXIT}")
        assert count_of(fd) == 0


def test_a_doorbell_that_is_taken_is_refused_by_name() -> None:
    with machine() as m, eventfd() as fd:
        m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 3, fd)
        with pytest.raises(HostError, match="doorbell at address 0xd0000050 for value 0x3 is already taken") as caught:
            m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 3, fd)
        assert caught.value.errno == errno.EEXIST
        m.vm.ioeventfd_pio(PORT, 2, None, fd)
        with pytest.raises(HostError, match="doorbell at port 0x1000 is already taken"):
            m.vm.ioeventfd_pio(PORT, 2, None, fd)


def test_a_doorbell_wants_an_eventfd() -> None:
    with machine() as m, m.ram.fd.duplicate() as memory:
        with pytest.raises(HostError, match="registering"):
            m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 4, 3, memory)
        with pytest.raises(HostError, match="registering"):
            m.vm.irqfd(5, memory)


# ---- notifications that no ioeventfd takes ----


async def test_a_notification_that_leaves_the_guest_rings_the_queue_or_is_a_stray() -> None:
    with machine() as m, eventfd() as kick:
        window = m.vm.add_window(DEVICE_GPA, DEVICE_SIZE, notify_port=PORT)
        window.set_kick(1, kick)
        await m.run(f"{notify(1, 0, 0x101, 0xFFFFFFFF)}; {notify_port(1, 2)}; {EXIT}")
        assert count_of(kick) == 2
        assert window.stray_notifies == m.vm.stats().stray_notifies == 4
        window.set_kick(1, None)
        await m.run(f"{notify(1)}; {EXIT}")
        assert count_of(kick) == 0
        assert window.stray_notifies == 5
        assert m.accesses == []


async def test_a_flood_of_strays_never_reaches_python() -> None:
    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        await m.run(f"mov $500, %ecx; 1: mov %ecx, {QUEUE_NOTIFY}; loop 1b; {EXIT}")
        assert m.vm.stats().stray_notifies == 500
        assert m.accesses == []


def test_a_kick_for_a_queue_that_cannot_be_is_refused() -> None:
    with machine() as m, eventfd() as kick:
        window = m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        with pytest.raises(HostError, match="kick fd of queue 256 of the device at 0xd0000000"):
            window.set_kick(256, kick)


# ---- interrupts ----

GSI = 5
VECTOR = 0x30
STATUS, ACK = DEVICE_GPA + 0x60, DEVICE_GPA + 0x64


def interrupted(handler: str) -> str:
    """A guest that takes interrupt GSI, says "R" when it waits for it, and then runs ``handler``."""
    return f"""
        lgdt 9f
        ljmp $8, $1f
        1: mov $0x10, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $handler, %eax            # the gate: offset, selector 8, 32-bit interrupt gate
        mov %ax, {0x4000 + VECTOR * 8}
        movw $8, {0x4000 + VECTOR * 8 + 2}
        movw $0x8e00, {0x4000 + VECTOR * 8 + 4}
        shr $16, %eax
        mov %ax, {0x4000 + VECTOR * 8 + 6}
        lidt 8f
        mov $0xff, %al                # KVM raises it at the old controller too: that one is masked
        out %al, $0x21
        out %al, $0xa1
        movl $0x1ff, 0xfee000f0       # the local APIC: on
        movl ${0x11 + 2 * GSI}, 0xfec00000
        movl $0, 0xfec00010           # to processor 0
        movl ${0x10 + 2 * GSI}, 0xfec00000
        movl ${VECTOR}, 0xfec00010    # as an edge, not masked
        mov $'R', %al
        out %al, $0xe9
        idle:
        mov $0x9000, %esp             # no iret: the emulator of some KVMs has none outside real mode
        sti
        1: hlt
        jmp 1b
        handler:
        {handler}
        movl $0, 0xfee000b0           # the end of the interrupt
        jmp idle
        .balign 8
        7: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
        9: .word 23
        .long 7b
        8: .word {VECTOR * 8 + 7}
        .long 0x4000
    """


async def test_an_irqfd_interrupts_the_guest() -> None:
    with machine() as m, eventfd() as fd:
        m.vm.irqfd(GSI, fd)

        def printed(chunk: bytes) -> None:
            if chunk in (b"R", b"I"):
                os.eventfd_write(fd.fileno(), 1)

        code = interrupted(f"mov $'I', %al; out %al, $0xe9; incl 0x5000; cmpl $3, 0x5000; jb 2f; {EXIT}; 2:")
        end = await m.run(code, on_output=printed)
        assert (end.kind, bytes(m.output)) == ("exit", b"RIII")


async def test_a_removed_irqfd_interrupts_no_more() -> None:
    with machine() as m, eventfd() as removed, eventfd() as other:
        registration = m.vm.irqfd(GSI, removed)
        m.vm.irqfd(GSI, other)
        registration.remove()

        def printed(chunk: bytes) -> None:
            if chunk == b"R":
                os.eventfd_write(removed.fileno(), 1)
                os.eventfd_write(other.fileno(), 1)

        end = await m.run(interrupted(f"mov $'I', %al; out %al, $0xe9; {EXIT}"), on_output=printed)
        assert (end.kind, bytes(m.output)) == ("exit", b"RI")
        assert (count_of(removed), count_of(other)) == (1, 0), "KVM takes what is its own"


async def test_interrupt_status_and_ack_are_served_in_the_vcpus_thread() -> None:
    status = InterruptStatus()
    with machine() as m, eventfd() as fd:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE, interrupt_status=status)
        m.vm.irqfd(GSI, fd)

        def printed(chunk: bytes) -> None:
            if chunk == b"R":
                status.raise_config()
                os.eventfd_write(fd.fileno(), 1)

        handler = f"""
            mov {STATUS}, %eax; out %al, $0xe9
            movl $1, {ACK}; mov {STATUS}, %eax; out %al, $0xe9      # of another bit: nothing
            movl $0xffffffff, {ACK}; mov {STATUS}, %eax; out %al, $0xe9
            {EXIT}
        """
        end = await m.run(interrupted(handler), on_output=printed)
        assert end.kind == "exit"
        assert bytes(m.output) == b"R\2\2\0"
        assert status.value == 0
        assert m.accesses == []
        assert (m.vm.stats().served, m.vm.stats().handed_over) == (5, 0)


async def test_what_is_no_plain_access_to_these_registers_goes_to_python() -> None:
    status = InterruptStatus()
    status.raise_config()
    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE, interrupt_status=status)
        m.vm.add_window(DEVICE_GPA + 0x1000, DEVICE_SIZE)
        await m.run(
            f"""
            movl $3, {STATUS}
            mov {ACK}, %eax
            movb $3, {ACK}
            mov {QUEUE_NOTIFY}, %eax
            mov {STATUS + 0x1000}, %eax
            {EXIT}
            """
        )
        assert [(offset, length, is_write) for offset, length, is_write, _ in m.accesses] == [
            (0x60, 4, True),
            (0x64, 4, False),
            (0x64, 1, True),
            (0x50, 4, False),
            (0x60, 4, False),
        ]
        assert status.value == 2


# ---- the hypercall ----


def test_a_kernel_without_the_hypercall_doorbell_says_so_and_the_others_work() -> None:
    with machine(platform=PlatformKey(0x123456)) as m, eventfd() as fd:
        if m.vm.why_no_hypercall is None:
            pytest.skip("this kernel has KVM_CAP_HYPERV_EVENTFD")
        with pytest.raises(HostError, match="KVM_CAP_HYPERV_EVENTFD") as caught:
            m.vm.hypercall_id(0x100, fd)
        assert str(caught.value) == m.vm.why_no_hypercall
        m.vm.ioeventfd_mmio(QUEUE_NOTIFY, 0, None, fd)


@pytest.fixture(scope="module")
def call() -> str:
    """The instruction of a hypercall on this processor."""
    with need_kvm() as kvm:
        if kvm.why_no_hypercall is not None:
            pytest.skip(f"no hypercall doorbell: {kvm.why_no_hypercall}")
        (vendor,) = (signature_of(entry, "bdc") for entry in kvm.supported_cpuid() if entry.leaf == 0)
    return "vmmcall" if vendor in AMD_SIGNATURES else "vmcall"


def rings(call: str, *ids: int) -> str:
    """Names itself to Hyper-V, rings each id and prints the low byte of each status."""
    calls = "".join(
        f"""
        mov $0x7fffffff, %eax
        mov $0x1005d, %ecx
        mov ${number}, %edx
        xor %r8, %r8
        {call}
        out %al, $0xe9
        """
        for number in ids
    )
    return f"""
        mov $0x40000000, %ecx        # HV_X64_MSR_GUEST_OS_ID
        mov $0x81000000, %edx
        mov $1, %eax
        wrmsr
        {calls}
        {EXIT}
    """


async def ring(m: Machine, call: str, *ids: int) -> bytes:
    m.output.clear()
    end = await m.run(rings(call, *ids), bits=64)
    assert end.kind == "exit", end
    return bytes(m.output)


async def test_a_hypercall_rings_its_id_and_no_other(call: str) -> None:
    with machine(platform=PlatformKey(0x123456)) as m, eventfd() as first, eventfd() as second:
        m.vm.hypercall_id(0xABC, first)
        m.vm.hypercall_id(0xABD, second)
        assert await ring(m, call, 0xABC, 0xABC, 0xABD) == b"\0\0\0"
        assert (count_of(first), count_of(second)) == (2, 1)
        assert 0 not in await ring(m, call, 0xABE, 0xFFFFFF)
        assert (count_of(first), count_of(second)) == (0, 0)


async def test_a_withdrawn_id_gives_a_status_and_can_be_registered_again(call: str) -> None:
    with machine(platform=PlatformKey(0x123456)) as m, eventfd() as fd:
        bell = m.vm.hypercall_id(0xABC, fd)
        bell.remove()
        assert 0 not in await ring(m, call, 0xABC)
        assert count_of(fd) == 0
        m.vm.hypercall_id(0xABC, fd)
        assert await ring(m, call, 0xABC) == b"\0"
        assert count_of(fd) == 1


def test_a_connection_id_that_is_taken_is_refused_by_name(call: str) -> None:
    with machine(platform=PlatformKey(0x123456)) as m, eventfd() as fd:
        m.vm.hypercall_id(0xABC, fd)
        with pytest.raises(HostError, match="connection id 0xabc is already taken") as caught:
            m.vm.hypercall_id(0xABC, fd)
        assert caught.value.errno == errno.EEXIST


def test_a_connection_id_has_24_bits() -> None:
    with machine() as m, eventfd() as fd, pytest.raises(ValueError, match="more than 24 bits"):
        m.vm.hypercall_id(0x1000000, fd)
