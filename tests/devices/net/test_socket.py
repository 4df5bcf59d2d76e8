"""The network device joined to a peer by a socket: QEMU's two formats, peers that come and go, and peers that lie."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from kit.front_end.frontend import REACTORS, Setting, every_reactor, every_ring, plugged
from kit.guest.blk import pattern
from kit.net.packets import LIES, packet
from kit.net.station import BROADCAST, ETHERTYPE, Station, free_port, joined, station
from pydantic import ValidationError

from daemon.cli import main
from virtio.devices.net import peer as net_socket
from virtio.devices.net.device import Net, NetOptions
from virtio.devices.net.peer import FRAME_MAX
from virtio.devices.net.peer_options import parse_address
from virtio.errors import HostError
from virtio.native.nic import NicCounters
from virtio.testing.queue import GUARD

PEER = bytes.fromhex("020000000002")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        yield Path(name)


def frame(payload: bytes, source: bytes = PEER) -> bytes:
    return BROADCAST + source + struct.pack(">H", ETHERTYPE) + payload


def in_stream(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(each)) + each for each in frames)


@pytest.mark.parametrize("kind", ["tcp", "unix", "udp", "unixgram"])
async def test_two_daemons_are_joined_and_pass_every_frame_whole(folder: Path, kind: str) -> None:
    if kind in ("tcp", "udp"):
        ports = [free_port(socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) for _ in range(2)]
        here, there = (f"{kind}:127.0.0.1:{port}" for port in ports)
    else:
        here, there = (f"{kind}:{folder / name}" for name in "ab")
    one: dict[str, Any] = {"local": here} if kind in ("tcp", "unix") else {"local": here, "remote": there}
    other: dict[str, Any] = {"remote": here} if kind in ("tcp", "unix") else {"local": there, "remote": here}
    async with station("a", backend="socket", **one) as a, station("b", backend="socket", **other) as b:
        await joined(a, b)
        largest = 9000 if kind == "udp" else FRAME_MAX - 14
        for number, size in enumerate((46, 1500, largest)):
            for sender, receiver in ((a, b), (b, a)):
                sent = await sender.send(pattern(size, number))
                assert await receiver.next_frame() == sent
        burst = [await a.send(pattern(200, number)) for number in range(200)]
        assert [await b.next_frame() for _ in burst] == burst


class StreamEnd:
    """The peer's end of a stream, by hand."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._waiting = b""

    async def receive(self) -> bytes:
        with trio.fail_after(GUARD):
            while len(self._waiting) < 4 or len(self._waiting) < 4 + struct.unpack_from(">I", self._waiting)[0]:
                data = await self.stream.receive_some()
                if not data:
                    raise EOFError
                self._waiting += data
            end = 4 + struct.unpack_from(">I", self._waiting)[0]
            found, self._waiting = self._waiting[4:end], self._waiting[end:]
            return found

    async def ended(self) -> bool:
        with trio.fail_after(GUARD), contextlib.suppress(trio.BrokenResourceError):
            return await self.stream.receive_some() == b""
        return True


@contextlib.asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[StreamEnd]:
    async with await trio.open_unix_socket(str(folder / "s")) as stream:
        yield StreamEnd(stream)


async def told(logs: list[MutableMapping[str, Any]], event: str) -> MutableMapping[str, Any]:
    """The log line that says ``event``; written soon, if not yet."""
    with trio.fail_after(GUARD):
        while True:
            found = [line for line in logs if line["event"] == event]
            if found:
                return found[-1]
            await trio.sleep(0.01)


async def hears(s: Station, peer: StreamEnd, payload: bytes) -> None:
    await peer.stream.send_all(in_stream(frame(payload)))
    assert await s.next_frame() == frame(payload)


