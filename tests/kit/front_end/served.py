"""A front-end of a test with a vhost-user server of ours at the other end of its socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import kit.front_end.vhost_user_wire as wire
import trio
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.vhost_user_wire import FrontEnd

from transports.vhost_user.serving.endpoint import Inherit
from transports.vhost_user.serving.server import VhostUserServer
from virtio.fd import OwnedFd

IOMMU = wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES
UVA = 0x7F00_0000_0000


@asynccontextmanager
async def connected(
    backend: RecordingBackend, features: int = wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES, limit: float = 20
) -> AsyncIterator[tuple[FrontEnd, VhostUserServer]]:
    """A negotiated connection without a listening socket; it must have ended after the block."""
    ours, theirs = trio.socket.socketpair()
    server = VhostUserServer(backend, Inherit(OwnedFd(ours.detach())))
    with trio.fail_after(limit):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            with FrontEnd(theirs) as front_end:
                await front_end.negotiate(features)
                yield front_end, server
    backend.close()


async def open_channel(front_end: FrontEnd) -> FrontEnd:
    """Give the back-end a channel; the front-end's side of it."""
    ours, theirs = trio.socket.socketpair()
    assert await front_end.do(21, b"", [ours.detach()]) == 0
    return FrontEnd(theirs)
