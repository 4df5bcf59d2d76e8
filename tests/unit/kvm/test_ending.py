"""How a VM ended is one line that a person can act on, with the kernel's numbers in it."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from transports.kvm.native import ffi, lib
from transports.kvm.vm.ending import describe_end


def failure(exit_reason: int, *data: int, **fields: Any) -> str:
    words = list(data)
    end = ffi.new(
        "struct vm_end *",
        {
            "kind": lib.VM_END_FAILED,
            "vcpu": 1,
            "rip": 0x1234,
            "exit_reason": exit_reason,
            "words": len(words),
            "data": words,
            **fields,
        },
    )
    described = describe_end(end)
    assert described.kind == "failed"
    assert described.reason.startswith("vCPU 1 cannot run on: ")
    assert described.reason.endswith(" (at RIP 0x1234)")
    return described.reason


def test_a_refused_entry_names_the_processors_reason() -> None:
    assert "refused to enter the guest: reason 0x80000021 on CPU 3" in failure(9, 0x8000_0021, 3)


def test_an_instruction_that_cannot_be_emulated_is_shown() -> None:
    first, second = int.from_bytes(b"\x03\x0f\x01\xd9\0\0\0\0", "little"), 0
    assert "KVM internal error 1 (an instruction that KVM cannot emulate): bytes 0f 01 d9" in failure(
        17, 1, 1, first, second
    )


def test_an_internal_error_without_instruction_shows_its_words() -> None:
    assert "KVM internal error 3 (an exit while an exception was delivered): 0x10 0x20" in failure(17, 3, 0x10, 0x20)


def test_an_exit_that_nobody_knows_has_its_number() -> None:
    assert "exit 99: 0x7" in failure(99, 7)


def test_a_failed_ioctl_names_its_error() -> None:
    assert "KVM_RUN: Bad address" in failure(0, error=-errno.EFAULT)


@pytest.mark.parametrize(
    ("kind", "status", "expected"),
    [
        (lib.VM_END_EXIT, 3, ("exit", 3, "the guest ended with status 3")),
        (lib.VM_END_POWER_OFF, 0, ("power off", 0, "the guest switched itself off")),
        (lib.VM_END_RESET, 0, ("reset", 0, "the guest asked for a reset")),
        (lib.VM_END_RESET, lib.VM_RESET_TRIPLE_FAULT, ("reset", 0, "the guest broke down: a triple fault")),
    ],
)
def test_an_end_that_the_guest_chose_says_which(kind: int, status: int, expected: tuple[str, int, str]) -> None:
    end = describe_end(ffi.new("struct vm_end *", {"kind": kind, "status": status}))
    assert (end.kind, end.status, end.reason) == expected
