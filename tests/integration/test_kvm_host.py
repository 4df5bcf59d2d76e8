"""What stands in the way of a VM is said in one line that names it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from kit.kvm.guest import need_kvm
from kit.project import ROOT

from transports.kvm.host import Abilities, Kvm, check_abilities
from virtio.errors import HostError

WHOLE = Abilities(
    api_version=12,
    user_memory=True,
    irqchip=True,
    pit=True,
    irqfd=True,
    ioeventfd=True,
    ioeventfd_any_length=True,
    immediate_exit=True,
    hyperv_eventfd=True,
    tsc_deadline=True,
    vcpus_max=4,
)


def test_a_machine_without_kvm_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"^no .*/kvm: load kvm_intel or kvm_amd; ") as caught:
        Kvm.open(str(tmp_path / "kvm"))
    assert caught.value.errno == errno.ENOENT


def test_something_else_than_kvm_is_not_taken_for_it() -> None:
    with pytest.raises(HostError, match=r"^/dev/null is not a KVM device$"):
        Kvm.open("/dev/null")


def test_a_folder_is_not_opened() -> None:
    with pytest.raises(HostError, match="opening /dev: Is a directory"):
        Kvm.open("/dev")


def test_another_api_version_is_named() -> None:
    with pytest.raises(HostError, match="/dev/kvm: KVM's API version is 11, and 12 is needed"):
        check_abilities(replace(WHOLE, api_version=11))


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("user_memory", "KVM_CAP_USER_MEMORY"),
        ("irqchip", "KVM_CAP_IRQCHIP"),
        ("pit", "KVM_CAP_PIT2"),
        ("irqfd", "KVM_CAP_IRQFD"),
        ("ioeventfd", "KVM_CAP_IOEVENTFD"),
        ("ioeventfd_any_length", "KVM_CAP_IOEVENTFD_ANY_LENGTH"),
        ("immediate_exit", "KVM_CAP_IMMEDIATE_EXIT"),
    ],
)
def test_a_capability_that_is_needed_is_missed_by_name(field: str, name: str) -> None:
    with pytest.raises(HostError, match=f"this kernel's KVM lacks {name};"):
        check_abilities(replace(WHOLE, **{field: False}))


def test_a_vm_does_without_what_is_only_an_optimization() -> None:
    lacking = replace(WHOLE, hyperv_eventfd=False, tsc_deadline=False)
    check_abilities(lacking)
    assert WHOLE.why_no_hypercall is None
    assert lacking.why_no_hypercall is not None
    assert "KVM_CAP_HYPERV_EVENTFD" in lacking.why_no_hypercall


def test_this_machines_kvm_lists_the_cpuid_that_it_supports() -> None:
    with need_kvm() as kvm:
        leaves = {entry.leaf for entry in kvm.supported_cpuid()}
        assert {0, 1, 0x8000_0000} <= leaves
        assert kvm.vcpus_max >= 1


def opened_as_nobody(path: str) -> subprocess.CompletedProcess[str]:
    """What an unprivileged user is told who opens ``path`` for a VM."""
    if os.geteuid() != 0:
        pytest.skip("not root: cannot become another user")
    program = (
        "import os, sys; from transports.kvm.host import Kvm; from virtio.errors import HostError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: Kvm.open(sys.argv[1])\n"
        "except HostError as error: sys.exit(str(error))\n"
    )
    return subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_an_unprivileged_user_is_told_about_the_group() -> None:
    need_kvm().close()
    if Path("/dev/kvm").stat().st_mode & 0o006:
        pytest.skip("/dev/kvm is open to everybody here")
    ran = opened_as_nobody("/dev/kvm")
    assert ran.returncode == 1
    assert re.match(r"user (nobody|65534) may not open /dev/kvm: its ", ran.stderr)
    assert "group" in ran.stderr
    assert ran.stderr.count("\n") == 1, "one line"


@pytest.mark.parametrize(
    ("mode", "advice"), [(0o660, r"usermod -a -G (root|0) (nobody|65534)"), (0o600, r"its mode is -rw-------: ")]
)
def test_the_advice_fits_the_mode_of_the_device(mode: int, advice: str) -> None:
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as folder:
        Path(folder).chmod(0o755)
        device = Path(folder) / "kvm"
        device.touch()
        device.chmod(mode)
        ran = opened_as_nobody(str(device))
    assert ran.returncode == 1
    assert re.search(advice, ran.stderr)
