"""``hyperbell qemu`` where there is no KVM: it says so, and QEMU starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.attach.qemu_start import without_kvm

QEMU = "qemu-system-x86_64"


@pytest.fixture
def kvm(tmp_path: Path) -> Path:
    """What can be opened as /dev/kvm can."""
    path = tmp_path / "kvm"
    path.touch()
    return path


@pytest.mark.parametrize(
    "command",
    [
        [QEMU, "-accel", "kvm"],
        [QEMU, "--accel", "kvm,kernel-irqchip=split", "-m", "1G"],
        [QEMU, "-accel", "tcg", "-accel", "kvm"],
        [QEMU, "-machine", "q35,accel=kvm:tcg"],
        [QEMU, "-M", "accel=kvm"],
        [QEMU, "-m", "1G", "-enable-kvm"],
        [QEMU, "--enable-kvm"],
        ["/usr/bin/kvm", "-m", "1G"],
    ],
)
def test_a_guest_with_kvm_is_no_matter_for_a_note(kvm: Path, command: list[str]) -> None:
    assert without_kvm(command, kvm) == ""
    kvm.unlink()
    assert without_kvm(command, kvm) == f"{kvm} cannot be opened (No such file or directory)"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ([QEMU], "without -accel kvm QEMU emulates the guest (TCG)"),
        ([QEMU, "-append", "accel=kvm", "-name", "kvm"], "without -accel kvm QEMU emulates the guest (TCG)"),
        ([QEMU, "-accel"], "QEMU emulates the guest ()"),
        ([QEMU, "-accel", "tcg,thread=single"], "QEMU emulates the guest (tcg)"),
        ([QEMU, "-machine", "pc,accel=tcg:qtest"], "QEMU emulates the guest (tcg, qtest)"),
    ],
)
def test_a_guest_without_kvm_is(kvm: Path, command: list[str], reason: str) -> None:
    assert without_kvm(command, kvm) == reason


def test_qemu_is_started_all_the_same(tmp_path: Path) -> None:
    """With the library: a fallback to KVM later in its arguments' files, say, still finds it."""
    program = tmp_path / "qemu"
    program.write_text('#!/bin/sh\necho "$@" "$HYPERBELL_SOCKET"\n')
    program.chmod(0o755)
    command = [sys.executable, "-m", "daemon.cli", "qemu", "--socket", str(tmp_path / "h.sock"), "--", str(program)]
    ran = subprocess.run([*command, "-accel", "tcg"], capture_output=True, text=True, env=os.environ, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"-accel tcg {tmp_path / 'h.sock'}\n"
    assert ran.stderr == (
        "note: QEMU emulates the guest (tcg): the guest has no hypercall doorbell and rings by plain ones\n"
    )
