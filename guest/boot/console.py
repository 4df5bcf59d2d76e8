"""A guest's console that takes commands and answers with results: the host's half of ``guest/programs/init``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

BOOTED: Counter[str] = Counter()
"""How often a guest of each kind said in this process that its userspace runs."""

TAIL_LINES = 25
READY_SECONDS = 60.0


class MachineError(Exception):
    """The guest did not do what it was asked. ``tail`` is the end of its console, for the reader of the error."""

    def __init__(self, message: str, tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.tail = list(tail)

    def __str__(self) -> str:
        if not self.tail:
            return str(self.args[0])
        return "\n  | ".join([f"{self.args[0]}\nthe end of the guest's console:", *self.tail])


@dataclass(frozen=True)
class ConsoleLine:
    """One line of the console; ``seconds`` since QEMU was started."""

    seconds: float
    text: str


Listener = Callable[[ConsoleLine], None]


@dataclass(frozen=True)
class Answer:
    """What a command in the guest said: its exit status, its ``RESULT key=value`` lines, and all its lines."""

    status: int
    results: dict[str, str]
    lines: list[str]


class Console(ABC):
    """The console of a booted guest. One task at a time talks to it; it is read while somebody waits for it."""

    patience: float = 1  # how many times longer than it was told it waits
    kind: str = "QEMU"  # what runs the machine; a name in BOOTED

    def __init__(self, listen: Listener) -> None:
        self.console: list[ConsoleLine] = []
        self._listen = listen
        self._started = trio.current_time()
        self._partial = b""
        self._seen = 0  # console lines already examined by expect()
        self._commands = 0

    @abstractmethod
    async def _receive(self) -> bytes:
        """More of what the guest says; ``b""`` at the end."""

    @abstractmethod
    async def _transmit(self, data: bytes) -> None:
        """Let the guest read ``data``. ``MachineError`` if nobody is there."""

    @abstractmethod
    async def _why_ended(self) -> str:
        """Completes "... while we waited": what became of a machine whose console ended."""

    async def run(self, command: str, *, status: int | None = 0, timeout_seconds: float = 30) -> Answer:
        """Run a shell command line in the guest. ``MachineError`` if late or if the status is another (None: any)."""
        self._commands += 1
        mark = f"GUEST exit {self._commands} "
        begin = len(self.console)
        await self._transmit(f"{self._commands} {command}\n".encode())
        text = await self.expect(mark, timeout_seconds, f"the end of '{command}'")
        lines = [line.text for line in self.console[begin : self._seen - 1]]
        answer = Answer(int(text.removeprefix(mark)), results_of(lines), lines)
        if status is not None and answer.status != status:
            said = "; ".join(f"{key}: {value}" for key, value in answer.results.items() if key.endswith("error"))
            raise MachineError(
                f"'{command}' ended with status {answer.status}, not {status}{said and ': ' + said}", self.tail()
            )
        return answer

    async def expect(self, start: str, timeout_seconds: float, what: str = "") -> str:
        """The next console line that begins with ``start``, not looking twice at any line. ``MachineError`` if late."""
        what = what or f"'{start}'"
        with trio.move_on_after(timeout_seconds * self.patience):
            while True:
                while self._seen < len(self.console):
                    text = self.console[self._seen].text
                    self._seen += 1
                    if text.startswith(start):
                        return text
                    self._examine(text, what)
                if not await self._read():
                    raise MachineError(f"{await self._why_ended()} while we waited for {what}", self.tail())
        raise self._late(f"the guest did not come to {what} within {timeout_seconds * self.patience:.0f} s")

    async def expect_userspace(self, timeout_seconds: float) -> None:
        """Wait for init's first word, before it loads any driver of ours."""
        await self.expect("GUEST userspace", timeout_seconds, "its userspace")
        BOOTED[self.kind] += 1

    async def expect_ready(self) -> None:
        """Wait until init has loaded the drivers and takes commands."""
        await self.expect("GUEST ready", READY_SECONDS, "the end of its init")

    def tail(self) -> list[str]:
        """The last lines of the console."""
        return [f"{line.seconds:7.2f}  {line.text}" for line in self.console[-TAIL_LINES:]]

    def _examine(self, text: str, what: str) -> None:
        """Look at a line that is not the one waited for; raises ``MachineError`` if there is nothing to wait for."""
        if "Kernel panic" in text:
            raise MachineError(f"the guest's kernel panicked while we waited for {what}", self.tail())

    def _late(self, message: str) -> MachineError:
        return MachineError(message, self.tail())

    async def _read(self) -> bool:
        """Wait for more of the console; False at its end."""
        data = await self._receive()
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data and self._partial:
            lines, self._partial = [self._partial], b""
        seconds = trio.current_time() - self._started
        for text in (line.decode(errors="replace").strip("\r") for line in lines):
            if text:
                self.console.append(ConsoleLine(seconds, text))
                self._listen(self.console[-1])
        return bool(data)


def results_of(lines: Iterable[str]) -> dict[str, str]:
    """The ``RESULT key=value`` lines among ``lines``, as a dict; a later value of a key wins."""
    pairs = (line.removeprefix("RESULT ").partition("=") for line in lines if line.startswith("RESULT "))
    return {key: value for key, _, value in pairs}
