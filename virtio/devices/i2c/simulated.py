"""A simulated I2C bus, whose chips can be read, set and taken away over a Unix socket.

Commands (ADDRESS, NUMBER and VALUE are decimal, or hexadecimal with 0x; see ``line_server`` for answers and ``watch``):

* ``list``: every chip, as ``chip ADDRESS KIND present|absent``
* ``get ADDRESS NUMBER``: a register, or a byte of an EEPROM, as ``value ADDRESS NUMBER VALUE``
* ``set ADDRESS NUMBER VALUE``: as if the chip itself had measured it; what the guest may not write, too
* ``remove ADDRESS``, ``insert ADDRESS``: the chip does not answer, or answers again

A write of the guest is told as ``write ADDRESS NUMBER VALUE``, with all bytes that it wrote there, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import trio

from virtio.devices.host.line_server import CommandError, LineClient, LineServer
from virtio.devices.i2c.bus import Segment
from virtio.devices.i2c.chips import Chip, make_chip
from virtio.devices.i2c.options import ChipOptions
from virtio.errors import HostError

SAVE_SECONDS: Final = 10.0


class SimulatedBus:
    """``HostError``: a file or the socket cannot be had."""

    def __init__(self, chips: Sequence[ChipOptions], control: Path | None) -> None:
        self._chips: dict[int, Chip] = {}
        self._absent: set[int] = set()
        self._thread = trio.CapacityLimiter(1)  # for the file system may hang
        with ExitStack() as stack:
            for options in chips:
                chip = self._chips[options.address] = make_chip(options)
                stack.callback(chip.close)
            self._server = LineServer(control, "i2c control", self._obey)
            stack.pop_all()

    # ---- the guest's side ----

    async def transfer(self, segments: Sequence[Segment]) -> list[bytes]:
        results: list[bytes] = []
        for segment in segments:
            chip = self._chips.get(segment.address)
            if chip is None or segment.address in self._absent or segment.ten_bit != (segment.address > 0x7F):
                break
            if segment.read:
                results.append(chip.read(segment.length))
            elif chip.write(segment.data, partial(self._tell, segment.address)):
                results.append(b"")
            else:
                break
            await trio.lowlevel.checkpoint()  # a long segment takes milliseconds
        await self._save()
        return results

    async def _save(self) -> None:
        for chip in self._chips.values():
            if not chip.dirty:
                continue
            with trio.move_on_after(SAVE_SECONDS) as saving:
                await trio.to_thread.run_sync(chip.save, abandon_on_cancel=True, limiter=self._thread)
            if saving.cancelled_caught:
                raise HostError(f"the file of a chip has not been written for {SAVE_SECONDS:g} s")

    def _tell(self, address: int, number: int, data: bytes) -> None:
        self._server.tell(f"write {address:#04x} {number:#04x} 0x{data.hex()}")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._server.run(task_status=task_status)

    def close(self) -> None:
        for chip in self._chips.values():
            chip.close()
        self._server.close()

    # ---- the other side ----

    async def _obey(self, client: LineClient, text: str) -> None:
        command, *words = text.split()
        numbers = [_number(word) for word in words]
        match command, numbers:
            case "list", []:
                for address, chip in self._chips.items():
                    there = "absent" if address in self._absent else "present"
                    client.send(f"chip {address:#04x} {chip.kind} {there}")
            case "get", [address, number]:
                try:
                    value = self._find(address).get(number)
                except KeyError:
                    raise CommandError(f"the chip at {address:#04x} has no {number:#04x}") from None
                client.send(f"value {address:#04x} {number:#04x} 0x{value.hex()}")
            case "set", [address, number, value]:
                try:
                    self._find(address).set(number, value)
                    await self._save()
                except KeyError:
                    raise CommandError(f"the chip at {address:#04x} has no {number:#04x}") from None
                except OverflowError:
                    raise CommandError(f"{value:#x} is too large for {number:#04x}") from None
                except HostError as error:
                    raise CommandError(str(error)) from error
            case "remove", [address]:
                self._find(address)
                self._absent.add(address)
            case "insert", [address]:
                self._find(address)
                self._absent.discard(address)
            case _:
                raise CommandError(
                    "the commands are: list, get ADDRESS NUMBER, set ADDRESS NUMBER VALUE, remove ADDRESS, "
                    "insert ADDRESS, watch"
                )

    def _find(self, address: int) -> Chip:
        chip = self._chips.get(address)
        if chip is None:
            raise CommandError(f"there is no chip at {address:#04x}")
        return chip


def _number(word: str) -> int:
    try:
        value = int(word, 16 if word.startswith("0x") else 10)
    except ValueError:
        raise CommandError(f"{word!r} is not a number") from None
    if not 0 <= value < 1 << 32:
        raise CommandError(f"{word} is out of range")
    return value
