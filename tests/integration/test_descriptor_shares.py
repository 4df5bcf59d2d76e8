"""A process with too few descriptors: no guest takes what others were promised, and the operator sees who was short."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import trio
from kit.front_end.frontend import Guest
from kit.front_end.links import SocketLink
from kit.front_end.scene import DaemonProcess, LogBook
from kit.guest.vsock import REQUEST, RESPONSE, RST, HostListener, HostSocket, VsockGuest

from daemon.running.control import ask
from virtio.devices.vsock.shares import CONNECTION

PORT: Final = 22
CIDS: Final = (3, 4, 5)
DESCRIPTORS: Final = 1500
WANTED: Final = 512
"""Connections that each guest may have by its key, and asks for."""

CONFIGURATION: Final = "[daemon]\nmetrics = 'off'\ncontrol = 'control.sock'\n" + "".join(
    f"""
[devices.s{cid}]
type = "vsock"
socket = "s{cid}.sock"
cid = {cid}
path = "{cid}/vsock"
connections = {WANTED}
"""
    for cid in CIDS
)


async def take_whoever_comes(listener: HostListener) -> None:
    """A program of the host that keeps each connection until it ends itself."""
    kept: list[HostSocket] = []
    try:
        while True:
            kept.append(await listener.accept())
    finally:
        listener.close()
        for each in kept:
            each.close()


async def take_all(guest: Guest, cid: int) -> int:
    """How many of its connections a guest is given that asks for all of them; it keeps what it has."""
    await guest.start()
    inside = VsockGuest(guest, cid=cid)
    had = 0
    for port in range(WANTED):
        await inside.say(REQUEST, port, PORT)
        answer = await inside.hear()
        assert answer.op in (RESPONSE, RST)
        had += answer.op == RESPONSE
    return had


async def test_guests_that_take_all_they_can_leave_each_other_their_shares(tmp_path: Path) -> None:
    file, log = tmp_path / "c.toml", LogBook()
    file.write_text(CONFIGURATION)
    for cid in CIDS:
        (tmp_path / str(cid)).mkdir()
    daemon = await trio.to_thread.run_sync(lambda: DaemonProcess(file, log, descriptors=DESCRIPTORS))
    try:
        await log.expect(0, "serving")
        had = []
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            for cid in CIDS:
                nursery.start_soon(take_whoever_comes, HostListener(tmp_path / str(cid), PORT))
                guest = Guest(await SocketLink.connect(tmp_path / f"s{cid}.sock"))
                stack.callback(guest.close)
                had.append(await take_all(guest, cid))
            state = await trio.to_thread.run_sync(ask, tmp_path / "control.sock", "stats")
            nursery.cancel_scope.cancel()
        assert max(had) - min(had) <= 1
        assert 50 < min(had) < WANTED
        # Each was refused within its share: the process itself never ran out.
        assert state["descriptor_shortages"] == {CONNECTION: len(CIDS) * WANTED - sum(had)}
    finally:
        assert await trio.to_thread.run_sync(daemon.stop) == 0