async def test_a_stream_in_pieces_is_put_together(folder: Path) -> None:
    async with station("a", backend="socket", local=f"unix:{folder / 's'}") as s, connected(folder) as peer:
        frames = [frame(pattern(size, size)) for size in (46, 100, 1500)]
        for byte in in_stream(*frames):
            await peer.stream.send_all(bytes([byte]))
        assert [await s.next_frame() for _ in frames] == frames
        many = [frame(pattern(60, number)) for number in range(500)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.stream.send_all, in_stream(*many))
            assert [await s.next_frame() for _ in many] == many


@pytest.mark.parametrize("length", [FRAME_MAX + 1, 1 << 31, 0xFFFFFFFF])
async def test_a_length_that_no_frame_has_ends_the_connection_with_one_line_and_the_device_goes_on(
    folder: Path, length: int
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with station("a", backend="socket", local=f"unix:{folder / 's'}") as s:
            async with connected(folder) as peer:
                await hears(s, peer, b"x" * 50)
                await peer.stream.send_all(struct.pack(">I", length) + bytes(3000))
                assert await peer.ended()
            line = await told(logs, "network peer disconnected")
            assert line["reason"] == f"the peer announced a frame of {length} bytes; the longest has {FRAME_MAX}"
            async with connected(folder) as again:
                await hears(s, again, b"y" * 50)
            await told(logs, "network peer disconnected")


async def test_messages_without_a_frame_are_passed_over(folder: Path) -> None:
    async with station("a", backend="socket", local=f"unix:{folder / 's'}") as s, connected(folder) as peer:
        await peer.stream.send_all(in_stream(b"", b"x", b"", b"y" * 13, frame(b"z" * 50)))
        assert await s.next_frame() == frame(b"z" * 50)
        assert s.device.native_device.counters().misreceived == 2


async def test_datagrams_without_a_frame_are_passed_over() -> None:
    ports = [free_port(socket.SOCK_DGRAM) for _ in range(2)]
    here, there = (f"udp:127.0.0.1:{port}" for port in ports)
    async with station("a", backend="socket", local=here, remote=there) as s:
        await s.send(b"to nobody, which the kernel says at the next receive")
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
        ):
            peer.bind(("127.0.0.1", ports[1]))
            for data in (b"", b"x", b"y" * 13, b"", frame(b"z" * 50)):
                stranger.sendto(frame(b"from somebody else"), ("127.0.0.1", ports[0]))
                peer.sendto(data, ("127.0.0.1", ports[0]))
            assert await s.next_frame() == frame(b"z" * 50)
        assert s.device.native_device.counters().misreceived == 4


async def test_a_new_peer_takes_over_and_what_is_sent_to_nobody_is_lost(folder: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with station("a", backend="socket", local=f"unix:{folder / 's'}") as s:
            for _ in range(300):
                await s.send(bytes(1400))  # more than any socket holds
            async with connected(folder) as first:
                await hears(s, first, b"1" * 50)
                async with connected(folder) as second:
                    assert await first.ended()
                    await hears(s, second, b"2" * 50)
                    sent = await s.send(b"3" * 50)
                    assert await second.receive() == sent
    assert "another peer took over" in [line.get("reason") for line in logs]


async def test_a_peer_that_takes_nothing_is_given_up_and_the_queue_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net_socket, "STALL_MAX", 0.2)
    with structlog.testing.capture_logs() as logs:
        async with station("a", backend="socket", local=f"unix:{folder / 's'}") as s:
            async with connected(folder) as peer:
                await hears(s, peer, b"x" * 50)
                for _ in range(1000):
                    await s.send(bytes(1400))
                line = await told(logs, "network peer disconnected")
                assert line["reason"] == "the peer took nothing for 0.2 s"
            async with connected(folder) as again:
                await hears(s, again, b"y" * 50)


