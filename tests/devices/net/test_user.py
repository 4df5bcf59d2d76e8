"""The network device's back end ``user``: addresses, connections both ways, what is kept in, and what survives."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from kit.net.internet import IPV6, Host, RefusedError, ethertype
from kit.net.packets import internet_sum
from kit.net.station import BROADCAST, Station, free_port, station
from pydantic import ValidationError

from daemon.cli import main
from virtio.devices.net import user as net_user
from virtio.devices.net.device import Net, NetOptions
from virtio.devices.net.user import UserPeer
from virtio.errors import HostError
from virtio.testing.queue import GUARD

ROUTER = "10.0.2.2"


@contextlib.asynccontextmanager
async def on_user(**options: Any) -> AsyncIterator[Host]:
    """A guest with an address by DHCP."""
    async with station("guest", backend="user", **options) as s:
        host = Host(s)
        await host.dhcp()
        await host.arp(str(options.get("host", ROUTER)))
        yield host


def peer_of(s: Station) -> UserPeer:
    peer = s.device._peer
    assert isinstance(peer, UserPeer)
    return peer


class Server:
    """Listens on 127.0.0.1 and says what it is told in capitals."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        async with stream:
            async for data in stream:
                await stream.send_all(bytes(data).upper())


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
        server.port = listeners[0].socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()


async def is_out_of_reach(host: Host, server: Server) -> bool:
    with trio.move_on_after(0.3), contextlib.suppress(RefusedError):
        await host.connect(ROUTER, server.port)
    return server.connections == 0


async def answered(host: Host) -> None:
    """Ping until there is an answer."""
    with trio.fail_after(GUARD):
        while True:
            with trio.move_on_after(0.5):
                await host.ping(ROUTER)
                return


def said_of(process: int, file: str, what: str) -> str:
    """A line of ``file`` of the process, in /proc."""
    text = Path(f"/proc/{process}/{file}").read_text()
    return next(line for line in text.splitlines() if line.startswith(what))


def open_files(process: int | str = "self") -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


async def test_dhcp_gives_an_address_a_router_and_a_name_server() -> None:
    async with on_user(hostname="little-guest") as host:
        assert str(host.address) == "10.0.2.15"
        assert host.lease[1] == bytes([255, 255, 255, 0])
        assert host.lease[3] == bytes([10, 0, 2, 2])
        assert host.lease[6] == bytes([10, 0, 2, 3])
        assert host.lease[12] == b"little-guest"


async def test_the_network_is_the_one_that_was_asked_for() -> None:
    options = {"network": "192.168.7.0/28", "host": "192.168.7.1", "dns": "192.168.7.2", "dhcp_start": "192.168.7.5"}
    async with on_user(**options, mtu=9000) as host:
        assert str(host.address) == "192.168.7.5"
        assert host.lease[1] == bytes([255, 255, 255, 240])
        assert host.lease[3] == bytes([192, 168, 7, 1])
        await host.ping("192.168.7.1")


async def test_the_host_answers_pings_and_talks_tcp_and_udp_with_the_guest() -> None:
    async with on_user(host_loopback=True) as host, serving() as server:
        await host.ping(ROUTER)
        connection = await host.connect(ROUTER, server.port)
        text = bytes(range(97, 123)) * 500
        await connection.send(text)
        assert await connection.receive(len(text)) == text.upper()
        await connection.finish()
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
            await echo.bind(("127.0.0.1", 0))
            await host.send_udp(ROUTER, echo.getsockname()[1], b"question")
            with trio.fail_after(GUARD):
                data, source = await echo.recvfrom(100)
                assert data == b"question"
                await echo.sendto(b"answer", source)
            assert await host.receive_udp() == b"answer"


async def test_what_listens_on_the_hosts_loopback_is_not_the_guests_unless_it_is_allowed() -> None:
    async with on_user() as host, serving() as server:
        assert await is_out_of_reach(host, server)
        await host.ping(ROUTER)


async def test_a_port_of_the_host_is_forwarded_to_the_guest() -> None:
    port = free_port()
    async with on_user(forwards=[f"tcp:127.0.0.1:{port}:22"], restrict=True) as host:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(b"hello")
        connection = await host.accept(22)
        assert await connection.receive(5) == b"hello"
        await connection.send(b"SSH")
        with trio.fail_after(GUARD):
            assert bytes(await stream.receive_some()) == b"SSH"
        await stream.aclose()


async def test_nothing_goes_out_of_a_restricted_network() -> None:
    async with on_user(restrict=True, host_loopback=True) as host, serving() as server:
        assert await is_out_of_reach(host, server)
        await host.dhcp()


