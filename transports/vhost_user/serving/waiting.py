"""Front-ends that have connected to a device and wait for its only place."""

from __future__ import annotations

import select
from typing import Final

import trio

WAITING_MAX: Final = 4


def has_hung_up(sock: trio.socket.SocketType) -> bool:
    """Whether the other side has closed, though there may still be something to read (or it was closed here)."""
    return sock.fileno() < 0 or bool(_events(sock, select.POLLRDHUP))


def speaks(sock: trio.socket.SocketType) -> bool:
    """Whether something was said that is still to be read, by one who has not left."""
    return not has_hung_up(sock) and bool(_events(sock, select.POLLIN))


def _events(sock: trio.socket.SocketType, wanted: int) -> int:
    poll = select.poll()
    poll.register(sock.fileno(), wanted)
    return sum(events for _, events in poll.poll(0))


class Waiting:
    """A few of them. Dead ones, and then those that say nothing, make room for one more."""

    def __init__(self) -> None:
        self._sockets: list[trio.socket.SocketType] = []
        self._arrived = trio.Event()

    def __len__(self) -> int:
        return len(self._sockets)

    def add(self, sock: trio.socket.SocketType) -> bool:
        """Take ``sock``; False, and it stays the caller's, when all who wait are alive and have spoken."""
        if len(self._sockets) >= WAITING_MAX:
            dead = next((one for one in self._sockets if has_hung_up(one)), None)
            victim = dead or next((one for one in self._sockets if not speaks(one)), None)
            if victim is None:
                return False
            self._sockets.remove(victim)
            victim.close()
        self._sockets.append(sock)
        self._arrived.set()
        return True

    async def arrival(self) -> None:
        """Until somebody waits."""
        while not self._sockets:
            self._arrived = trio.Event()
            await self._arrived.wait()

    async def next(self) -> trio.socket.SocketType:
        """Whose turn it is: the first that has spoken, else the first. The caller's from now on."""
        await self.arrival()
        sock = next((one for one in self._sockets if speaks(one)), self._sockets[0])
        self._sockets.remove(sock)
        return sock

    def anybody_speaks(self) -> bool:
        return any(speaks(sock) for sock in self._sockets)

    def take_all(self) -> list[trio.socket.SocketType]:
        """All of them, to be sent away."""
        sockets, self._sockets = self._sockets, []
        return sockets
