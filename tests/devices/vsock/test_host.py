"""The socket device's Unix sockets on the host: the files, and clients that say something else than CONNECT."""

from __future__ import annotations

import contextlib
import socket
import stat
from pathlib import Path

import pytest
import trio
import trio.testing
from kit.guest.vsock import VsockGuest, vsock

from virtio.errors import HostError
from virtio.testing import attach
from virtio.testing.queue import GUARD


@pytest.mark.parametrize(
    "command",
    [
        *(b"CONNECT\n", b"CONNECT -1\n", b"CONNECT 4294967296\n", b"CONNECT 1e3\n", b"CONNECT5\n", b"\n"),
        *(b"CONNECT 1_0\n", b"CONNECT ++5\n", b"CONNECT 0x50\n", b"5 CONNECT\n", b"CONNECT 5" + b"0" * 22 + b"\n"),
        *(b"GET / HTTP/1.1\r\n", b"CONNECT 5" + b" " * 40, b"\xff" * 64, "CONNECT \u0663\n".encode()),
        b"CONNECT 99999999999999999999\n",
    ],
    ids=repr,
)
async def test_a_client_that_says_something_else_is_let_go(command: bytes, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await client.connect(str(tmp_path / "vsock"))
        await client.send(command)
        with trio.fail_after(5):
            with contextlib.suppress(ConnectionResetError):  # where the rest of what it said was not read
                assert await client.recv(1) == b""
        client.close()
        await guest.silence()


@pytest.mark.parametrize(
    ("command", "port"),
    [
        (b"CONNECT 80\n", 80), (b"connect 80\n", 80), (b"cOnNeCt 80\n", 80), (b"CONNECT 80\r\n", 80),
        (b"CONNECT   80\n", 80), (b"CONNECT\t80\n", 80), (b"  CONNECT 80  \n", 80), (b"CONNECT +80\n", 80),
        (b"CONNECT 0080\n", 80), (b"CONNECT 80 and more\n", 80), ("CONNECT\u00a080\n".encode(), 80),
        (b"CONNECT 0\n", 0), (b"CONNECT 4294967295\n", 0xFFFF_FFFF), (b"CONNECT 00000000000000000000080\n", 80),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "in pieces"])
async def test_a_client_is_taken_as_firecracker_and_cloud_hypervisor_take_it(
    command: bytes, port: int, pieces: int, tmp_path: Path
) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        with trio.fail_after(GUARD), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            await client.connect(str(tmp_path / "vsock"))
            size = -(-len(command) // pieces)
            for start in range(0, len(command), size):
                await client.send(command[start : start + size])
                await trio.testing.wait_all_tasks_blocked()
            await client.send(b"what follows is the guest's")
            accepted = await guest.accept(port)
            assert await client.recv(64) == b"OK %d\n" % (1 << 30)
            assert await accepted.receive(27) == b"what follows is the guest's"


async def test_the_sockets_are_their_owners_only_and_gone_at_the_end(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)):
        for name in ("vsock", "vsock.seqpacket"):
            mode = (tmp_path / name).lstat().st_mode
            assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
    assert not any((tmp_path / name).exists() for name in ("vsock", "vsock.seqpacket"))


def test_a_path_in_use_is_one_clear_error_and_stays(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    with pytest.raises(HostError, match=r"/vsock: another process listens there"):
        vsock(tmp_path)
    assert (tmp_path / "vsock").is_socket()
    device.close()
    (tmp_path / "vsock.seqpacket").write_bytes(b"somebody's file")
    with pytest.raises(HostError, match=r"vsock\.seqpacket"):
        vsock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vsock.seqpacket"]


def test_sockets_that_a_daemon_left_behind_are_replaced(tmp_path: Path) -> None:
    for name, kind in (("vsock", socket.SOCK_STREAM), ("vsock.seqpacket", socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as left:
            left.bind(str(tmp_path / name))
    vsock(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_the_socket_of_another_program_that_came_later_is_not_removed(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    (tmp_path / "vsock").unlink()
    (tmp_path / "vsock").touch()
    device.close()
    assert [path.name for path in tmp_path.iterdir()] == ["vsock"]
