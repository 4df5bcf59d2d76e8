"""The listening socket's file: made, owned, replaced when stale, and never taken from somebody else."""

from __future__ import annotations

import grp
import os
import socket
import stat
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
import pytest

from transports.vhost_user.serving.endpoint import connect_unix, inherited_socket, is_listening
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.socket_file import Listen, SocketFile


def test_a_socket_is_made_and_removed_with_its_owner(tmp_path: Path) -> None:
    with wire.no_fd_leaks():
        path = tmp_path / "disk.sock"
        file = SocketFile(Listen(path))
        assert stat.S_ISSOCK(path.lstat().st_mode)
        connect_unix(path).close()
        file.close()
        assert not path.exists()
        file.close()  # twice does no harm


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_mode_is_the_configured_one_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    old = os.umask(0o077)
    try:
        file = SocketFile(Listen(tmp_path / "disk.sock", mode=mode))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "disk.sock").stat().st_mode) == mode
    file.close()


def test_the_group_is_the_configured_one(tmp_path: Path) -> None:
    group = grp.getgrgid(os.getgid() if os.getuid() else max(entry.gr_gid for entry in grp.getgrall()))
    file = SocketFile(Listen(tmp_path / "disk.sock", group=group.gr_name))
    assert (tmp_path / "disk.sock").stat().st_gid == group.gr_gid
    file.close()


def test_a_group_that_does_not_exist_is_named_and_nothing_is_made(tmp_path: Path) -> None:
    with wire.no_fd_leaks():
        with pytest.raises(HostError, match="group 'no-such-group' does not exist"):
            SocketFile(Listen(tmp_path / "disk.sock", group="no-such-group"))
        assert list(tmp_path.iterdir()) == []


def test_the_socket_file_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.listen()
    dead.close()
    file = SocketFile(Listen(path))
    connect_unix(path).close()
    file.close()


@pytest.mark.parametrize("listening", [True, False])
def test_the_socket_of_a_living_daemon_is_left_alone_and_unharmed(tmp_path: Path, listening: bool) -> None:
    with wire.no_fd_leaks():
        path = tmp_path / "disk.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.bind(str(path))
            if listening:
                other.listen()
                other.setblocking(False)
            with pytest.raises(HostError, match=r"disk\.sock: another process listens there"):
                SocketFile(Listen(path))
            if listening:
                with pytest.raises(BlockingIOError):
                    other.accept()  # it was not even disturbed by a connection
            assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_something_that_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.sock"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(HostError, match="exists and is no socket"):
        SocketFile(Listen(path))
    assert path.exists()


def test_a_socket_that_took_our_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    file = SocketFile(Listen(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as successor:
        successor.bind(str(path))
        file.close()
        assert path.exists()


def test_an_impossible_path_is_named(tmp_path: Path) -> None:
    with wire.no_fd_leaks():
        with pytest.raises(HostError, match=r"no-such-directory/disk\.sock: cannot listen there"):
            SocketFile(Listen(tmp_path / "no-such-directory" / "disk.sock"))
        with pytest.raises(HostError, match="at most 107 bytes"):
            SocketFile(Listen(Path("/tmp") / ("x" * 110)))


def test_an_inherited_descriptor_must_be_a_unix_stream_socket() -> None:
    with wire.no_fd_leaks():
        with pytest.raises(HostError, match="is no socket"):
            inherited_socket(OwnedFd(wire.eventfd()))
        with pytest.raises(HostError, match="no Unix stream socket"):
            inherited_socket(OwnedFd(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()))
        one, other = socket.socketpair()
        with inherited_socket(OwnedFd(one.detach())) as connected:
            assert not is_listening(connected)
        other.close()
