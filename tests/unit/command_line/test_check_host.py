"""``hyperbell check`` sees what ``serve`` would refuse on this host, and names the key and the remedy."""

from __future__ import annotations

import errno
import os
import pwd
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from kit.project import ROOT

from daemon.cli import main
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.errors import HostError

MIB: Final = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, *lines: str, daemon: str = 'metrics = "off"') -> Path:
    """A configuration with one disk whose further keys these are."""
    text = [f"[daemon]\n{daemon}", '[devices.disk]\ntype = "blk"', f'socket = "{folder}/disk.sock"', *lines]
    file = folder / "hyperbell.toml"
    file.write_text("\n".join(text) + "\n")
    return file


def check(file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["check", str(file)])
    return status, capsys.readouterr().err


def image(folder: Path, content: bytes, size: int = MIB) -> Path:
    path = folder / "disk.img"
    path.write_bytes(content)
    os.truncate(path, size)
    return path


# --- what can be no image ---


def directory(folder: Path) -> Path:
    (folder / "images").mkdir()
    return folder / "images"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def unix_socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "sock"))
    return folder / "sock"


KINDS: Final[dict[str, Callable[[Path], Path]]] = {
    "is a directory": directory,
    "is a FIFO": fifo,
    "is a socket": unix_socket,
    "is a character device": lambda folder: Path("/dev/null"),
    "is empty": lambda folder: image(folder, b"", 0),
    "no multiple of block_size = 512": lambda folder: image(folder, b"", 1_000_300),
}


