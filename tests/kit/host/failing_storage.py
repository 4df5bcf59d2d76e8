"""The test's side of ``fuse_disk.py``: an image whose storage fails, fills up, shrinks or hangs when told to."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio

SERVER: Final = Path(__file__).with_name("fuse_disk.py")


class FailingImage:
    """The file at ``path``. Commands return once they are in effect; nothing of them touches the file."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self.path = folder / "disk.img"

    def _ask(self, command: Mapping[str, Any]) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer

    async def ask(self, **command: Any) -> dict[str, int]:
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(partial(self._ask, command), abandon_on_cancel=True)

    async def fail(self, **errors: int) -> None:
        """These operations (read, write, fsync, ...) fail with these errnos from now on, all others succeed."""
        await self.ask(fail=errors)

    async def hang(self, *operations: str) -> None:
        """These operations get no answer any more; all others, and those that wait, do."""
        await self.ask(hang=operations)

    async def hung(self, operation: str, count: int = 1) -> None:
        """Wait until so many of that operation hang."""
        await self.ask(wait=[operation, count])

    async def resize(self, size: int) -> None:
        await self.ask(size=size)

    async def counts(self) -> Mapping[str, int]:
        """How often each operation came."""
        return await self.ask(counts=True)


@contextlib.asynccontextmanager
async def failing_image(size: int = 1 << 20, *options: str) -> AsyncIterator[FailingImage]:
    """``options``: "writeback" (the kernel writes dirty pages later), "direct" (nothing is cached)."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as folder:
        process = start_server(Path(folder), size, options)
        try:
            yield FailingImage(process, Path(folder))
        finally:
            process.communicate(timeout=30)


def start_server(folder: Path, size: int, options: Sequence[str]) -> subprocess.Popen[str]:
    """The process with its file system mounted at ``folder``; skips where this machine does not let us."""
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no FUSE (/dev/fuse)")
    process = subprocess.Popen(
        [sys.executable, SERVER, folder, str(size), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    answer = json.loads(process.stdout.readline())
    if "error" in answer:
        process.communicate()
        pytest.skip(f"this user may not mount a file system: {answer['error']}")
    return process
