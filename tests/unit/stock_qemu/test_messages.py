"""The messages between the preload library and the daemon: both sides' tables, and what is no message."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.project import ROOT

from transports.stock_qemu import messages
from transports.stock_qemu.messages import FDS, WIRE_SIZE, Message, Reason, Type, VmFlag, parse_message
from virtio.errors import PeerError

HEADER: Final = ROOT / "transports" / "stock_qemu" / "library" / "wire.h"


def test_both_sides_tables_are_the_same() -> None:
    numbers = dict(re.findall(r"#define (WIRE_\w+) (0x[0-9a-f]+|\d+)u?\b", HEADER.read_text()))
    ours: dict[str, int] = {f"WIRE_{name}": number for name, number in Type.__members__.items()}
    ours |= {f"WIRE_VM_{name}": number for name, number in VmFlag.__members__.items()}
    ours |= {f"WIRE_REASON_{name}": number for name, number in Reason.__members__.items()}
    ours |= {
        name: getattr(messages, name)
        for name in ("WIRE_MAGIC", "WIRE_VERSION", "WIRE_NAME_SIZE", "WIRE_BELL_REGISTERED")
    }
    assert {name: int(number, 0) for name, number in numbers.items()} == {name: int(n) for name, n in ours.items()}


@given(
    st.builds(
        Message,
        type=st.sampled_from([int(one) for one in FDS]),
        bell=st.integers(0, 0xFFFFFF),
        serial=st.integers(0, 0xFFFFFFFF),
        flags=st.integers(0, 0xFFFFFFFF),
        result=st.integers(-(1 << 31), (1 << 31) - 1),
        vcpu=st.integers(0, 4095),
        name=st.from_regex(r"[A-Za-z0-9]{0,31}", fullmatch=True),
    )
)
def test_a_message_is_what_it_was_after_its_journey(message: Message) -> None:
    data = message.build()
    assert len(data) == WIRE_SIZE
    assert parse_message(data, FDS[message.type]) == message


@given(st.binary(max_size=130), st.integers(0, 4))
def test_bytes_are_a_message_or_a_peer_error(data: bytes, fds: int) -> None:
    for wire in (data, Message(Type.BELL).build()[:8] + data):
        with suppress(PeerError):
            parse_message(wire, fds)


@pytest.mark.parametrize(
    ("data", "fds", "complaint"),
    [
        (b"", 0, "no message"),
        (Message(Type.VM).build()[:-1], 0, "no message"),
        (Message(Type.VM).build() + b"x", 0, "no message"),
        (b"HHbX" + Message(Type.VM).build()[4:], 0, "no message"),
        (Message(Type.VM).build().replace(b"\1\0\1\0", b"\2\0\1\0"), 0, "another hyperbell's"),
        (Message(Type.BELL).build(), 0, "with 0 descriptors"),
        (Message(Type.BELL).build(), 2, "with 2 descriptors"),
        (Message(Type.VM).build(), 1, "with 1 descriptors"),
        (Message(Type.REGISTER).build(), 0, "type 33"),  # ours to send
        (Message(99).build(), 0, "type 99"),
        (Message(Type.BELL_GONE, bell=1 << 24).build(), 0, "out of range"),
        (Message(Type.VCPU, vcpu=4096).build(), 1, "out of range"),
        (Message(Type.VM).build()[:28] + b"\1" + Message(Type.VM).build()[29:], 0, "reserved"),
    ],
)
def test_each_mistake_in_a_message_is_named(data: bytes, fds: int, complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        parse_message(data, fds)
