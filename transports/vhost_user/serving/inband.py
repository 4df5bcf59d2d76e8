"""In-band notifications (VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS): rings that are kicked and called by messages.

A queue does not know of it: between it and the messages stand eventfds of ours. Only rings for which the front-end
brings no descriptor are served this way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from transports.base import BackendLike
from transports.vhost_user.requests.operation import Operation
from transports.vhost_user.requests.rings import SetCall, SetErr, SetKick
from transports.vhost_user.serving.backend_channel import RingCall, RingError
from transports.vhost_user.state.vring import Vring
from virtio.errors import HostError
from virtio.fd import OwnedFd, take_count


@dataclass(frozen=True, slots=True)
class _Watch:
    """One eventfd that a queue signals, and the scope of the task that waits for it and owns it."""

    fd: OwnedFd
    scope: trio.CancelScope


class InbandNotifications:
    """``post`` takes what is to be sent to the front-end. Everything ends with ``nursery``."""

    def __init__(
        self, backend: BackendLike, nursery: trio.Nursery, post: Callable[[RingCall | RingError], None]
    ) -> None:
        self._backend = backend
        self._nursery = nursery
        self._post = post
        self._kicks: dict[int, OwnedFd] = {}
        self._watches: dict[RingCall | RingError, _Watch] = {}

    def kick(self, index: int) -> None:
        """VHOST_USER_VRING_KICK for a ring that runs; a ring whose kick fd the front-end brought ignores it."""
        fd = self._kicks.get(index)
        if fd is not None:
            with contextlib.suppress(BlockingIOError):  # kicked 2^64 times and never looked at
                os.eventfd_write(fd.fileno(), 1)

    async def prepare(self, operation: Operation, ring: Vring) -> Operation:
        """The operation with descriptors of ours where the front-end brought none. ``HostError``: there are none left.

        User-mode Linux sends neither SET_VRING_CALL nor SET_VRING_ERR, so a ring that starts has both.
        """
        match operation:
            case SetKick(index=index, kick_fd=None):
                if not ring.has_call:
                    await self._backend.set_call(index, self._watched(RingCall(index)))
                if not ring.has_err:
                    await self._backend.set_err(index, self._watched(RingError(index)))
                ours = _eventfd()
                self._kicks[index] = ours.duplicate()
                return replace(operation, kick_fd=ours)
            case SetKick(index=index):
                self._kicks.pop(index, None)
            case SetCall(index=index, call_fd=fd):
                self._forget(RingCall(index))
                return operation if fd is not None else replace(operation, call_fd=self._watched(RingCall(index)))
            case SetErr(index=index, err_fd=fd):
                self._forget(RingError(index))
                return operation if fd is not None else replace(operation, err_fd=self._watched(RingError(index)))
        return operation

    def _watched(self, event: RingCall | RingError) -> OwnedFd:
        """A new eventfd for the queue; ``event`` is posted whenever the queue signals it."""
        self._forget(event)
        ours = _eventfd()
        watch = _Watch(ours.duplicate(), trio.CancelScope())
        self._watches[event] = watch
        self._nursery.start_soon(self._wait, event, watch)
        return ours

    def _forget(self, event: RingCall | RingError) -> None:
        watch = self._watches.pop(event, None)
        if watch is not None:
            watch.scope.cancel()

    async def _wait(self, event: RingCall | RingError, watch: _Watch) -> None:
        with watch.fd, watch.scope:
            while True:
                await trio.lowlevel.wait_readable(watch.fd.fileno())
                if take_count(watch.fd.fileno()):
                    self._post(event)


def _eventfd() -> OwnedFd:
    try:
        return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except OSError as error:
        raise HostError(f"no descriptor for in-band notifications: {error.strerror}", errno=error.errno or 0) from error
