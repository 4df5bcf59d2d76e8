"""Stock QEMU on this machine's KVM with the library, as ``hyperbell qemu`` starts it. Its guest stays paused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from kit.kvm.process import GUARD, Listener

from transports.stock_qemu.library import library_path
from transports.stock_qemu.messages import Reason, Type, VmFlag

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
HYPERBELL: Final = (sys.executable, "-m", "daemon.cli", "qemu")
PAUSED: Final = ("-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-S")


class Qemu:
    """One QEMU; ``execute`` speaks QMP with it."""

    def __init__(self, folder: Path, *options: str, launcher: tuple[str, ...] = (), background: bool = False) -> None:
        program = shutil.which("qemu-system-x86_64")
        assert program is not None, "no qemu-system-x86_64 here: apt-get install qemu-system-x86"
        command = (program, *PAUSED, "-qmp", f"unix:{folder / 'qmp.sock'}")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(GUARD)
            listener.bind(str(folder / "qmp.sock"))
            listener.listen(1)
            self.output = (folder / "output").open("wb")
            self.process = subprocess.Popen(
                [*HYPERBELL, "--socket", folder / "hypercall.sock", *launcher, "--", *command, *options],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
            )
            try:
                self.connection, _ = listener.accept()
            except TimeoutError:
                self.process.kill()
                pytest.fail((folder / "output").read_text())
        self.connection.settimeout(GUARD)
        self._lines = self.connection.makefile("r", encoding="utf-8")
        assert "QMP" in json.loads(self._lines.readline())
        self.execute("qmp_capabilities")
        if background:
            assert self.process.wait(GUARD) == 0

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """QEMU ends when it is told to, in the background too."""
        if self.output.closed:
            return
        try:
            self.execute("quit")
            self.process.wait(GUARD)
        finally:
            self._lines.close()
            self.connection.close()
            self.output.close()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


Start = Callable[..., Qemu]


@pytest.fixture
def start(tmp_path: Path, kvm: None) -> Iterator[Start]:
    """Start a QEMU; it is ended with the test."""
    with ExitStack() as stack:

        def run(*options: str, launcher: tuple[str, ...] = (), background: bool = False) -> Qemu:
            qemu = Qemu(tmp_path, *options, launcher=launcher, background=background)
            stack.callback(qemu.close)
            return qemu

        yield run


@pytest.fixture
def listener(tmp_path: Path, kvm: None) -> Iterator[Listener]:
    with Listener(tmp_path / "hypercall.sock") as listener:
        yield listener


def test_qemu_with_every_denial_of_its_sandbox_reports_its_vm_and_its_vcpus(
    tmp_path: Path, listener: Listener, start: Start
) -> None:
    qemu = start("-smp", "2", "-sandbox", SANDBOX, launcher=("--name", "web1"))
    peer = listener.accept()
    message = peer.receive()
    assert (message.type, message.name) == (Type.VM, "web1")
    assert [peer.expect(Type.VCPU).vcpu for _ in range(2)] == [0, 1]
    qemu.close()
    while peer.socket.recv(100):
        pass


def test_the_reason_why_there_are_no_ids_is_reported(tmp_path: Path, listener: Listener, start: Start) -> None:
    """Whichever this machine's KVM has: no capability, or none of Hyper-V's leaves for such a guest."""
    qemu = start()
    peer = listener.accept()
    message = peer.expect(Type.VM)
    while VmFlag.CPUID_SEEN not in VmFlag(message.flags):
        message = peer.expect(Type.VM)
    assert message.result in (Reason.NO_CAPABILITY, Reason.NO_HYPERV)
    assert VmFlag.KEY_SHOWN not in VmFlag(message.flags)
    qemu.close()
    assert "its plain doorbells serve" in (tmp_path / "output").read_text()


def test_a_vcpu_that_is_plugged_in_later_is_reported(listener: Listener, start: Start) -> None:
    qemu = start("-M", "pc", "-cpu", "qemu64", "-smp", "1,maxcpus=2", "-sandbox", SANDBOX)
    peer = listener.accept()
    assert peer.expect(Type.VCPU).vcpu == 0
    qemu.execute("device_add", driver="qemu64-x86_64-cpu", id="later", **{"socket-id": 0, "core-id": 1, "thread-id": 0})
    assert peer.expect(Type.VCPU).vcpu == 1
    qemu.close()


def test_a_qemu_that_goes_into_the_background_reports_from_there(
    tmp_path: Path, listener: Listener, start: Start
) -> None:
    pid_file = tmp_path / "pid"
    qemu = start("-daemonize", "-pidfile", str(pid_file), background=True)
    peer = listener.accept()
    assert peer.receive().type == Type.VM
    credentials = peer.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    assert int.from_bytes(credentials[:4], sys.byteorder) == int(pid_file.read_text())
    qemu.close()
    while peer.socket.recv(100):
        pass


def test_a_daemon_that_is_started_anew_hears_everything_anew(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "hypercall.sock"
    with Listener(path) as listener:
        qemu = start("-smp", "2", "-sandbox", SANDBOX)
        peer = listener.accept()
        assert [peer.expect(Type.VCPU).vcpu for _ in range(2)] == [0, 1]
    assert not qemu.execute("query-status")["running"]
    with Listener(path) as listener:
        peer = listener.accept()
        assert peer.receive().type == Type.VM
        assert [peer.expect(Type.VCPU).vcpu for _ in range(2)] == [0, 1]
        qemu.close()


def test_a_qemu_without_a_daemon_starts_and_answers(start: Start) -> None:
    qemu = start("-sandbox", SANDBOX)
    assert not qemu.execute("query-status")["running"]
    qemu.close()


def test_what_qemu_starts_is_not_preloaded(tmp_path: Path, listener: Listener, start: Start) -> None:
    maps = tmp_path / "maps"
    os.mkfifo(maps)
    qemu = start("-incoming", f"exec:cat /proc/self/maps > {maps}; cat")
    text = maps.read_text()
    assert "libc" in text
    assert library_path().name not in text
    assert VmFlag.INCOMING in VmFlag(listener.accept().receive().flags)
    qemu.close()
