"""The terminal this process was started in, lent to a guest: raw while the guest has it, as before whatever happens."""

from __future__ import annotations

import os
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_OUTPUT_FLAGS: Final = 1  # where termios.tcgetattr has them


@contextmanager
def raw_terminal(fd: int) -> Iterator[Callable[[], None] | None]:
    """Every key goes to the guest, Ctrl-C too. Nothing is done to what is no terminal.

    Gives what makes the terminal as it was before, for an end that leaves no block; None: ``fd`` is no terminal.
    """
    try:
        before = termios.tcgetattr(fd)
    except (termios.error, ValueError):  # not a terminal, or closed
        yield None
        return

    def restore() -> None:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

    try:
        tty.setraw(fd, termios.TCSADRAIN)
        # A line that we log still begins at the left; the guest's own carriage returns do no harm.
        modes = termios.tcgetattr(fd)
        modes[_OUTPUT_FLAGS] = before[_OUTPUT_FLAGS]
        termios.tcsetattr(fd, termios.TCSADRAIN, modes)
        yield restore
    finally:
        restore()


def terminal_size(fd: int) -> tuple[int, int]:
    """Columns and rows; zeroes when ``fd`` is no terminal."""
    try:
        size = os.get_terminal_size(fd)
    except (OSError, ValueError):
        return 0, 0
    return size.columns, size.lines