@pytest.mark.parametrize("what", KINDS)
def test_what_can_be_no_image_is_refused_by_check_as_by_the_device(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = KINDS[what](folder)
    status, text = check(write(folder, f'path = "{path}"'), capsys)
    assert status == 78
    assert f"[devices.disk] path: {path}" in text
    assert what in text
    with pytest.raises(HostError):
        Blk("disk", BlkOptions(path=path), 1, 64)


def test_an_image_of_no_whole_blocks_names_the_keys_that_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = image(folder, b"", 1_000_300)
    text = check(write(folder, f'path = "{path}"'), capsys)[1]
    assert 'tail = "extend"' in text
    assert 'tail = "cut"' in text
    assert check(write(folder, f'path = "{path}"', 'tail = "cut"'), capsys)[0] == 0
    assert path.stat().st_size == 1_000_300  # check changes nothing
    assert check(write(folder, f'path = "{path}"', 'tail = "extend"'), capsys)[0] == 0
    assert path.stat().st_size == 1_000_300


def test_direct_io_that_the_file_system_has_not_is_refused_at_its_key(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(folder, b"")

    def refuse(fd: object) -> tuple[int, int]:
        raise HostError("no", errno=errno.EINVAL)

    monkeypatch.setattr("daemon.checks.images.direct_alignment", refuse)
    status, text = check(write(folder, f'path = "{path}"', "direct = true"), capsys)
    assert (status, "[devices.disk] direct: " in text) == (78, True)


# --- what is no raw disk: a note, and never a guess ---


def mbr(start: int, count: int, kind: int = 0x83) -> bytes:
    entry = struct.pack("<B3sB3sII", 0, b"", kind, b"", start, count)
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


def gpt(unit: int, last: int) -> bytes:
    return bytes(unit) + b"EFI PART".ljust(32, b"\0") + struct.pack("<Q", last)


LOOKS = {
    "qcow2": (b"QFI\xfb\0\0\0\3", "qemu-img convert -f qcow2"),
    "vmdk": (b"KDMV", "qemu-img convert -f vmdk"),
    "vhdx": (b"vhdxfile", "qemu-img convert -f vhdx"),
    "vhd": (b"conectix", "qemu-img convert -f vpc"),
    "luks": (b"LUKS\xba\xbe\0\2", "cryptsetup"),
    "ISO": (bytes(0x8001) + b"CD001", "read_only = true"),
    "compressed (zstd)": (b"\x28\xb5\x2f\xfd", "unzstd"),
    "shorter than its partition table": (mbr(2048, 4096), "cut off"),
    "counts in blocks of 4096": (gpt(4096, 255), "set block_size = 4096"),
    f"shorter than its partition table says: {4096 * 512}": (gpt(512, 4095), "cut off"),
}


@pytest.mark.parametrize("what", LOOKS)
def test_what_looks_like_something_else_than_a_raw_disk_is_noted_and_served(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, hint = LOOKS[what]
    path = image(folder, content)
    status, text = check(write(folder, f'path = "{path}"'), capsys)
    assert status == 0
    assert f"note: {folder}/hyperbell.toml:" in text
    assert what in text
    assert hint in text
    disk = Blk("disk", BlkOptions(path=path), 1, 64)
    assert int.from_bytes(disk.config_space()[:8], "little") == MIB // 512
    disk.close()


@pytest.mark.parametrize(
    "content", [b"", mbr(64, 1024), gpt(512, 2047), mbr(1, 0xFFFF_FFFF, 0xEE), b"\xeb\x3c" + mbr(1, 1)[2:]]
)
def test_an_ordinary_image_is_no_note(content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(write(folder, f'path = "{image(folder, content)}"'), capsys) == (0, "")


# --- sockets, ports, interfaces, memory ---


def test_a_file_where_a_socket_is_to_be_made_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "disk.sock").write_text("precious")
    file = write(folder, 'backend = "null"\nsize = "1M"')
    status, text = check(file, capsys)
    assert status == 78
    assert f"[devices.disk] socket: {folder}/disk.sock exists and is no socket" in text


MADE: Final = {  # what is made at PATH, by which key of which device
    "control": ("socket", "pins", 'type = "gpio"\nlines = ["a"]\ncontrol = "PATH"'),
    "path": ("socket", "tty", 'type = "console"\nbackend = "socket"\npath = "PATH"'),
    "ports.0.path": ("socket", "tty", 'type = "console"\nports = [{ name = "a", backend = "socket", path = "PATH" }]'),
    "local": ("socket", "net", 'type = "net"\nbackend = "socket"\nlocal = "unix:PATH"'),
    "path of a terminal": ("link", "tty", 'type = "console"\nbackend = "pty"\npath = "PATH"'),
}


@pytest.mark.parametrize("key", MADE)
def test_a_file_where_a_device_makes_a_socket_or_a_link_is_refused(
    key: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what, name, keys = MADE[key]
    (folder / "taken").write_text("precious")
    file = folder / "hyperbell.toml"
    table = f'[devices.{name}]\nsocket = "{folder}/x.sock"\n{keys}\n'.replace("PATH", f"{folder}/taken")
    file.write_text(f'[daemon]\nmetrics = "off"\n{table}')
    status, text = check(file, capsys)
    assert status == 78
    assert f"[devices.{name}] {key.split()[0]}: {folder}/taken exists and is no {what}" in text


def test_the_file_of_an_eeprom_that_has_another_size_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "eeprom").write_bytes(bytes(300))
    file = folder / "hyperbell.toml"
    chip = f'{{ kind = "eeprom", address = 0x50, path = "{folder}/eeprom" }}'
    file.write_text(
        f'[daemon]\nmetrics = "off"\n[devices.bus]\ntype = "i2c"\nsocket = "{folder}/b.sock"\nchips = [{chip}]\n'
    )
    status, text = check(file, capsys)
    assert status == 78
    assert f"[devices.bus] chips.0.path: {folder}/eeprom: it has 300 bytes, and the chip 256 (size)" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes loop devices")
def test_a_block_device_that_takes_no_writes_is_refused_by_check_as_by_the_device(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", str(image(folder, b""))],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"this machine has no loop devices: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    try:
        status, text = check(write(folder, f'path = "{path}"'), capsys)
        assert status == 78
        assert f"[devices.disk] path: {path}: the block device is read-only" in text
        with pytest.raises(HostError, match="set read_only = true"):
            Blk("disk", BlkOptions(path=path), 1, 64)
        assert check(write(folder, f'path = "{path}"', "read_only = true"), capsys)[0] == 0
        Blk("disk", BlkOptions(path=path, read_only=True), 1, 64).close()
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


def test_ports_of_network_interfaces_that_are_in_use_are_noted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as stream,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram,
    ):
        datagram.bind(("127.0.0.1", 0))
        ports = stream.getsockname()[1], datagram.getsockname()[1]
        file = folder / "hyperbell.toml"
        net = '[devices.{0}]\ntype = "net"\nsocket = "{1}/{0}.sock"\nbackend = '
        tables = net.format("a", folder) + f'"user"\nforwards = ["tcp:127.0.0.1:{ports[0]}:22"]\n'
        tables += net.format("b", folder) + f'"socket"\nlocal = "tcp:127.0.0.1:{ports[0]}"\n'
        tables += net.format("c", folder)
        tables += f'"socket"\nlocal = "udp:127.0.0.1:{ports[1]}"\nremote = "udp:127.0.0.1:9"\n'
        file.write_text(f'[daemon]\nmetrics = "off"\n{tables}')
        status, text = check(file, capsys)
    assert status == 0
    for key, port in (("a] forwards.0", ports[0]), ("b] local", ports[0]), ("c] local", ports[1])):
        assert f"[devices.{key}: 127.0.0.1:{port}: Address already in use" in text


def test_a_socket_and_a_port_that_are_in_use_are_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as path, socket.create_server(("127.0.0.1", 0)) as port:
        path.bind(str(folder / "disk.sock"))
        path.listen()
        taken = f"127.0.0.1:{port.getsockname()[1]}"
        file = write(folder, 'backend = "null"\nsize = "1M"', daemon=f'metrics = "{taken}"')
        status, text = check(file, capsys)
    assert status == 0
    assert f"[daemon] metrics: {taken}: Address already in use" in text
    assert f"[devices.disk] socket: {folder}/disk.sock is in use" in text


def test_interfaces_that_are_missing_or_of_another_kind_are_noted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "hyperbell.toml"
    net = '[devices.{0}]\ntype = "net"\nbackend = "tap"\nsocket = "{1}/{0}.sock"\ntap = "{2}"\nbridge = "{3}"\n'
    tables = net.format("a", folder, "lo", "nosuchbr0") + net.format("b", folder, "nosuchtap0", "lo")
    file.write_text('[daemon]\nmetrics = "off"\n' + tables)
    status, text = check(file, capsys)
    assert status == 0
    assert '[devices.a] tap: "lo" is an interface, but no tap' in text
    assert '[devices.a] bridge: this host has no interface "nosuchbr0"' in text
    assert '[devices.b] bridge: "lo" is an interface, but no bridge' in text


def test_a_memory_disk_beyond_the_host_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = check(write(folder, 'backend = "memory"', 'size = "64T"'), capsys)
    assert status == 0
    assert "[devices.disk] size: is more than the memory of this host" in text


def test_a_memory_disk_that_cannot_be_had_names_the_key() -> None:
    with pytest.raises(HostError, match=r"size: a disk in memory of \d+ bytes cannot be had here .*; lower size"):
        Blk("disk", BlkOptions(backend="memory", size=1 << 50), 1, 64)
    with pytest.raises(ValueError, match="less than or equal to"):
        BlkOptions(backend="null", size=1 << 63)


def test_a_device_node_of_another_kind_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "chip").touch()
    file = folder / "hyperbell.toml"
    table = f'[devices.pins]\ntype = "gpio"\nbackend = "chip"\nsocket = "{folder}/pins.sock"\nlines = ["a"]\n'
    table += f'chip = "{folder}/chip"\n'
    file.write_text(f'[daemon]\nmetrics = "off"\n{table}')
    status, text = check(file, capsys)
    assert status == 0, text
    assert f"[devices.pins] chip: {folder}/chip is no character device" in text


# --- as the service's user ---


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def check_as(user: str, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "daemon.cli", "check", "--user", user, str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
def test_what_the_services_user_may_not_open_is_refused(open_folder: Path) -> None:
    path = image(open_folder, b"")
    path.chmod(0o600)
    file = write(open_folder, f'path = "{path}"')
    file.chmod(0o644)
    result = check_as("nobody", file)
    assert result.returncode == 78, result.stderr
    assert f"[devices.disk] path: {path}: Permission denied, by this user" in result.stderr
    assert "set read_only = true" in result.stderr
    assert f"[devices.disk] socket: in the folder {open_folder} this user may make nothing" in result.stderr
    path.chmod(0o666)
    open_folder.chmod(0o777)
    assert check_as("nobody", file).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
def test_whatever_the_services_user_may_not_use_is_refused(open_folder: Path) -> None:
    eeprom, tftp = open_folder / "eeprom", open_folder / "tftp"
    eeprom.write_bytes(bytes(256))
    eeprom.chmod(0o600)
    tftp.mkdir(mode=0o700)
    file = open_folder / "hyperbell.toml"
    file.write_text(f"""
[daemon]
metrics = "off"
[devices.bus]
type = "i2c"
socket = "/tmp/bus.sock"
chips = [{{ kind = "eeprom", address = 0x50, path = "{eeprom}" }}]
[devices.net]
type = "net"
backend = "user"
socket = "/tmp/net.sock"
tftp = "{tftp}"
[devices.disk]
type = "blk"
backend = "null"
size = "1M"
socket = "/etc/disk.sock"
""")
    result = check_as("nobody", file)
    assert result.returncode == 78
    assert f"[devices.bus] chips.0.path: {eeprom} may not be read and written by this user" in result.stderr
    assert f"[devices.net] tftp: {tftp} may not be read by this user" in result.stderr
    assert "[devices.disk] socket: in the folder /etc this user may make nothing" in result.stderr


def test_looking_as_another_user_takes_root_and_a_user_that_exists(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(folder, 'backend = "null"\nsize = "1M"')
    assert main(["check", "--user", "no-such-user", str(file)]) == 1
    assert 'there is no user "no-such-user"' in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    other = pwd.getpwuid(0).pw_name
    assert main(["check", "--user", other, str(file)]) == 1
    assert "needs root: sudo hyperbell check --user" in capsys.readouterr().err
