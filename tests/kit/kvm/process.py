"""Programs with the library preloaded, and the daemon's end of its socket in the tests' hands."""

from __future__ import annotations

import array
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from transports.stock_qemu.library import library_path
from transports.stock_qemu.messages import Message, Type, parse_message
from virtio.fd import OwnedFd

GUARD: Final = 30.0  # seconds; only a failing run gets there
CHILD: Final = Path(__file__).with_name("child.py")


class KvmProcess:
    """``child.py`` with the library (and, beneath it, ``fake``); methods of it are called by their names."""

    def __init__(
        self,
        variables: Mapping[str, str],
        fake: Path | None = None,
        arguments: Sequence[str] = (),
        preload: str | None = None,
    ) -> None:
        entries = [str(library_path()), *([str(fake)] if fake else [])]
        environment = {**os.environ, "LD_PRELOAD": preload or ":".join(entries), **variables}
        if fake is not None:
            environment["FAKE"] = str(fake)
        self.process: Final = subprocess.Popen(
            [sys.executable, "-S", CHILD, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps([name, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            assert line, f"the program ended: {self.process.communicate()[1]}"
            answer = json.loads(line)
            if "error" in answer:
                raise OSError(answer["error"])
            return answer["value"]

        return call

    def end(self) -> str:
        """Let it end by itself; what it wrote to stderr."""
        _, complaints = self.process.communicate(timeout=GUARD)
        assert self.process.returncode == 0, complaints
        return complaints

    def __enter__(self) -> KvmProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


class Peer:
    """The daemon's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.fds: list[OwnedFd] = []

    def receive(self) -> Message:
        """The next message; what came with it is in ``fds`` from then on."""
        data, ancillary, _, _ = self.socket.recvmsg(100, 1000, socket.MSG_CMSG_CLOEXEC)
        assert data, "the library has closed the connection"
        numbers = array.array("i")
        for _, _, content in ancillary:
            numbers.frombytes(content)
        self.fds = [OwnedFd(number) for number in numbers]
        return parse_message(data, len(self.fds))

    def expect(self, wanted: Type) -> Message:
        """The next message of that kind; those before it must be of others."""
        while True:
            message = self.receive()
            if message.type == wanted:
                return message

    def is_silent(self) -> bool:
        """Whether nothing has come that was not received."""
        return not select.select([self.socket], [], [], 0)[0]

    def send(self, message: Message) -> None:
        self.socket.send(message.build())

    def order(self, kind: Type, bell: Message) -> Message:
        """Have ``bell`` registered or withdrawn; the answer."""
        self.send(Message(kind, bell=bell.bell, serial=bell.serial))
        return self.expect(Type.ANSWER)

    def close(self) -> None:
        self.socket.close()
        self.fds = []


class Listener:
    """The daemon's socket at ``path``; the file is removed at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(GUARD)
        self.socket.bind(str(path))
        self.socket.listen(4)
        self._peers: list[Peer] = []

    def accept(self) -> Peer:
        sock, _ = self.socket.accept()
        sock.settimeout(GUARD)
        peer = Peer(sock)
        self._peers.append(peer)
        return peer

    def close(self) -> None:
        """As a daemon ends."""
        for peer in self._peers:
            peer.close()
        self.socket.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