@every_reactor
async def test_frames_that_wait_for_a_peer_are_given_up_when_their_queue_is_disabled(
    folder: Path, setting: Setting
) -> None:
    here, there = (f"unixgram:{folder / name}" for name in "ab")
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        peer.bind(str(folder / "b"))
        device = Net("a", NetOptions(backend="socket", local=here, remote=there), 1, 256)
        async with plugged(device, setting) as p:
            await p.guest.queues[1].request([bytes(12) + frame(b"arrives")], [])
            assert peer.recv(2000) == frame(b"arrives")
            fill(peer, stack)
            for _ in range(3):
                p.guest.queues[1].driver.add([bytes(12) + frame(b"waits")], [])
            before = p.backend.stats().queues[1].wakeups
            p.guest.queues[1].ring()
            with trio.fail_after(GUARD):
                while p.backend.stats().queues[1].wakeups == before:
                    await trio.lowlevel.checkpoint()
            assert p.guest.queues[1].driver.used() == []
            await p.guest.link.enable(1, False)
            assert len(await p.guest.queues[1].used(3)) == 3
            assert device.native_device.counters().sent_disabled == 3
            await p.guest.link.enable(1, True)
            p.guest.queues[1].driver.add([bytes(12) + frame(b"comes")], [])
            p.guest.queues[1].kick()
            while (data := peer.recv(2000)) == b"x":
                pass
            assert data == frame(b"comes")


def fill(peer: socket.socket, stack: contextlib.ExitStack) -> None:
    """Nobody can send ``peer`` any more."""
    while True:
        sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sender.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sender.sendto(b"x", peer.getsockname()):
                sent += 1
        if sent == 0:
            return


@every_ring
@pytest.mark.parametrize("reactor", REACTORS)
@pytest.mark.parametrize(("sizes", "indirect"), [([1526], False), ([526, 1000], False), ([526, 1000], True)], ids=str)
async def test_a_frame_larger_than_the_whole_ring_is_lost_alone(
    folder: Path, reactor: str, ring: str, sizes: list[int], indirect: bool
) -> None:
    here, there = (f"unixgram:{folder / name}" for name in "ab")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(str(folder / "b"))
        device = Net("a", NetOptions(backend="socket", local=here, remote=there), 1, 256)
        async with plugged(device, Setting("waist", ring, reactor), queue_size=16) as p:
            receive = p.guest.queues[0]
            count = 16 if indirect else 16 // len(sizes)
            for _ in range(count):
                receive.driver.add([], sizes, indirect=indirect)
            largest = count * 1526 - 12 - 14
            for payload in (b"before", pattern(largest + 1, 1), b"after", pattern(30000, 2), pattern(largest, 3)):
                peer.sendto(frame(payload), str(folder / "a"))
            heard: list[bytes] = []
            for number in (1, 1, count):
                back = await receive.used(number)
                heard.append(b"".join(b"".join(used.buffers)[: used.written] for used in back)[26:])
                for _ in back:
                    receive.driver.add([], sizes, indirect=indirect)
                receive.kick()
            assert heard == [b"before", b"after", pattern(largest, 3)]
            assert device.native_device.counters() == NicCounters(refused=2)


@every_reactor
@pytest.mark.parametrize("lie", [lie for lie, _ in LIES if lie[0] & 1 or lie[1]], ids=str)
async def test_no_header_but_an_empty_one_is_true_of_frames_that_go_without(
    folder: Path, setting: Setting, lie: tuple[int, ...]
) -> None:
    here, there = (f"unixgram:{folder / name}" for name in "ab")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(str(folder / "b"))
        device = Net("a", NetOptions(backend="socket", local=here, remote=there), 1, 256)
        async with plugged(device, setting) as p:
            body = BROADCAST + device.mac + packet("tcp4", pattern(1300, 5))[0]
            await p.guest.queues[1].request([struct.pack("<BBHHHHH", *lie), body], [])
            assert device.native_device.counters() == NicCounters(malformed=1)
            await p.guest.queues[1].request([bytes(12), frame(b"honest")], [])
            assert peer.recv(2000) == frame(b"honest")