@pytest.mark.parametrize("ipv6", [True, False])
async def test_routers_are_advertised_where_there_is_ipv6(ipv6: bool) -> None:
    async with on_user(ipv6=ipv6) as host:
        s = host.station
        source, target = bytes.fromhex("fe80" + 13 * "00" + "01"), bytes.fromhex("ff02" + 13 * "00" + "02")
        icmp = struct.pack(">BBHI", 133, 0, 0, 0)
        total = internet_sum(source + target + struct.pack(">II", len(icmp), 58) + icmp)
        icmp = icmp[:2] + struct.pack(">H", 0xFFFF - total) + icmp[4:]
        await s.send(
            struct.pack(">IHBB", 6 << 28, len(icmp), 58, 255) + source + target + icmp,
            bytes.fromhex("333300000002"),
            IPV6,
        )
        if ipv6:
            advertised = await s.wait_for(lambda f: ethertype(f) == IPV6 and f[20] == 58 and f[54] == 134)
            assert bytes.fromhex("fec0" + 14 * "00") in advertised
        else:
            await host.ping(ROUTER)
            with trio.move_on_after(0.2):
                pytest.fail(f"{(await s.wait_for(lambda f: ethertype(f) == IPV6))!r}")


# ---- booting from the network ----


async def test_dhcp_tells_what_to_boot_and_tftp_has_it_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "efi").mkdir()
    files = {"boot.img": os.urandom(5000), "efi/grub.efi": os.urandom(1024), "empty": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    options = {"bootfile": "boot.img", "tftp": open_folder(tmp_path)}
    async with on_user(**options, restrict=True) as host:
        assert (str(host.boot_server), host.bootfile) == (ROUTER, "boot.img")
        for number, (name, data) in enumerate(files.items()):
            assert await host.tftp(ROUTER, name, own_port=4001 + number) == data
        assert await host.tftp(ROUTER, "/boot.img", own_port=5000) == files["boot.img"]


@pytest.mark.parametrize("name", ["none", "..", "../secret", "/../secret", "inner/../../secret", "inner", "inner/", ""])
async def test_tftp_has_nothing_but_the_files_below_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "served"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    async with on_user(tftp=open_folder(folder)) as host:
        assert host.bootfile == ""
        with pytest.raises(RefusedError), trio.fail_after(GUARD):
            await host.tftp(ROUTER, name)
        await host.ping(ROUTER)


async def test_without_a_folder_there_is_no_tftp_and_without_a_name_nothing_to_boot() -> None:
    async with on_user(bootfile="http://10.0.2.2/boot.ipxe") as host:
        assert host.bootfile == "http://10.0.2.2/boot.ipxe"
        with pytest.raises(RefusedError), trio.fail_after(GUARD):
            await host.tftp(ROUTER, "boot.ipxe")
    async with on_user() as host:
        assert host.bootfile == ""


def open_folder(folder: Path) -> Path:
    """The process may be another user's, who need not see the folders above."""
    folder.chmod(0o755)
    return folder


def test_a_folder_for_tftp_that_cannot_be_had_is_named_at_start_and_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    config = tmp_path / "net.toml"
    for name, at_start, by_check in (
        ("none", "No such file or directory", "does not exist"),
        ("file", "Not a directory", "is not a folder"),
    ):
        with pytest.raises(HostError, match=f"tftp: {tmp_path / name}: {at_start}"):
            Net("guest", NetOptions(backend="user", tftp=tmp_path / name), 1, 256)
        config.write_text(f'[devices.net]\ntype = "net"\nsocket = "s"\nbackend = "user"\ntftp = "{name}"\n')
        main(["check", str(config)])
        told = capsys.readouterr()
        assert f"{config}:5: [devices.net] tftp: {tmp_path / name} {by_check}" in told.out + told.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's user network is another user's")
def test_a_folder_that_its_server_may_not_read_is_named_with_the_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(HostError, match=f"tftp: {tmp_path}: the user nobody, who serves it, may not read it"):
        Net("guest", NetOptions(backend="user", tftp=tmp_path), 1, 256)


def test_several_networks_may_serve_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "net.toml"
    config.write_text(
        "".join(
            f'[devices.net{n}]\ntype = "net"\nsocket = "s{n}"\nbackend = "user"\ntftp = "{tmp_path}"\n' for n in (1, 2)
        )
    )
    assert main(["check", str(config)]) == 0, capsys.readouterr().err


# ---- the process ----


async def test_it_ends_with_the_device_and_leaves_nothing_behind() -> None:
    before = open_files()
    port = free_port()
    async with on_user(forwards=[f"tcp:127.0.0.1:{port}:22"]) as host:
        process = peer_of(host.station)._process
        assert said_of(process.pid, "limits", "Max open files").split()[3:5] == ["1024", "1024"]
        assert os.geteuid() != 0 or said_of(process.pid, "status", "Uid:").split()[1:] == ["65534"] * 4
    assert process.returncode == 0
    assert open_files() == before
    with socket.socket() as free_again:
        free_again.bind(("127.0.0.1", port))


async def test_it_ends_with_a_daemon_that_is_killed() -> None:
    text = """
import time
from virtio.devices.net.device import Net, NetOptions
net = Net("guest", NetOptions(backend="user"), 1, 256)
print(net._peer._process.pid, flush=True)
time.sleep(60)
"""
    daemon = await trio.lowlevel.open_process([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    with trio.fail_after(GUARD):
        pid = int(await daemon.stdout.receive_some())
        pidfd = os.pidfd_open(pid)
        daemon.kill()
        await daemon.wait()
        await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)
    await daemon.stdout.aclose()


async def test_one_that_dies_is_started_anew_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_user, "RESTART_MIN", 0.01)
    with structlog.testing.capture_logs() as logs:
        async with on_user() as host:
            first = peer_of(host.station)._process
            first.send_signal(signal.SIGKILL)
            await answered(host)
            assert peer_of(host.station)._process is not first
    ends = [line for line in logs if line["log_level"] == "error"]
    assert [line["how"] for line in ends] == ["SIGKILL"]


async def test_a_guest_that_opens_connections_without_end_takes_none_of_the_daemons_files() -> None:
    async with on_user(host_loopback=True) as host, serving() as server:
        before = open_files()
        for own_port in range(10000, 11500):
            tcp = struct.pack(">HHIIBBHHH", own_port, server.port, 1, 0, 0x50, 2, 60000, 0, 0)
            pseudo = host.address.packed + bytes([10, 0, 2, 2]) + struct.pack(">HH", 6, len(tcp))
            tcp = tcp[:16] + struct.pack(">H", 0xFFFF - internet_sum(pseudo + tcp)) + tcp[18:]
            await host._send(6, tcp, IPv4Address(ROUTER))
        await answered(host)  # what came meanwhile, and nobody took, is lost
        # The server's ends of these connections are in this process too.
        assert open_files(peer_of(host.station)._process.pid) <= 1024
        assert open_files() - before <= 1024


async def test_nonsense_from_the_guest_harms_nobody() -> None:
    chance = random.Random(4)
    async with on_user() as host:
        for number in range(2000):
            kind = chance.choice([0x0800, 0x0806, 0x86DD, 0x8100, number])
            body = bytearray(chance.randbytes(chance.choice([1, 20, 60, 300, 1500])))
            if kind == 0x0800:
                body[:1] = b"\x45"
            await host.station.send(bytes(body), chance.choice([BROADCAST, host.router]), kind)
        await answered(host)


# ---- what cannot be had ----


def test_a_forwarded_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"forwards: tcp:127.0.0.1:{port}: Address already in use"):
            Net("guest", NetOptions(backend="user", forwards=(f"tcp:127.0.0.1:{port}:22",)), 1, 256)
    with pytest.raises(HostError, match="there is one pair"):
        Net("guest", NetOptions(backend="user"), 2, 256)


