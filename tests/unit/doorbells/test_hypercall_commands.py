"""What an operator does about the hypercall doorbell: the policy at run time, QEMU's start, what is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
import trio
from prometheus_client import CollectorRegistry, generate_latest

from daemon.cli import main
from daemon.commands.show_table import render
from daemon.doorbells.policies import Policies
from daemon.metrics.page import StateCollector
from daemon.running.control import respond, serve_control
from daemon.state import DaemonState, DeviceState
from transports.hypercall import derive_key
from transports.kvm.machine.state import MachineState, MmioDeviceState, QueueBell
from transports.stock_qemu.library import library_path
from transports.stock_qemu.state import BellState, VmState
from virtio.errors import HostError
from virtio.native.stats import BackendStats, QueueStats

CONFIG: Final = """
[daemon]
metrics = "off"
control = "control.sock"
hypercall_socket = "hypercall.sock"
[devices.disk]
type = "blk"
backend = "null"
size = "1M"
socket = "disk.sock"
hypercall = "auto"
[devices.nic]
type = "net"
backend = "null"
socket = "nic.sock"
[devices.entropy]
type = "rng"
socket = "entropy.sock"
"""
SECRET: Final = b"0123456789abcdef0123456789abcdef"
UUID: Final = "8a1f2c64-9d52-4f1b-8a3e-2f6f3c1d7e90"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hyperbell.toml"
    path.write_text(CONFIG)
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    return path


def state(*vms: VmState) -> DaemonState:
    queues = tuple(
        QueueStats(number, {"kick": 0, "pio": 0, "hypercall": 0}, 0, 0, 0, 0, 0, 0.0, True, False, {})
        for number in range(2)
    )
    disk = DeviceState(BackendStats("disk", "blk", 0, queues), None, "vhost-user", Path("disk.sock"))
    return DaemonState((disk,), (), vms, {"disk": "offer", "other": "withhold"}, {"EEXIST": 2})


WEB: Final = VmState(
    "web1", 17, 100.0, True, False, False, "", 4, 12345,
    (BellState(0x109000, "disk", 0, True, ""), BellState(0x109001, "disk", 1, False, "EEXIST")),
)  # fmt: skip
OLD: Final = VmState("vm0", 18, 0.0, False, False, False, "the guest has no Hyper-V leaves", 1, 0, ())


# The policy


def test_everybody_hears_of_every_policy_and_of_each_change() -> None:
    heard: list[tuple[str, str]] = []
    policies = Policies({"disk": "offer", "nic": "auto"})
    policies.tell(lambda device, policy: heard.append((device, policy)))
    assert policies.set("disk", "withhold")
    assert not policies.set("disk", "withhold")
    assert heard == [("disk", "offer"), ("nic", "auto"), ("disk", "withhold"), ("disk", "withhold")]
    assert policies.current == {"disk": "withhold", "nic": "auto"}
    with pytest.raises(HostError, match="no device 'dsk'; there are: disk, nic"):
        policies.set("dsk", "offer")


def ask_for(request: object, policies: Policies | None) -> dict[str, Any]:
    return dict(respond(json.dumps(request).encode(), state(), policies))


def test_the_control_socket_changes_a_policy() -> None:
    policies = Policies({"disk": "offer"})
    request = {"command": "hypercall", "device": "disk", "policy": "auto"}
    done = {"ok": True, "device": "disk", "policy": "auto", "changed": True, "reaches_vms": False}
    assert ask_for(request, policies) == done
    assert policies.current == {"disk": "auto"}
    assert not ask_for(request, policies)["changed"]


@pytest.mark.parametrize(
    "request_",
    [
        {"command": "hypercall"},
        {"command": "hypercall", "device": "disk"},
        {"command": "hypercall", "device": "disk", "policy": "never"},
        {"command": "hypercall", "device": "disk", "policy": ["offer"]},
        {"command": "hypercall", "device": ["disk"], "policy": "offer"},
        {"command": "hypercall", "device": "none", "policy": "offer"},
        {"command": "hypercall", "device": None, "policy": None},
    ],
)
def test_a_wrong_request_changes_nothing_and_is_told_what_is_right(request_: object) -> None:
    policies = Policies({"disk": "withhold"})
    answer = ask_for(request_, policies)
    assert not answer["ok"]
    assert "disk" in answer["error"]
    assert policies.current == {"disk": "withhold"}


def test_a_daemon_without_policies_has_no_such_command() -> None:
    error = ask_for({"command": "hypercall", "device": "disk", "policy": "auto"}, None)["error"]
    assert error.endswith("there are: list, stats")


async def test_the_command_changes_the_policy_of_a_running_daemon(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = Policies({"disk": "offer"})
    control = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, control, state, policies)

        async def hypercall(*arguments: str) -> int:
            return await trio.to_thread.run_sync(main, ["hypercall", *arguments])

        assert await hypercall("disk", "withhold", "--control", str(control)) == 0
        assert policies.current == {"disk": "withhold"}
        assert await hypercall("disk", "withhold", str(file)) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("disk:")]
        assert printed == ["disk: withhold", "disk: withhold (as before)"]
        assert await hypercall("dsk", "offer", "--control", str(control)) == 1
        assert "there is no device 'dsk'" in capsys.readouterr().err
        nursery.cancel_scope.cancel()


# What is shown


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_vms_and_their_doorbells_are_shown() -> None:
    answer = json.loads(json.dumps(respond(b'{"command": "stats"}', state(WEB, OLD)), default=str))
    *_, vms, bells = render(answer, now=161.0).split("\n\n")
    assert lines(vms)[1:] == [
        ["web1", "17", "1", "min", "1", "s", "drawn", "12345", "-"],
        ["vm0", "18", "2", "min", "41", "s", "none", "0", *OLD.reason.split()],
    ]
    assert lines(bells)[1:] == [
        ["disk", "0", "web1", "109000", "offer", "registered"],
        ["disk", "1", "web1", "109001", "offer", "refused:", "EEXIST"],
        ["other", "-", "-", "-", "withhold", "no"],
    ]


OWN: Final = MmioDeviceState(
    bells=(QueueBell(0, 0x100, True, True), QueueBell(1, 0x101, True, False)), stray_doorbells=0, refusals={}
)
WITHHELD: Final = MmioDeviceState((QueueBell(0, 0x200, False, False), QueueBell(1, 0, False, False)), 12, {})
MACHINE: Final = MachineState(True, "", refused_hypercalls=0, unknown_memory=5, unknown_ports=6)


def own(machine: MachineState = MACHINE) -> DaemonState:
    """Two devices of a machine of our own, "disk" with 4 hypercalls a queue."""
    (disk,) = state().devices
    rung = tuple(replace(queue, doorbells={"kick": 0, "pio": 0, "hypercall": 4}) for queue in disk.backend.queues)
    disk = replace(disk, backend=replace(disk.backend, queues=rung), transport="kvm", socket=None, own=OWN)
    other = replace(state().devices[0], transport="kvm", socket=None, own=WITHHELD)
    other = replace(other, backend=replace(other.backend, device="other"))
    return replace(state(), devices=(disk, other), machine=machine)


def shown(what: DaemonState) -> list[str]:
    answer = json.loads(json.dumps(respond(b'{"command": "stats"}', what), default=str))
    return render(answer).split("\n\n")


def test_a_machine_of_our_own_shows_its_doorbells_and_what_rang_nothing() -> None:
    *_, vms, bells, strays = shown(own(replace(MACHINE, refused_hypercalls=3)))
    assert lines(vms)[1:] == [["(own)", "-", "-", "given", "8", "-"]]
    assert lines(bells)[1:] == [
        ["disk", "0", "(own)", "000100", "offer", "accepted"],
        ["disk", "1", "(own)", "000101", "offer", "registered"],
        ["other", "0", "(own)", "000200", "withhold", "no"],
        ["other", "1", "(own)", "-", "withhold", "no"],
    ]
    assert [line.rsplit(maxsplit=1) for line in strays.splitlines()[1:]] == [
        ["other: queues that do not exist", "12"],
        ["hypercalls of unknown connection ids", "3"],
    ]


def test_a_machine_without_a_key_shows_no_hypercalls_and_a_host_without_them_says_why() -> None:
    assert "HYPERCALL" not in "".join(shown(own(replace(MACHINE, key_shown=False, reason="it was given no key"))))
    _, _, vms, *_ = shown(own(replace(MACHINE, reason="this KVM has none")))
    assert lines(vms)[1][-4:] == ["this", "KVM", "has", "none"]


def test_without_vms_the_tables_are_as_ever() -> None:
    answer = json.loads(json.dumps(respond(b'{"command": "stats"}', state()), default=str))
    assert "HYPERCALL" not in render(answer)


def test_the_metrics_have_each_vms_hypercalls_and_each_queues_doorbell() -> None:
    registry = CollectorRegistry()
    registry.register(StateCollector(lambda: state(WEB, OLD)))
    page = generate_latest(registry).decode().splitlines()
    for line in (
        'hyperbell_vm_hypercalls_total{vm="web1"} 12345.0',
        'hyperbell_vm_hypercalls_total{vm="vm0"} 0.0',
        'hyperbell_hypercall_doorbells{device="disk",queue="0"} 1.0',
        'hyperbell_hypercall_doorbells{device="disk",queue="1"} 0.0',
        'hyperbell_hypercall_refusals_total{reason="EEXIST"} 2.0',
    ):
        assert line in page


# QEMU's start


def started(*arguments: str, **environment: str) -> dict[str, Any]:
    """What the program that ``hyperbell qemu`` becomes finds: its arguments and the variables."""
    names = ("LD_PRELOAD", "HYPERBELL_SOCKET", "HYPERBELL_KEY", "HYPERBELL_VM")
    code = f"import json, os, sys; print(json.dumps([sys.argv[1:], [os.environ.get(name) for name in {names}]]))"
    command = [sys.executable, "-m", "daemon.cli", "qemu", *arguments, "--", sys.executable, "-S", "-c", code]
    ran = subprocess.run(
        [*command, "-M", "q35", "--", "-x"], env=os.environ | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    words, values = json.loads(ran.stdout)
    return {"argv": words, **dict(zip(names, values, strict=True))}


def test_qemu_is_started_with_the_library_and_what_it_must_know(file: Path, tmp_path: Path) -> None:
    found = started("--config", str(file), "--name", "web1", "--key", "0x12AB")
    assert found == {
        "argv": ["-M", "q35", "--", "-x"],
        "LD_PRELOAD": str(library_path()),
        "HYPERBELL_SOCKET": str(tmp_path / "hypercall.sock"),
        "HYPERBELL_KEY": "0012ab",
        "HYPERBELL_VM": "web1",
    }


def test_what_is_preloaded_already_stays_so() -> None:
    other = "/usr/lib/x86_64-linux-gnu/libm.so.6"
    found = started("--socket", "relative.sock", LD_PRELOAD=other)
    assert found["LD_PRELOAD"] == f"{library_path()}:{other}"
    assert found["HYPERBELL_SOCKET"] == str(Path("relative.sock").absolute())
    assert found["HYPERBELL_KEY"] is None


def test_the_key_of_a_vm_is_the_same_wherever_the_secret_is(tmp_path: Path, file: Path) -> None:
    expected = f"{derive_key(SECRET, uuid.UUID(UUID)):06x}"
    arguments = ("--socket", "/run/x.sock", "--secret", str(tmp_path / "secret"), "--uuid")
    assert started(*arguments, UUID)["HYPERBELL_KEY"] == expected
    assert started(*arguments, UUID.upper())["HYPERBELL_KEY"] == expected
    assert started(*arguments, str(uuid.UUID(int=5)))["HYPERBELL_KEY"] != expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--key", "0"], "--key: '0'"),
        (["--key", "1000000"], "--key: '1000000'"),
        (["--key", "-5"], "--key: '-5'"),
        (["--key", "1_0"], "--key: '1_0'"),
        (["--name", "a b"], "--name: 'a b'"),
        (["--uuid", UUID], "--secret and --uuid belong together"),
        (["--secret", "secret"], "--secret and --uuid belong together"),
        (["--secret", "none", "--uuid", UUID], "--secret: none: No such file"),
        (["--secret", "short", "--uuid", UUID], "openssl rand"),
        (["--secret", "secret", "--uuid", "5"], "--uuid: '5' is no UUID"),
        (["--secret", "secret", "--uuid", UUID, "--key", "1"], "keep one way"),
    ],
)
def test_each_mistake_is_said_before_qemu_starts(
    file: Path,
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_bytes(b"0123")
    assert main(["qemu", "--config", str(file), *arguments, "--", "/bin/true"]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(("given", "folder", "length"), [("/run/" + "x" * 103, "", 108), ("h.sock", "d" * 120, 0)])
def test_a_socket_whose_whole_path_is_too_long_for_one_is_said(
    tmp_path: Path,
    given: str,
    folder: str,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A daemon that runs in its folder makes it by its short name; QEMU may go elsewhere."""
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    whole = str(Path(given).absolute())
    assert main(["qemu", "--socket", given, "--", "qemu-system-none"]) == 1
    complaint = capsys.readouterr().err
    assert f"{whole} is {length or len(whole)} bytes long" in complaint
    assert "has room for 107" in complaint


