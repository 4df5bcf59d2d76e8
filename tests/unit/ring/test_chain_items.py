"""What is read from and written to a chain is counted in bytes, however wide the items of a buffer are."""

from __future__ import annotations

import array
from collections.abc import Awaitable, Callable
from typing import Literal, get_args

import pytest
from kit.front_end.frontend import Setting, plugged
from kit.ring.driven import Scripted

from transports.kvm.vm.ram import PAGE, GuestRam
from virtio.device import Chain, Queue
from virtio.testing.driver import Used

Code = Literal["B", "H", "I", "Q"]
WORDS = array.array("I", range(1, 9))
BYTES = WORDS.tobytes()
WIDE = {
    "bytes": BYTES,
    "bytearray": bytearray(BYTES),
    "view of bytes": memoryview(BYTES),
    "view of words": memoryview(WORDS),
    "view of long words": memoryview(BYTES).cast("Q"),
    "view of a table": memoryview(BYTES).cast("B").cast("H", shape=[2, 8]),
}


async def answer(script: Callable[[Queue, Chain], Awaitable[None]], sent: bytes, room: int) -> Used:
    device = Scripted()
    device.script = script
    async with plugged(device, Setting("waist", "split")) as p:
        return await p.guest.queues[0].request([sent], [room])


@pytest.mark.parametrize("data", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("room", [len(BYTES), len(BYTES) + 100, 7], ids=["fits", "more room", "does not fit"])
async def test_every_byte_of_a_buffer_is_written(data: bytes | bytearray | memoryview, room: int) -> None:
    counts = []

    async def write(queue: Queue, chain: Chain) -> None:
        counts.append(chain.write(data))

    used = await answer(write, b"?", room)
    expected = BYTES[:room]
    assert used.buffers[0][: used.written] == expected
    assert counts == [len(expected)]


@pytest.mark.parametrize("code", get_args(Code))
@pytest.mark.parametrize("sent", [len(BYTES), len(BYTES) - 3, len(BYTES) + 9], ids=["all", "less", "more"])
async def test_a_room_is_filled_to_its_last_byte(code: Code, sent: int) -> None:
    room = memoryview(bytearray(len(BYTES))).cast(code)
    data = (BYTES + b"123456789")[:sent]
    counts = []

    async def read(queue: Queue, chain: Chain) -> None:
        counts.append(chain.read_into(room))
        chain.write(chain.read())

    used = await answer(read, data, 64)
    assert room.tobytes() == data[: len(BYTES)].ljust(len(BYTES), b"\0")
    assert counts == [min(sent, len(BYTES))]
    assert used.buffers[0][: used.written] == data[len(BYTES) :], "and reading goes on behind it"


@pytest.mark.parametrize("room", [memoryview(BYTES), memoryview(bytearray(64))[::2]], ids=["read-only", "with gaps"])
async def test_a_room_that_cannot_be_filled_is_the_devices_mistake_and_stays_as_it_is(room: memoryview) -> None:
    before = room.tobytes()
    errors = []

    async def read(queue: Queue, chain: Chain) -> None:
        try:
            chain.read_into(room)
        except (BufferError, ValueError) as error:
            errors.append(error)

    await answer(read, b"x" * 64, 1)
    assert len(errors) == 1
    assert room.tobytes() == before


def test_guest_memory_takes_every_byte_of_a_view() -> None:
    with GuestRam(PAGE) as ram:
        for data in WIDE.values():
            ram.write(0, bytes(64))
            ram.write(8, data)  # type: ignore[arg-type]
            assert ram.read(8, len(BYTES) + 8) == BYTES + bytes(8)
        with pytest.raises(ValueError, match="are not in guest memory"):
            ram.write(PAGE - 16, memoryview(WORDS))  # type: ignore[arg-type]
