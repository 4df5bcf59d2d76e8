"""Whatever bytes and descriptors arrive: nothing but ``PeerError`` is raised, and no descriptor is lost."""

from __future__ import annotations

import contextlib
import os
import struct

import kit.front_end.vhost_user_wire as wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transports.vhost_user.requests.memory import SetMemory
from transports.vhost_user.requests.operation import Request
from transports.vhost_user.requests.table import MESSAGES
from transports.vhost_user.session import Session
from transports.vhost_user.wire.message import Payload
from virtio.errors import HostError, PeerError
from virtio.waist import MemoryRegion

U32 = st.one_of(st.integers(0, 3), st.sampled_from([64, 255, 256, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
U64 = st.one_of(
    st.integers(0, 3),
    st.sampled_from([0x1000, 0x10_0000, 2**32, 2**63, 2**64 - 1, wire.DEVICE_FEATURES, wire.ALL_PROTOCOL_FEATURES]),
    st.integers(0, 2**64 - 1),
)
REGION = st.builds(wire.region, U64, U64, U64, U64)

PAYLOADS: dict[Payload, st.SearchStrategy[bytes]] = {
    Payload.NOTHING: st.just(b""),
    Payload.U64: st.builds(wire.u64, U64),
    Payload.VRING_STATE: st.builds(wire.vring_state, st.integers(0, 2), U32),
    Payload.VRING_ADDR: st.builds(wire.vring_addr, st.integers(0, 2), U64, U64, U64, st.integers(0, 1)),
    Payload.VRING_FD: st.builds(wire.u64, st.sampled_from([0, 1, 2, 0x100, 0x101, 0x1FF, 0x200])),
    Payload.MEMORY_TABLE: st.lists(REGION, max_size=9).map(lambda regions: wire.mem_table(*regions)),
    Payload.MEMORY_REGION: st.builds(wire.single_region, U64, U64, U64, U64),
    Payload.IOTLB: st.builds(wire.iotlb, st.integers(0, 5), U64, U64, U64, st.integers(0, 4)),
    Payload.CONFIG: st.builds(wire.config, U32, st.binary(max_size=260), flags=st.integers(0, 2)),
}
NUMBERS = st.sampled_from(sorted(MESSAGES))


@st.composite
def well_shaped(draw: st.DrawFn) -> bytes:
    """A message of the right shape for its number, with any content."""
    number = draw(NUMBERS)
    payload = draw(PAYLOADS[MESSAGES[number].payload])
    return wire.message(number, payload, need_reply=draw(st.booleans()))


ANYTHING = st.one_of(
    well_shaped(),
    well_shaped(),
    well_shaped(),
    st.binary(max_size=40),
    st.builds(lambda n, flags, size: struct.pack("=III", n, flags, size), U32, U32, U32),
)
CHUNKS = st.lists(st.tuples(ANYTHING, st.integers(0, 9), st.booleans()), max_size=12)
HELLO = st.sampled_from(["nothing", "owner", "negotiated", "running"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hello=HELLO, chunks=CHUNKS, step=st.integers(0, 30), outcomes=st.lists(st.booleans(), min_size=1))
def test_arbitrary_bytes_and_descriptors_raise_nothing_but_peer_errors_and_leak_nothing(
    hello: str, chunks: list[tuple[bytes, int, bool]], step: int, outcomes: list[bool]
) -> None:
    with wire.no_fd_leaks():
        dialogue = wire.Dialogue()
        begin(dialogue, hello)
        front_end = Hostile(dialogue.session, outcomes)
        with contextlib.suppress(PeerError):
            for data, fd_count, spurious in chunks:
                front_end.send(data, fd_count if spurious else expected_fds(data), step)
        front_end.close()


def expected_fds(data: bytes) -> int:
    """As many descriptors as the message may have, so that it gets past that check."""
    number = int.from_bytes(data[:4], "little")
    if number not in MESSAGES:
        return 0
    if MESSAGES[number].payload is Payload.MEMORY_TABLE:
        return (len(data) - 20) // 32
    return MESSAGES[number].fds[-1]


def begin(dialogue: wire.Dialogue, hello: str) -> None:
    if hello == "owner":
        dialogue.ask(3)
    if hello in ("negotiated", "running"):
        dialogue.negotiate(wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    if hello == "running":
        dialogue.share_memory()
        dialogue.set_up_ring()
        dialogue.start_ring()


class Hostile:
    """Sends what it is given, and stands in for the back-end: takes what an operation brings."""

    def __init__(self, session: Session, outcomes: list[bool]) -> None:
        self.session = session
        self.outcomes = outcomes
        self.count = 0
        self.regions: tuple[MemoryRegion, ...] = session.state.memory.regions

    def send(self, data: bytes, fd_count: int, step: int) -> None:
        fds = [os.dup(0) for _ in range(fd_count)]
        for start in range(0, max(len(data), 1), step or max(len(data), 1)):
            chunk = data[start : start + step] if step else data
            self.session.receive(chunk, fds if start == 0 else [])
            while (request := self.session.next_request()) is not None:
                self.answer(request)

    def answer(self, request: Request) -> None:
        self.count += 1
        operation = request.operation
        failed = not self.outcomes[self.count % len(self.outcomes)]
        if isinstance(operation, SetMemory):
            self.take_memory(() if failed else operation.regions, request)
        else:
            for fd in request.fds:
                fd.close()
        try:
            reply = (
                self.session.reject(request, HostError("as it happens"))
                if failed
                else self.session.accept(request, wire.usual_value(operation))
            )
        except HostError as error:
            raise PeerError("the connection ends here", request=request.name) from error
        assert len(reply) in (0, 12, 20, *range(24, 12 + 12 + 257))

    def take_memory(self, regions: tuple[MemoryRegion, ...], request: Request) -> None:
        for fd in (*request.fds, *(one.fd for one in self.regions)):
            if not any(fd is one.fd for one in (regions or self.regions)):
                fd.close()
        self.regions = regions or self.regions

    def close(self) -> None:
        self.session.close()
        for one in self.regions:
            one.fd.close()


@settings(max_examples=200, deadline=None)
@given(conversation=st.lists(well_shaped(), max_size=6), cuts=st.lists(st.integers(1, 25), min_size=1))
def test_a_conversation_means_the_same_however_it_is_cut(conversation: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(conversation)
    assert transcript(stream, [len(stream) or 1]) == transcript(stream, [1]) == transcript(stream, cuts)


def transcript(stream: bytes, cuts: list[int]) -> list[str]:
    """What a session makes of a stream without descriptors."""
    dialogue = wire.Dialogue()
    dialogue.negotiate()
    session = dialogue.session
    lines = []
    position = turn = 0
    try:
        while position < len(stream):
            size = cuts[turn % len(cuts)]
            session.receive(stream[position : position + size])
            position, turn = position + size, turn + 1
            while (request := session.next_request()) is not None:
                reply = session.accept(request, wire.usual_value(request.operation))
                lines.append(f"{request.name} {request.operation} {reply!r}")
    except PeerError as error:
        lines.append(str(error))
    return lines
