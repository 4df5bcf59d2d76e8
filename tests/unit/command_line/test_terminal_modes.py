"""The terminal lent to a guest comes back as it was."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Iterator

import pytest

from daemon.microvm.terminal import raw_terminal, terminal_size


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = os.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


def test_a_terminal_is_raw_inside_and_as_before_outside(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    with raw_terminal(terminal) as is_terminal:
        assert is_terminal
        inside = termios.tcgetattr(terminal)
        assert not inside[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        assert inside[1] & termios.OPOST  # lines of our log still begin at the left
    assert termios.tcgetattr(terminal) == before


def test_a_terminal_comes_back_also_after_a_mistake(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    with pytest.raises(ZeroDivisionError), raw_terminal(terminal):
        raise ZeroDivisionError
    assert termios.tcgetattr(terminal) == before


def test_what_is_no_terminal_is_left_alone() -> None:
    reading, writing = os.pipe()
    with raw_terminal(reading) as is_terminal:
        assert not is_terminal
    os.close(reading)
    with raw_terminal(reading) as is_terminal:  # closed
        assert not is_terminal
    assert terminal_size(writing) == (0, 0)
    os.close(writing)


def test_a_terminal_has_a_size(terminal: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 43, 132, 0, 0))
    assert terminal_size(terminal) == (132, 43)
