"""The terminal this process was started in, lent to a guest: raw while the guest has it, as before whatever happens."""

from __future__ import annotations

import os
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

_OUTPUT_FLAGS: Final = 1  # where termios.tcgetattr has them


@contextmanager
def raw_terminal(fd: int) -> Iterator[bool]:
    """Every key goes to the guest, Ctrl-C too. Gives whether ``fd`` is a terminal; nothing is done to what is none."""
    try:
        before = termios.tcgetattr(fd)
    except (termios.error, ValueError):  # not a terminal, or closed
        yield False
        return
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        # A line that we log still begins at the left; the guest's own carriage returns do no harm.
        modes = termios.tcgetattr(fd)
        modes[_OUTPUT_FLAGS] = before[_OUTPUT_FLAGS]
        termios.tcsetattr(fd, termios.TCSADRAIN, modes)
        yield True
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def restorer(fd: int) -> Callable[[], None]:
    """Gives the terminal ``fd`` the modes that it has now, whatever became of them; for an end without ``finally``."""
    try:
        before = termios.tcgetattr(fd)
    except (termios.error, ValueError):  # not a terminal, or closed
        return lambda: None

    def restore() -> None:
        with suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)

    return restore


def terminal_size(fd: int) -> tuple[int, int]:
    """Columns and rows; zeroes when ``fd`` is no terminal."""
    try:
        size = os.get_terminal_size(fd)
    except (OSError, ValueError):
        return 0, 0
    return size.columns, size.lines
