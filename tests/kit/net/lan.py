"""Guests on a switch, by hand."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Mapping, Sequence

from kit.front_end.frontend import F_VERSION_1, Guest
from kit.front_end.links import WaistLink

from virtio.backend.backend import Backend
from virtio.devices.net.device import Net, NetOptions
from virtio.native.worker import Worker

RECEIVE, TRANSMIT = 0, 1
PLAIN = bytes(12)
BROADCAST = b"\xff" * 6
F_MRG_RXBUF = 1 << 15


class Station:
    """One guest on the switch."""

    def __init__(self, guest: Guest, device: Net) -> None:
        self.guest = guest
        self.device = device
        self.mac = device.mac
        # 5.1.6.1: a legacy driver's header ends before num_buffers, unless buffers are merged.
        self.header_size = 12 if guest.features & (F_VERSION_1 | F_MRG_RXBUF) else 10

    async def send(
        self, to: bytes, payload: bytes, header: bytes = PLAIN, pair: int = 0, source: bytes | None = None
    ) -> None:
        """``source``: another address than its own."""
        addresses = to + (self.mac if source is None else source)
        if self.guest.features & F_VERSION_1:
            pieces = [header + addresses, payload]
        else:  # 5.1.6.6: a legacy driver's header has a descriptor of its own
            pieces = [header[: self.header_size], addresses + payload]
        await self.guest.queues[2 * pair + TRANSMIT].request(pieces, [])

    def listen(self, count: int = 8, size: int = 1600, pair: int = 0) -> None:
        for _ in range(count):
            legacy = not self.guest.features & F_VERSION_1
            sizes = [self.header_size, size - self.header_size] if legacy else [size]
            self.guest.queues[2 * pair + RECEIVE].driver.add([], sizes)

    async def frames(self, count: int = 1, pair: int = 0) -> list[tuple[bytes, bytes]]:
        """(header, frame) of each that came, put together from its buffers."""
        found: list[tuple[bytes, bytes]] = []
        waiting: list[bytes] = []
        needed = 1
        while len(found) < count:
            for used in await self.guest.queues[2 * pair + RECEIVE].used():
                waiting.append(b"".join(used.buffers)[: used.written])
                needed = struct.unpack_from("<H", waiting[0], 10)[0] if self.header_size == 12 else 1
                if len(waiting) == needed:
                    whole = b"".join(waiting)
                    found.append((whole[: self.header_size], whole[self.header_size :]))
                    waiting = []
        return found

    def heard_nothing(self) -> bool:
        return not self.guest.queues[RECEIVE].driver.has_used()


@contextlib.asynccontextmanager
async def lan(
    reactor: str,
    ring: str,
    *without: int,
    pairs: Sequence[int] = (),
    mtus: Sequence[int | None] = (),
    more: Sequence[Mapping[str, object]] = (),
) -> AsyncIterator[list[Station]]:
    """As many stations on one switch as there are ``without``: the feature bits that each one's driver declines.

    Those that are named in ``pairs`` and ``mtus`` have so many pairs of queues, of which all are used, and that MTU;
    those in ``more`` have these options, too.
    """
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(Worker("lan", reactor=reactor))
        stations = []
        for number, bits in enumerate(without):
            keys: dict[str, object] = {"backend": "switch", "switch": "lan", "mtu": mtus[number] if mtus else None}
            options = NetOptions.model_validate(keys | dict(more[number] if more else {}))
            device = Net(f"port{number}", options, pairs[number] if pairs else 1, 256)
            stack.callback(device.close)
            backend = await stack.enter_async_context(Backend(device, workers=[worker]))
            guest = Guest(WaistLink(backend), ring)
            stack.callback(guest.close)
            await guest.start(without=bits)
            stations.append(Station(guest, device))
        yield stations
