"""How much memory this process needs for something."""

from __future__ import annotations

from pathlib import Path


class Peak:
    """The most resident memory since this was made, beyond what was in use then; in KiB."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high water mark
        self._before = _high_water_mark()

    @property
    def kib(self) -> int:
        return _high_water_mark() - self._before


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
