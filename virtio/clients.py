"""What every listening socket of the daemon shares: how clients are let in, and how many may stay.

A shortage of descriptors costs no client its connection: it waits in the socket's backlog. A client that keeps a place
and does nothing with it gives way to the next one, so that nobody is kept out by idle clients.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog
import trio

from virtio.errors import HostError
from virtio.fd import OwnedFd, may_block

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

DELAY_MIN: Final = 0.05  # seconds between attempts while there are no descriptors, doubled after each ...
DELAY_MAX: Final = 1.0  # ... up to this
SHORTAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
LOST: Final = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
"""The listening socket itself is of no use; what else accept(2) raises is about one client that has gone."""

FAILURES_MAX: Final = 128
"""So many clients in a row that have gone are clients. After that the host refuses (a security module, a full protocol
table), and to ask again at once would take a CPU."""

ROOM: Final = 32
"""Descriptors that must be free before a message with some is taken: its own, and what carrying it out needs."""

REMEDY: Final = "raise LimitNOFILE= of the unit (ulimit -n), or serve fewer devices"

shortages: Final[Counter[str]] = Counter()
"""How often there was no descriptor, by what it was for; the metrics show it."""


class Shortage:
    """Waits for descriptors to be had, and says so in one line when the waiting begins and one when it ends."""

    def __init__(self, what: str, log: FilteringBoundLogger) -> None:
        self._what = what
        self._log = log
        self._delay = DELAY_MIN
        self._waits = False

    async def wait(self, error: OSError | None = None) -> None:
        """Wait a little, longer each time."""
        if not self._waits:
            self._waits = True
            reason = error.strerror if error is not None else "too few are left"
            shortages[self._what] += 1
            self._log.error(f"out of descriptors: {self._what} waits", reason=reason, remedy=REMEDY)
        await trio.sleep(self._delay)
        self._delay = min(2 * self._delay, DELAY_MAX)

    def over(self) -> None:
        if self._waits:
            self._log.info(f"descriptors are to be had again: {self._what} goes on")
        self._waits, self._delay = False, DELAY_MIN


class Door:
    """``accept`` gives one client after the other. ``what`` names them in the log, such as "a client of control"."""

    def __init__(self, listener: trio.socket.SocketType, what: str, log: FilteringBoundLogger | None = None) -> None:
        self._listener = listener
        self._what = what
        self._log = log if log is not None else structlog.get_logger()
        self._shortage = Shortage(what, self._log)

    async def accept(self) -> trio.socket.SocketType:
        """The next client, who waits while there are no descriptors. ``OSError``: the listening socket is lost."""
        failures = 0
        while True:
            try:
                client, _ = await self._listener.accept()
            except OSError as error:
                if error.errno in LOST:
                    raise
                if error.errno in SHORTAGE:
                    await self._shortage.wait(error)
                    continue
                failures += 1
                if failures == FAILURES_MAX:
                    self._log.error(f"{self._what} cannot be let in: trying on", error=error.strerror)
                if failures >= FAILURES_MAX:
                    await trio.sleep(DELAY_MAX)
                continue
            self._shortage.over()
            return client


def room_for(count: int) -> bool:
    """Whether the process may have so many descriptors more."""
    taken: list[int] = []
    try:
        for _ in range(count):
            taken.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError:
        return False
    finally:
        for number in taken:
            os.close(number)
    return True


async def receive_with_descriptors(
    sock: trio.socket.SocketType, size: int, ancillary_size: int, shortage: Shortage
) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
    """``recvmsg``, but descriptors that come are left with the kernel until there is room for them.

    The kernel drops those that find no room, and says only that there were more than it could give (MSG_CTRUNC): a
    peer would lose its connection for our shortage. ``HostError``: that happened, another thread was quicker.
    """
    while True:
        _, _, flags, _ = await sock.recvmsg(1, 0, socket.MSG_PEEK)  # no room for any: truncated where any comes
        if not flags & socket.MSG_CTRUNC or room_for(ROOM) or _has_left(sock):
            break
        await shortage.wait()
    shortage.over()
    data, ancillary, flags, _ = await sock.recvmsg(size, ancillary_size, socket.MSG_CMSG_CLOEXEC)
    if flags & socket.MSG_CTRUNC and not room_for(ROOM):
        close_descriptors(ancillary)
        raise HostError(f"out of descriptors: those of a message are lost; {REMEDY}", errno=errno.EMFILE)
    return data, ancillary, flags


def close_descriptors(ancillary: list[tuple[int, int, bytes]]) -> None:
    for fd in received_descriptors(ancillary):
        fd.close()


def received_descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[OwnedFd]:
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return [OwnedFd(number, may_block=may_block(number)) for number in numbers]


def _has_left(sock: trio.socket.SocketType) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), 0)  # hanging up is always told
    return bool(poll.poll(0))


@dataclass(eq=False, slots=True)
class Place:
    """One client's. ``rank``: of those who may have to give way, the lowest does; ``None``: this one does not."""

    rank: int | None = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """To be entered for the client's whole life: cancelled when it has to give way."""


class Places:
    """At most ``most`` clients at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: dict[Place, None] = {}  # in the order of their last sign of life
        self._left = trio.Event()

    def __len__(self) -> int:
        return len(self._taken)

    def take(self) -> Place | None:
        """A place for one more client, for which the one that has been idle for longest may have to go.

        ``None``: no client may be sent away now.
        """
        if len(self._taken) >= self._most:
            idle = [place for place in self._taken if place.rank is not None]
            if not idle:
                return None
            victim = min(idle, key=_rank)  # of equals the first, which is the one that was last active long ago
            victim.scope.cancel()
            del self._taken[victim]
        place = Place()
        self._taken[place] = None
        return place

    async def wait_for(self) -> Place:
        """``take``, as soon as there is a place."""
        while (place := self.take()) is None:
            self._left = trio.Event()
            await self._left.wait()
        return place

    async def accept(self, door: Door) -> tuple[trio.socket.SocketType, Place]:
        """The next client at ``door``, which has a place from now on."""
        client = await door.accept()
        try:
            return client, await self.wait_for()
        except BaseException:
            client.close()
            raise

    def active(self, place: Place) -> None:
        """The client has just done something."""
        if place in self._taken:
            del self._taken[place]
            self._taken[place] = None

    def leave(self, place: Place) -> None:
        self._taken.pop(place, None)
        self._left.set()


def _rank(place: Place) -> int:
    assert place.rank is not None
    return place.rank
