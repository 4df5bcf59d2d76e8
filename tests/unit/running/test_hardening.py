"""What the daemon gives up by itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.project import ROOT

from daemon.devices.classes import DeviceClassError, class_from_file
from daemon.running.hardening import KEPT

CONFIG = """
[daemon]
metrics = "off"
[devices.disk]
type = "blk"
backend = "null"
size = "1M"
socket = "{folder}/disk.sock"
"""
COMMAND = """
import pathlib
from daemon import cli
from daemon.running import app
async def run(self):
    print(pathlib.Path("/proc/self/status").read_text(), flush=True)
    print("owner", pathlib.Path("/proc/self/environ").stat().st_uid)
    libc = __import__("ctypes").CDLL(None)
    print("dumpable", libc.prctl(3, 0, 0, 0, 0))
app.App.run = run
cli.main(["serve", {file!r}])
"""


def python(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_daemon_cannot_be_dumped_gains_nothing_and_keeps_only_capabilities_that_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "hyperbell.toml"
    file.write_text(CONFIG.format(folder=tmp_path))
    lines = python(COMMAND.format(file=str(file))).splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    assert status["NoNewPrivs"].strip() == "1"
    assert "dumpable 0" in lines
    kept = sum(1 << number for number in KEPT)
    names = ["CapEff", "CapPrm", "CapInh"]
    has_setpcap = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) & 1 << 8
    if has_setpcap:  # who may change the bounding set
        names.append("CapBnd")
    for name in names:
        assert int(status[name], 16) & ~kept == 0, name


# The process of a user network

CONFINED = """
import errno, os, socket
from virtio._usernet import lib
assert lib.usernet_confine() == 0
{statement}
"""
FORBIDDEN = {
    "starting a program": "os.execv('/bin/true', ['true'])",
    "a process": "os.fork()",
    "writing a file": "os.open('{folder}/new', os.O_WRONLY | os.O_CREAT)",
    "changing a file": "os.open('{folder}/old', os.O_RDWR)",
    "a file without a name": "os.open('{folder}', os.O_TMPFILE | os.O_WRONLY)",
    "removing a file": "os.unlink('{folder}/old')",
    "a socket of this host": "socket.socket(socket.AF_UNIX)",
    "a raw socket of the kernel's": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "a socket of packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "signals to others": "os.kill(os.getppid(), 0)",
    "the memory of others": "os.pidfd_open(os.getppid())",
    "another root": "os.chroot('/')",
}
ALLOWED = {
    "reading a file": "open('{folder}/old').read()",
    "a connection": "s = socket.create_server(('127.0.0.1', 0)); "
    "c = socket.create_connection(s.getsockname()); c.send(b'x'); assert s.accept()[0].recv(1) == b'x'",
    "datagrams": "s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0)); s.sendto(b'', s.getsockname())",
    "memory": "bytearray(50 << 20)",
}
ON_X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter's list of calls is x86-64's")


@ON_X86
@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_process_that_is_confined_may_not(tmp_path: Path, what: str) -> None:
    (tmp_path / "old").touch()
    statement = FORBIDDEN[what].format(folder=tmp_path)
    text = f"try:\n    {statement}\nexcept OSError as error:\n    print(error.errno)"
    assert python(CONFINED.format(statement=text)).split() == [str(errno.EPERM)]


@ON_X86
@pytest.mark.parametrize("what", ALLOWED)
def test_a_process_that_is_confined_may(tmp_path: Path, what: str) -> None:
    (tmp_path / "old").write_text("text")
    python(CONFINED.format(statement=ALLOWED[what].format(folder=tmp_path)))


# Devices' files

DEVICE = """
from virtio import Device
class Mine(Device):
    virtio_id = 63
    type_name = "mine"
    async def handle(self, queue, chain):
        chain.complete()
"""


@pytest.mark.parametrize("where", ["file", "folder", "sticky folder"])
def test_run_as_root_a_device_file_that_everybody_may_write_is_refused(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    folder = tmp_path / "devices"
    folder.mkdir()
    file = folder / "mine.py"
    file.write_text(DEVICE)
    place, mode = {"file": (file, 0o666), "folder": (folder, 0o777), "sticky folder": (folder, 0o1777)}[where]
    place.chmod(mode)
    with pytest.raises(DeviceClassError, match=f"chmod o-w {place}"):
        class_from_file(file, "Mine")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert class_from_file(file, "Mine").type_name == "mine"


def test_run_as_root_a_device_file_that_only_its_owner_may_write_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    file = tmp_path / "mine.py"
    file.write_text(DEVICE)
    file.chmod(0o644)
    assert class_from_file(file, "Mine").type_name == "mine"
