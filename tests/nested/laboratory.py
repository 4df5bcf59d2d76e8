"""H for a whole session of tests: booted when the first test wants it, and again after a test that lost it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from guest.debian.kernel import prepare_kernel
from guest.nested.host import Host
from guest.nested.images import Images, prepare_images
from guest.nested.level import Level

T = TypeVar("T")


class Laboratory:
    """The images, and the H that runs now. Consoles are kept in ``folder``, one subfolder for each boot of H."""

    def __init__(self, images: Images | None = None, devices: Sequence[str] = (), name: str = "H") -> None:
        """Raises ``PrepareError`` if this machine cannot make the images.

        ``images`` are others than those of every day, ``devices`` further arguments of H's QEMU; ``name`` tells its
        consoles from those of another H.
        """
        self.images = images or prepare_images(prepare_kernel(print), print)
        self.folder = Path(os.environ.get("HYPERBELL_NESTED_LOGS") or tempfile.mkdtemp(prefix="hyperbell-nested-"))
        self._devices = devices
        self._name = name
        self._host: Host | None = None
        self._boots = 0

    @asynccontextmanager
    async def host(self) -> AsyncIterator[Level]:
        """H, up."""
        if self._host is None or not self._host.runs:
            self.end()
            self._boots += 1
            folder = self.folder / f"{self._name}{self._boots}"
            folder.mkdir(parents=True)
            self._host = Host(self.images, folder, self._devices)
        async with self._host.level() as level:
            yield level

    def play(self, scenario: Callable[[Level], Awaitable[T]]) -> T:
        """Run ``scenario`` on H outside of any test: for fixtures that record what several tests then look at."""

        async def main() -> T:
            async with self.host() as host:
                return await scenario(host)

        return trio.run(main)

    @contextmanager
    def for_session(self, session: pytest.Session) -> Iterator[None]:
        """Afterwards H is ended, and its consoles are removed unless a test has failed."""
        try:
            yield
        finally:
            self.end()
            if session.testsfailed:
                print(f"\nthe consoles of the nested guests are in {self.folder}")
            else:
                self.forget()

    def end(self) -> None:
        """End H."""
        if self._host is not None:
            self._host.end()
            self._host = None

    def forget(self) -> None:
        """Remove the consoles."""
        if "HYPERBELL_NESTED_LOGS" not in os.environ:
            shutil.rmtree(self.folder, ignore_errors=True)