def test_a_machine_without_libslirp_is_told_which_package_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libslirp.so.0").write_bytes(b"")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"libslirp is missing .*: install the Debian package libslirp0"):
        Net("guest", NetOptions(backend="user"), 1, 256)


def test_a_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HostError, match="ended at its start: it said nothing"):
        Net("guest", NetOptions(backend="user"), 1, 256)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"forwards": ["2222:22"]}, "write tcp:HOST_ADDRESS"),
        ({"forwards": ["tcp:localhost:2222:22"]}, "write tcp:HOST_ADDRESS"),
        ({"forwards": ["tcp:127.0.0.1:2222:0"]}, "no port"),
        ({"forwards": ["tcp:127.0.0.1:2222:22", "tcp:127.0.0.1:2222:23"]}, "another one"),
        ({"forwards": ["tcp:127.0.0.1:2222:10.0.3.1:22"]}, "outside the network"),
        ({"network": "10.0.2.0/28"}, "dhcp_start = 10.0.2.15 lies outside"),
        ({"network": "10.0.2.0/31"}, "too small"),
        ({"network": "10.0.2.1/24"}, "not a valid IPv4 network"),
        ({"host": "10.0.2.3"}, "dns = 10.0.2.3 is taken"),
        ({"dns": "8.8.8.8"}, "lies outside the network"),
        ({"mtu": 100}, "from 220 to 65521"),
        ({"hostname": "a" * 33}, "match"),
        ({"bootfile": "a" * 128}, "match"),
        ({"bootfile": ""}, "match"),
        ({"backend": "tap", "tftp": "/srv/tftp"}, "no meaning"),
        ({"backend": "switch", "switch": "lan", "bootfile": "x"}, "no meaning"),
        ({"backend": "null", "restrict": True}, "no meaning"),
        ({"backend": "tap", "forwards": ["tcp:127.0.0.1:2222:22"]}, "no meaning"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        NetOptions(**({"backend": "user"} | options))


def test_check_names_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.toml"
    file.write_text(
        '[devices.net]\ntype = "net"\nsocket = "net.sock"\nbackend = "user"\nforwards = ["tcp:127.0.0.1:22"]\n'
    )
    assert main(["check", str(file)]) == 78
    assert f"{file}:5: [devices.net] forwards: tcp:127.0.0.1:22: write tcp:HOST_ADDRESS" in capsys.readouterr().err
