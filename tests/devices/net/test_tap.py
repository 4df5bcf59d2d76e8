"""The network device on a tap: frames to and from the host, offloads passed on, queues, and what can go wrong."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

import pytest
import structlog
import trio
from kit.front_end.frontend import REACTORS, RINGS, Guest, Setting, plugged
from kit.front_end.links import WaistLink
from kit.guest.blk import pattern
from kit.net.own_network import own_network
from kit.net.packets import packet
from kit.net.tap_host import HOST, PLAIN, RECEIVE, TRANSMIT, Host, frame, heard, listen, on_tap, send
from pydantic import ValidationError

from virtio.backend.backend import Backend
from virtio.devices.net import tap
from virtio.devices.net.device import Net, NetOptions
from virtio.errors import HostError
from virtio.native.worker import Worker
from virtio.testing.queue import GUARD

SIOCGIFMTU = 0x8921
RTM_DELLINK, NLM_F_REQUEST, NLM_F_ACK = 17, 1, 4

every_tap = pytest.mark.parametrize("setting", [Setting("waist", ring, r) for r in REACTORS for ring in RINGS], ids=str)


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


@every_tap
async def test_frames_pass_between_the_guest_and_the_host(setting: Setting) -> None:
    async with plugged(on_tap(), setting) as p:
        assert isinstance(p.device, Net)
        with Host() as host:
            listen(p.guest)
            for number, size in enumerate((46, 100, 1500)):
                out = frame(HOST, p.device.mac, pattern(size, number))
                await send(p, out)
                assert await host.received() == out
                back = frame(p.device.mac, HOST, pattern(size, number + 50))
                host.send(back)
                assert await heard(p) == (bytes(10) + b"\1\0", back)


@every_tap
async def test_a_frame_waits_for_buffers_in_order_and_without_loss(setting: Setting) -> None:
    async with plugged(on_tap(), setting) as p:
        assert isinstance(p.device, Net)
        with Host() as host:
            frames = [frame(p.device.mac, HOST, pattern(100, number)) for number in range(20)]
            for each in frames:
                host.send(each)
            for each in frames:
                listen(p.guest, 1)
                assert (await heard(p))[1] == each


@every_tap
@pytest.mark.parametrize("waiting", [False, True], ids=["nothing-sent", "short-of-buffers"])
async def test_a_worker_with_nothing_that_it_could_do_sleeps(setting: Setting, waiting: bool) -> None:
    device = on_tap()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(device.close)
        worker = await stack.enter_async_context(Worker("idle", reactor=setting.reactor))
        backend = await stack.enter_async_context(Backend(device, workers=[worker]))
        guest = Guest(WaistLink(backend), setting.ring)
        stack.callback(guest.close)
        await guest.start()
        host = stack.enter_context(Host())
        await guest.queues[TRANSMIT].request([PLAIN, frame(HOST, device.mac, b"x" * 60)], [])
        big = frame(device.mac, HOST, pattern(400, 3))
        if waiting:
            listen(guest, 2, 112)  # a frame of 414 bytes with its header needs four
            host.send(big)
        await trio.sleep(0.1)  # whatever it polls for has ended by then
        before = worker.stats()
        await trio.sleep(0.3)
        after = worker.stats()
        assert after.wakeups == before.wakeups
        assert after.cpu_seconds - before.cpu_seconds < 0.01
        if waiting:
            for _ in range(2):
                assert not guest.queues[RECEIVE].driver.has_used()
                listen(guest, 1, 112)
            listen(guest, 1, 112)
            back = await guest.queues[RECEIVE].used(4)
            assert b"".join(b"".join(used.buffers)[: used.written] for used in back)[12:] == big
            host.send(big)  # and with a frame that has to wait, it stops all the same
            listen(guest, 1, 112)
        await backend.reset()


@pytest.mark.parametrize("reactor", REACTORS)
async def test_each_pair_has_a_queue_of_the_tap_and_only_those_that_run_get_frames(reactor: str) -> None:
    device = on_tap(queues=2)
    async with plugged(device, Setting("waist", "split", reactor), workers=2) as p:
        assert (await p.guest.queues[4].request([b"\4\0" + b"\2\0"], [1])).buffers == [b"\0"]  # both pairs
        assert device.native_device.active_pairs == 2
        with Host() as host:
            for pair in range(2):
                out = frame(HOST, device.mac, pattern(60, pair))
                await send(p, out, pair=pair)
                assert await host.received() == out
            await p.guest.link.enable(2, False)  # the second pair's receive queue
            listen(p.guest, 60)
            for number in range(40):  # flows that the kernel would spread over both
                host.send(device.mac + HOST + packet("udp4", struct.pack(">H", number) * 30)[0])
                assert (await heard(p))[1][-60:] == struct.pack(">H", number) * 30


async def test_the_tap_is_up_with_its_mtu_and_gone_when_the_device_is_closed() -> None:
    device = on_tap(mtu=1300)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, SIOCGIFMTU, struct.pack("=16si20x", b"hb0", 0))
    assert struct.unpack_from("=i", answer, 16) == (1300,)
    device.close()
    assert "hb0" not in [name for _, name in socket.if_nameindex()]


def delete_link(name: str) -> None:
    """As ``ip link delete`` does it (rtnetlink(7))."""
    body = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(name), 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        route.send(struct.pack("=IHHII", 16 + len(body), RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        assert struct.unpack_from("=i", route.recv(4096), 16) == (0,)


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("reactor", REACTORS)
async def test_a_tap_deleted_beneath_its_device_is_said_once_with_its_name(
    reactor: str, queues: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tap, "LOOK_INTERVAL", 0.01)
    device = on_tap(queues)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(device.close)
        worker = await stack.enter_async_context(Worker("gone", reactor=reactor))
        backend = await stack.enter_async_context(Backend(device, workers=[worker]))
        guest = Guest(WaistLink(backend), "split")
        stack.callback(guest.close)
        await guest.start()
        logs = stack.enter_context(structlog.testing.capture_logs())
        await guest.queues[TRANSMIT].request([PLAIN, frame(HOST, device.mac, b"x" * 60)], [])
        await trio.sleep(0.1)
        assert logs == []
        delete_link("hb0")
        with trio.fail_after(GUARD):
            while True:
                await trio.sleep(0.01)
                if logs:
                    break
        for _ in range(3):
            await guest.queues[TRANSMIT].request([PLAIN, frame(HOST, device.mac, b"x" * 60)], [])
        await trio.sleep(0.1)  # whatever it polls for has ended by then
        before = worker.stats().wakeups
        await trio.sleep(0.3)
        assert worker.stats().wakeups == before
        assert [(line["log_level"], line["device"], line["tap"]) for line in logs] == [("warning", "lan", "hb0")]
        assert device.native_device.counters().dropped == 3
        await guest.link.reset()  # which is no mistake of anybody's


async def test_a_tap_that_was_opened_by_somebody_else_is_used_by_its_fd() -> None:
    owner = on_tap()
    assert owner._tap is not None
    number = os.dup(owner._tap.fds[0].fileno())
    device = Net("lan", NetOptions(backend="tap", tap_fds=(number,)), 1, 256)
    owner.close()
    async with plugged(device, Setting("waist", "split", "io_uring")) as p:
        with Host() as host:
            out = frame(HOST, device.mac, b"x" * 60)
            await send(p, out)
            assert await host.received() == out


def test_what_is_in_the_way_of_a_tap_is_said_with_what_to_do() -> None:
    with pytest.raises(HostError, match="joining br7: No such device"):
        on_tap(bridge="br7")
    assert "hb0" not in [name for _, name in socket.if_nameindex()]
    first = on_tap()
    with pytest.raises(HostError, match="tap 'hb0': Device or resource busy; somebody else uses it"):
        on_tap()
    with pytest.raises(HostError, match="made with other flags"):
        on_tap(queues=2)
    first.close()
    reader, writer = os.pipe()
    with pytest.raises(HostError, match=f"fd {reader} is not a tap"):
        Net("lan", NetOptions(backend="tap", tap_fds=(reader,)), 1, 256)
    os.close(writer)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "null", "tap": "hb0"},
        {"backend": "switch", "switch": "lan", "bridge": "br0"},
        {"backend": "tap", "tap": "hb0", "tap_fds": (5,)},
        {"backend": "tap", "tap": "a-name-that-is-too-long"},
        {"backend": "tap", "tap": "with/slash"},
    ],
    ids=str,
)
def test_options_of_a_tap_that_do_not_go_together_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NetOptions(**options)