def test_the_longest_path_that_a_socket_can_have_is_taken() -> None:
    longest = "/run/" + "x" * 102
    assert started("--socket", longest)["HYPERBELL_SOCKET"] == longest


def test_a_program_that_is_not_there_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qemu", "--config", str(file), "--", "qemu-system-none"]) == 1
    assert "there is no program qemu-system-none" in capsys.readouterr().err


def test_a_configuration_without_the_socket_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(CONFIG.replace('hypercall_socket = "hypercall.sock"\n', ""))
    assert main(["qemu", "--config", str(file), "--", "/bin/true"]) == 1
    assert "add to [daemon]: hypercall_socket" in capsys.readouterr().err


# QEMU's options


def test_the_options_for_the_hypercall_are_printed_when_asked_for(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qemu-args", str(file)]) == 0
    plain = capsys.readouterr()
    assert "modern-pio-notify" not in plain.out
    assert "hypercall" not in plain.err
    assert main(["qemu-args", str(file), "--hypercall"]) == 0
    printed = capsys.readouterr()
    assert "-cpu host,hv-relaxed" in printed.out
    devices = [line for line in printed.out.splitlines() if line.startswith("-device")]
    assert len(devices) == 3
    assert all("modern-pio-notify=on" in line for line in devices)
    for word in (f"hyperbell qemu --config {file} --", "--secret FILE --uuid UUID", "spinlocks", "10 to 15 devices"):
        assert word in printed.err
    assert main(["qemu-args", str(file), "--hypercall", "--machine", "pc"]) == 0
    assert "10 to 15 devices" not in capsys.readouterr().err


def test_libvirts_domain_has_the_library_the_leaves_and_the_ports(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qemu-args", str(file), "--hypercall", "--libvirt", "--key", "12ab", "--name", "web1"]) == 0
    domain = ElementTree.fromstring(capsys.readouterr().out)
    names = {"qemu": "http://libvirt.org/schemas/domain/qemu/1.0"}
    relaxed = domain.find("features/hyperv/relaxed")
    assert relaxed is not None
    assert relaxed.get("state") == "on"
    aliases = [alias.get("name") for alias in domain.findall("devices/*/alias")]
    assert aliases == ["ua-disk", "ua-nic"]
    overrides = domain.findall("qemu:override/qemu:device", names)
    assert [override.get("alias") for override in overrides] == aliases
    for override in overrides:
        (changed,) = override.findall("qemu:frontend/qemu:property", names)
        assert (changed.get("name"), changed.get("value")) == ("modern-pio-notify", "true")
    (command_line,) = domain.findall("qemu:commandline", names)
    environment = {item.get("name"): item.get("value") for item in command_line.findall("qemu:env", names)}
    assert environment == {
        "LD_PRELOAD": str(library_path()),
        "HYPERBELL_SOCKET": str(tmp_path / "hypercall.sock"),
        "HYPERBELL_KEY": "0012ab",
        "HYPERBELL_VM": "web1",
    }
    arguments = [item.get("value") or "" for item in command_line.findall("qemu:arg", names)]
    assert json.loads(arguments[-1])["modern-pio-notify"] is True