async def test_a_guest_that_takes_nothing_makes_its_peer_wait_and_loses_nothing(folder: Path) -> None:
    where = f"unix:{folder / 's'}"
    async with station("a", listening=False, backend="socket", local=where) as s, connected(folder) as peer:
        frames = [frame(pattern(1400, number)) for number in range(2000)]
        done = trio.Event()

        async def send_all() -> None:
            await peer.stream.send_all(in_stream(*frames))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert not done.is_set()
            s.listen()
            assert [await s.next_frame() for _ in frames] == frames


async def test_a_connection_is_made_again_when_the_peer_comes_back(folder: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with station("a", backend="socket", remote=f"unix:{folder / 's'}") as a:
            await told(logs, "network peer cannot be reached; trying on")
            for _ in range(2):
                async with station("b", backend="socket", local=f"unix:{folder / 's'}") as b:
                    await joined(a, b)
    assert [line["event"] for line in logs].count("network peer cannot be reached; trying on") <= 2


async def test_datagrams_find_a_unix_peer_that_started_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_socket, "LOOK_INTERVAL", 0.02)
    here, there = (f"unixgram:{folder / name}" for name in "ab")
    async with station("a", backend="socket", local=here, remote=there) as a:
        for _ in range(2):
            async with station("b", backend="socket", local=there, remote=here) as b:
                await joined(a, b)


# ---- what cannot be had ----


def test_an_address_in_use_is_said_and_what_a_dead_daemon_left_is_not_in_the_way(folder: Path) -> None:
    path = folder / "s"
    options = NetOptions(backend="socket", local=f"unix:{path}")
    first = Net("a", options, 1, 256)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(HostError, match=f"unix:{path}: Address already in use"):
        Net("b", options, 1, 256)
    first.close()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    Net("c", options, 1, 256).close()
    path.write_text("precious")
    with pytest.raises(HostError, match="Address already in use"):
        Net("d", options, 1, 256)
    assert path.read_text() == "precious"
    with pytest.raises(HostError, match="there is one pair"):
        Net("e", options, 2, 256)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "local or remote is missing"),
        ({"local": "udp:127.0.0.1:4000"}, "datagrams need both"),
        ({"local": "tcp:127.0.0.1:4000", "remote": "tcp:127.0.0.1:4001"}, "a stream has either"),
        ({"local": "udp:127.0.0.1:4000", "remote": "unixgram:/run/x"}, "of one kind"),
        ({"local": "tcp:127.0.0.1"}, "write tcp:HOST:PORT"),
        ({"local": "tcp:127.0.0.1:0"}, "a port from 1 to 65535"),
        ({"local": "unix:relative"}, "begins with /"),
        ({"local": "fd:3"}, "is no address"),
        ({"local": "udp:0.0.0.0:4000", "remote": "udp:239.1.1.1:4000"}, "multicast"),
        ({"backend": "null", "local": "tcp:127.0.0.1:4000"}, "no meaning"),
    ],
    ids=str,
)
def test_addresses_that_make_no_sense_are_refused(options: dict[str, str], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        NetOptions(**({"backend": "socket"} | options))


def test_an_address_is_written_as_it_is_read() -> None:
    for text in ("tcp:[::1]:4433", "udp:example.org:1", "unix:/run/a:b", "unixgram:/run/x"):
        assert str(parse_address(text)) == text


def test_check_names_the_key_and_what_would_be_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.toml"
    device = '[devices.net]\ntype = "net"\nsocket = "net.sock"\nbackend = "socket"\n'
    file.write_text(device + 'remote = "tcp:peer"\n')
    assert main(["check", str(file)]) == 78
    assert f"{file}:5: [devices.net] remote: tcp:peer: write tcp:HOST:PORT" in capsys.readouterr().err
    file.write_text(device + 'local = "udp:127.0.0.1:4000"\n')
    assert main(["check", str(file)]) == 78
    assert "[devices.net]: datagrams need both local, where they come, and remote" in capsys.readouterr().err
    file.write_text(device + 'remote = "tcp:peer:4000"\nqueues = 2\n')
    assert main(["check", str(file)]) == 0
    noted = capsys.readouterr()
    assert f"{file}:6: [devices.net] queues: with backend" in noted.out + noted.err
