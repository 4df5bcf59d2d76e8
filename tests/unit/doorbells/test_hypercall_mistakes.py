"""What an operator is told who asks for the hypercall doorbell where it cannot be had."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import trio
from kit.project import ROOT

from daemon.cli import main
from daemon.commands.serve import EPILOG as SERVE_EPILOG
from daemon.doorbells.policies import Policies
from daemon.running.control import ask, serve_control
from daemon.state import DaemonState
from transports.kvm.machine.state import MachineState
from transports.stock_qemu.state import VmState
from virtio.errors import HostError

CONFIG: Final = """
[daemon]
hypercall_socket = "hypercall.sock"
[devices.disk]
type = "blk"
backend = "null"
size = "1M"
socket = "disk.sock"
"""
SECRET: Final = b"0123456789abcdef0123456789abcdef"
UUID: Final = "8a1f2c64-9d52-4f1b-8a3e-2f6f3c1d7e90"
NOBODY: Final = DaemonState((), ())
MACHINE: Final = MachineState(True, "", refused_hypercalls=0, unknown_memory=0, unknown_ports=0)
VM: Final = VmState("vm0", 18, 0.0, False, False, False, "the guest has no Hyper-V leaves", 1, 0, ())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hyperbell.toml"
    path.write_text(CONFIG)
    (tmp_path / "secret").write_bytes(SECRET)
    return path


@pytest.mark.parametrize("more", [[], ["--hypercall"], ["--hypercall", "--libvirt"]])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--key", "zz"], "--key: 'zz' is not 1 to 6 hexadecimal digits"),
        (["--secret", "/nope", "--uuid", "x"], "--secret: /nope: No such file or directory"),
        (["--uuid", UUID], "--secret and --uuid belong together"),
        (["--name", "a b"], "--name: 'a b' is not 1 to 31 letters"),
    ],
)
def test_a_mistake_about_the_vm_is_said_whatever_is_printed(
    file: Path, capsys: pytest.CaptureFixture[str], more: list[str], arguments: list[str], complaint: str
) -> None:
    assert main(["qemu-args", str(file), *more, *arguments]) == 1
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.out == ""


def test_the_note_on_starting_qemu_has_what_was_given_for_the_vm(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = f"note: start QEMU through: hyperbell qemu --config {file}"
    assert main(["qemu-args", str(file), "--hypercall", "--key", "12ab", "--name", "web1"]) == 0
    said = capsys.readouterr().err
    assert f"{begin} --name web1 --key 12ab -- qemu-system" in said
    assert "needs a stable key" not in said
    assert main(["qemu-args", str(file), "--hypercall", "--secret", f"{tmp_path}/secret", "--uuid", UUID]) == 0
    assert f"{begin} --secret {tmp_path}/secret --uuid {UUID} -- qemu-system" in capsys.readouterr().err
    assert main(["qemu-args", str(file), "--hypercall", "--name", "web1"]) == 0
    assert "needs a stable key" in capsys.readouterr().err


def test_what_changes_nothing_without_the_hypercall_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qemu-args", str(file), "--key", "12ab"]) == 0
    said = capsys.readouterr().err
    assert said == "note: --key is for the hypercall doorbell, and changes nothing without --hypercall\n"


@pytest.mark.parametrize(
    ("state", "noted"),
    [
        (NOBODY, True),
        (DaemonState((), (), vms=(VM,)), False),
        (DaemonState((), (), machine=MACHINE), False),
    ],
    ids=["nobody", "a VM of stock QEMU", "a machine of our own"],
)
async def test_a_policy_that_reaches_no_vm_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: DaemonState, noted: bool
) -> None:
    control = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, control, lambda: state, Policies({"disk": "offer"}))
        command = ["hypercall", "disk", "withhold", "--control", str(control)]
        assert await trio.to_thread.run_sync(main, command) == 0
        nursery.cancel_scope.cancel()
    printed = capsys.readouterr()
    assert printed.out.endswith("disk: withhold\n")
    assert ("note: disk: no VM reports its doorbells now" in printed.err) == noted
    assert ("[daemon] hypercall_socket" in printed.err) == noted


def hang_up(client: socket.socket) -> None:
    """With what was said unread, as a device's socket does that takes it for nonsense."""
    client.recv(1, socket.MSG_PEEK)
    client.close()


def say_nothing(client: socket.socket) -> None:
    client.recv(4096)
    client.close()


@pytest.mark.parametrize("behave", [hang_up, say_nothing])
def test_another_socket_than_the_control_socket_is_named_as_such(
    tmp_path: Path, behave: Callable[[socket.socket], None]
) -> None:
    path = tmp_path / "disk.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=lambda: behave(listener.accept()[0]))
        thread.start()
        with pytest.raises(HostError, match="not a control socket"):
            ask(path, "stats")
        thread.join()


def test_a_socket_of_another_kind_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "hypercall.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(HostError, match="not a control socket"):
            ask(path, "stats")


def test_all_that_a_reload_takes_is_in_the_help_and_in_the_unit() -> None:
    unit = (ROOT / "systemd/hyperbell.service").read_text()
    comment = unit[: unit.index("ExecReload=")].split("RestartSec")[0][-200:]
    for text in (SERVE_EPILOG, comment):
        for word in ("og level and format", "hypercall", "grew or shrank", "needs a restart"):
            assert word in text
