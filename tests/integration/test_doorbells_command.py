"""``hyperbell doorbells`` on this machine's own /dev/kvm, of whatever kind that is, and without one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from kit.project import ROOT

from daemon.doorbells.report import load
from transports.kvm.doorbell_cost.guest import Ring, Step, acknowledging, make_ram, run_steps, settle
from transports.kvm.host import Kvm
from transports.kvm.vm.vmm import Vm, VmSetup
from virtio.errors import HostError
from virtio.fd import OwnedFd

COMMAND: Final = (sys.executable, "-m", "daemon.cli", "doorbells")
NOBODY: Final = 65534
PORT: Final = 0x1000
STORED: Final = 0xD000_0000


def why_no_kvm() -> str:
    try:
        Kvm.open().close()
    except HostError as error:
        return str(error)
    return ""


needs_kvm = pytest.mark.skipif(bool(why_no_kvm()), reason=f"no usable /dev/kvm: {why_no_kvm()}")


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The JSON of one run, and the file that it saved."""
    path = tmp_path_factory.mktemp("doorbells") / "costs.json"
    done = command("--json", "--save", str(path))
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document, path


@needs_kvm
@pytest.mark.parametrize("error", [errno.ENOTTY, errno.EINVAL])
def test_a_kvm_that_has_the_hypercall_only_in_name_is_measured_without_it(tmp_path: Path, error: int) -> None:
    fake = tmp_path / "fake.so"
    source = ROOT / "tests" / "stock_qemu" / "fake_hyperv.c"
    subprocess.run(["gcc", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", source, "-o", fake], check=True)
    done = command("--json", env={**os.environ, "LD_PRELOAD": str(fake), "FAKE_ERROR": str(error)})
    assert done.returncode == 0, done.stderr
    kinds = {kind["kind"]: kind for kind in json.loads(done.stdout)["doorbells"]}
    assert kinds["hypercall"]["why_not"].endswith(f": {os.strerror(error)}")
    assert kinds["hypercall"]["kernel"] is None
    for name in ("mmio", "mmio-match", "pio"):
        assert kinds[name]["kernel"]["rings"] > 0


@needs_kvm
def test_plain_doorbells_and_exits_are_measured(measured: tuple[dict[str, Any], Path]) -> None:
    kinds = {kind["kind"]: kind for kind in measured[0]["doorbells"]}
    assert list(kinds) == ["mmio", "mmio-match", "pio", "hypercall", "exit", "cpuid"]
    for name in ("mmio", "mmio-match", "pio"):
        for target in ("kernel", "thread"):
            figure = kinds[name][target]
            assert 0 < figure["median_ns"] <= figure["p99_ns"]
            assert figure["rings"] > 100
        assert kinds[name]["thread"]["median_ns"] > kinds[name]["kernel"]["median_ns"]
    assert kinds["exit"]["kernel"]["median_ns"] > kinds["cpuid"]["kernel"]["median_ns"]


@needs_kvm
def test_the_hypercall_is_measured_or_the_reason_is_given(measured: tuple[dict[str, Any], Path]) -> None:
    (call,) = (kind for kind in measured[0]["doorbells"] if kind["kind"] == "hypercall")
    with Kvm.open() as kvm:
        reason = kvm.why_no_hypercall
    if reason is None:
        assert call["kernel"]["rings"] > 100
        assert call["thread"]["rings"] > 100
    else:
        assert call["why_not"] == reason
        assert call["kernel"] is None


@needs_kvm
def test_the_saved_file_is_the_json_and_the_daemon_reads_it(measured: tuple[dict[str, Any], Path]) -> None:
    document, path = measured
    assert json.loads(path.read_text()) == document
    assert load(path).costs("kernel").keys() >= {"mmio", "pio"}


@needs_kvm
def test_emulated_instructions_are_found_out(measured: tuple[dict[str, Any], Path]) -> None:
    """By a loop of plain instructions, which takes as long in a guest as outside wherever a processor runs it."""
    document = measured[0]
    codes = {reason["code"] for reason in document["reasons"]}
    assert document["trustworthy"] is (not codes)
    with Vm(VmSetup(make_ram())) as vm:
        (result,) = trio.run(run_steps, vm, [Step(Ring.LOOP, 100_000, count=3)])
    emulated = min(result.samples) > 4 * 100_000 * 4  # four cycles for each round is plenty for any processor
    assert ("emulated-guest" in codes) is emulated


@needs_kvm
def test_the_table_is_for_people() -> None:
    done = command(env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert "MEDIAN" in done.stdout
    assert "###" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: cannot become a user without permission")
@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="no /dev/kvm that could be forbidden")
def test_without_permission_there_is_one_clear_sentence() -> None:
    if Path("/dev/kvm").stat().st_mode & 0o006:
        pytest.skip("/dev/kvm here is for everybody")
    # Becomes nobody after it has read this checkout, which nobody may not be allowed to.
    become_nobody = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    script = f"import os; from daemon.cli import main; {become_nobody}; raise SystemExit(main(['doorbells']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    said = " ".join(done.stdout.split())
    assert (done.returncode, done.stderr) == (1, "")
    assert "No doorbell works here: user nobody may not open /dev/kvm" in said


def eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


@needs_kvm
def test_each_ring_reaches_the_eventfd_and_only_the_right_value_rings() -> None:
    with make_ram() as ram, eventfd() as any_value, eventfd() as by_value, Vm(VmSetup(ram)) as vm:
        vm.ioeventfd_mmio(STORED, 0, None, any_value)
        vm.ioeventfd_pio(PORT, 2, 7, by_value)
        steps = [
            Step(Ring.STORE, STORED, 1, count=5),
            Step(Ring.OUT, PORT, 7, count=3),
            Step(Ring.OUT, PORT, 8, count=4),
        ]
        results = trio.run(run_steps, vm, steps)
        assert [len(result.samples) for result in results] == [5, 3, 4]
        assert os.eventfd_read(any_value.fileno()) == 5
        assert os.eventfd_read(by_value.fileno()) == 3
        assert all(sample > 0 for result in results for sample in result.samples)


@needs_kvm
def test_a_thread_acknowledges_every_ring_and_a_lost_ring_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ring() -> None:
        with make_ram() as ram, eventfd() as bell, Vm(VmSetup(ram)) as vm, acknowledging(ram, bell):
            vm.ioeventfd_pio(PORT, 2, 1, bell)
            right = Step(Ring.OUT, PORT, 1, count=20, to_thread=True)
            (answered,) = await run_steps(vm, [right])
            assert (len(answered.samples), answered.unanswered) == (20, 0)
            with monkeypatch.context() as patch:
                patch.setattr("transports.kvm.doorbell_cost.guest._PATIENCE_CYCLES", 100_000)
                patch.setattr("transports.kvm.doorbell_cost.guest._CATCH_UP_SECONDS", 0.2)
                (lost,) = await run_steps(vm, [replace(right, value=2)])
                assert (len(lost.samples), lost.unanswered) == (0, 1)
                assert not await settle(ram)
            (again,) = await run_steps(vm, [right])
            assert (len(again.samples), again.unanswered) == (20, 0)

    trio.run(ring)


@needs_kvm
def test_a_ring_that_is_only_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ring() -> None:
        with make_ram() as ram, eventfd() as bell, Vm(VmSetup(ram)) as vm, acknowledging(ram, bell):
            vm.ioeventfd_pio(PORT, 2, 1, bell)
            with monkeypatch.context() as patch:
                patch.setattr("transports.kvm.doorbell_cost.guest._PATIENCE_CYCLES", 1)
                (late,) = await run_steps(vm, [Step(Ring.OUT, PORT, 1, count=20, to_thread=True)])
            assert late.unanswered <= 1
            assert await settle(ram)

    trio.run(ring)


@needs_kvm
def test_a_guest_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transports.kvm.doorbell_cost.guest._RUN_SECONDS", 0.5)
    with make_ram() as ram, Vm(VmSetup(ram)) as vm, pytest.raises(HostError, match="did not come to its end"):
        trio.run(run_steps, vm, [Step(Ring.LOOP, 1 << 60)])


@needs_kvm
def test_a_guest_that_faults_is_said_to() -> None:
    """Without the Hyper-V leaves there is no such register: three faults in a row reset the machine."""
    with make_ram() as ram, Vm(VmSetup(ram)) as vm, pytest.raises(HostError, match="came to a bad end: reset"):
        trio.run(run_steps, vm, [Step(Ring.WRMSR, 0x4F00_0000, 1)])
