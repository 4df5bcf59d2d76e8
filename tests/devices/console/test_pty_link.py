"""After a daemon was killed its pty consoles start again, whoever has the old number by now."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from kit.front_end.vhost_user_wire import no_fd_leaks

from virtio.devices.console.device import Console, ConsoleOptions
from virtio.errors import HostError

_DAEMON: Final = """
import signal, sys
from pathlib import Path
from virtio.devices.console.device import Console, ConsoleOptions
consoles = [Console("c", ConsoleOptions(backend="pty", path=Path(path)), 1, 64) for path in sys.argv[1:]]
print(*(console._options.path.readlink() for console in consoles), flush=True)
signal.pause()
"""


def console(path: Path) -> Console:
    return Console("console", ConsoleOptions(backend="pty", path=path), 1, 64)


@contextmanager
def another_daemon(*paths: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process with a pty console at each of ``paths``, and the terminals behind them; killed at the end."""
    command = [sys.executable, "-c", _DAEMON, *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()
        finally:
            process.kill()


@pytest.fixture
def next_terminals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The terminals that the kernel will give the next two consoles, in this order."""
    pairs = [os.openpty() for _ in range(2)]
    names = [os.ttyname(theirs) for _, theirs in pairs]
    monkeypatch.setattr(os, "openpty", lambda: pairs.pop(0))
    return names


def test_the_new_terminal_may_have_the_number_of_the_killed_daemons(tmp_path: Path, next_terminals: list[str]) -> None:
    path = tmp_path / "tty"
    path.symlink_to(next_terminals[0])
    device, other = console(path), console(tmp_path / "other")
    assert str(path.readlink()) == next_terminals[0]
    device.close()
    other.close()
    assert not path.is_symlink()


def test_consoles_that_change_numbers_at_a_restart_do_not_find_each_other(
    tmp_path: Path, next_terminals: list[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.symlink_to(next_terminals[0])
    two.symlink_to(next_terminals[1])
    second, first = console(two), console(one)  # the link of `one` led to the new terminal of `two`
    assert [str(two.readlink()), str(one.readlink())] == next_terminals
    first.close()
    second.close()
    assert not one.is_symlink()
    assert not two.is_symlink()


def test_the_link_of_a_daemon_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "tty"
    with another_daemon(path) as (process, _):
        process.kill()
        process.wait()
        assert path.is_symlink()
        device = console(path)
    assert Path(os.path.realpath(path)).is_char_device()
    device.close()


def test_another_daemon_that_has_the_old_number_for_another_path_is_not_taken_for_this_one(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    with another_daemon(others) as (_, (target,)):
        ours.symlink_to(target)
        device = console(ours)
        assert str(ours.readlink()) != target
        assert str(others.readlink()) == target
        device.close()


def test_a_reader_that_locks_the_terminal_is_no_daemon(tmp_path: Path) -> None:
    path = tmp_path / "tty"
    ours, theirs = os.openpty()
    path.symlink_to(os.ttyname(theirs))
    reader = [sys.executable, "-c", "import fcntl, sys; fcntl.flock(0, fcntl.LOCK_EX); print(flush=True); input()"]
    with subprocess.Popen(reader, stdin=theirs, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            console(path).close()
        finally:
            process.kill()
    os.close(ours)
    os.close(theirs)


def test_a_daemon_that_runs_keeps_its_path_by_whatever_name_its_folder_goes(tmp_path: Path) -> None:
    folder, alias = tmp_path / "folder", tmp_path / "alias"
    folder.mkdir()
    alias.symlink_to(folder)
    with another_daemon(folder / "tty") as (_, (target,)):
        for path in (folder / "tty", alias / "tty", folder / ".." / "folder" / "tty"):
            with no_fd_leaks(), pytest.raises(HostError, match="another device or daemon is using it"):
                console(path)
        assert str((folder / "tty").readlink()) == target
