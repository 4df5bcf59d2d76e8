"""The two requests that only network interfaces know: VHOST_USER_SEND_RARP and VHOST_USER_NET_SET_MTU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.vhost_user_wire import Dialogue, FrontEnd, chunked, serving, u64

from transports.vhost_user.requests.net import Announce, SetMtu
from virtio.errors import PeerError
from virtio.socket_file import Listen

SEND_RARP, SET_MTU, ADD_REGION, REMOVE_REGION = 19, 20, 37, 38
NET_FEATURES = wire.ALL_PROTOCOL_FEATURES | wire.RARP | wire.NET_MTU
MAC = bytes.fromhex("02 00 5e 10 20 30")


@chunked
def test_a_network_interface_offers_both_and_understands_them(chunk: int) -> None:
    d = Dialogue(chunk, is_network_interface=True)
    assert d.ask(15) == wire.reply_to(15, u64(NET_FEATURES))
    d.negotiate(protocol=NET_FEATURES)
    assert d.plan(SEND_RARP, MAC + b"\xaa\xbb") == Announce(MAC)
    assert d.accept() == b""
    assert d.plan(SET_MTU, u64(1400), need_reply=True) == SetMtu(1400)
    assert d.accept() == wire.reply_to(SET_MTU, u64(0))


def test_both_are_understood_of_a_front_end_that_has_not_negotiated_them() -> None:
    d = Dialogue(is_network_interface=True)
    assert d.plan(SEND_RARP, MAC + b"\0\0") == Announce(MAC)
    d.accept()
    assert d.plan(SET_MTU, u64(1400)) == SetMtu(1400)


def test_a_disk_offers_neither() -> None:
    d = Dialogue()
    assert d.ask(15) == wire.reply_to(15, u64(wire.ALL_PROTOCOL_FEATURES))
    assert "were not offered" in d.violate(16, u64(NET_FEATURES))


def test_memory_that_is_shared_once_for_each_pair_of_queues_is_shared_once() -> None:
    """QEMU before 8.0 adds and removes every region as often as the interface has pairs."""
    with wire.no_fd_leaks():
        d = Dialogue(is_network_interface=True, queue_count=5)
        d.negotiate(protocol=NET_FEATURES)
        whole = wire.single_region(0, wire.MIB, 0x7F00_0000_0000)
        memory = wire.memfd()
        for _ in range(2):
            assert d.ask(ADD_REGION, whole, [os.dup(memory)], need_reply=True) == wire.reply_to(ADD_REGION, u64(0))
        os.close(memory)
        (region,) = list(d.session.state.memory.regions)
        for _ in range(2):
            assert d.ask(REMOVE_REGION, whole, need_reply=True) == wire.reply_to(REMOVE_REGION, u64(0))
        assert not list(d.session.state.memory.regions)
        region.fd.close()  # as the back-end does
        d.ask(ADD_REGION, whole, [wire.memfd()])
        other = wire.single_region(0, wire.MIB, 0x7F00_0000_0000, offset=4096)
        assert "overlap" in d.violate(ADD_REGION, other, [wire.memfd()])
        d.close()


async def test_the_back_end_hears_of_both_and_what_it_refuses_ends_nothing() -> None:
    backend = RecordingBackend(features=wire.F_VERSION_1)
    backend.device_id = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s")
        async with serving(backend, Listen(path)):
            with await FrontEnd.connect(path) as front_end:
                await front_end.negotiate(protocol=NET_FEATURES)
                assert await front_end.do(SEND_RARP, MAC + b"\0\0") == 0
                assert await front_end.do(SET_MTU, u64(1400)) == 0
                backend.failures["set_mtu"] = PeerError("too large")
                assert await front_end.do(SET_MTU, u64(70000)) == 1
                assert await front_end.do(SET_MTU, u64(1500)) == 0
    told = [call for call in backend.calls if call[0] in ("announce", "set_mtu")]
    assert told == [("announce", MAC), ("set_mtu", 1400), ("set_mtu", 70000), ("set_mtu", 1500)]
