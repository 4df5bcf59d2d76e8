"""How many file descriptors the daemon may have, and what it costs whom when there are none."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
import pytest
import structlog
import trio
import trio.testing
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.vhost_user_wire import FrontEnd, serving, u64
from kit.project import ROOT
from structlog.testing import capture_logs

from daemon.commands.command import load_config
from daemon.running.descriptors import shares, worst_case
from virtio.clients import Shortage, receive_with_descriptors, received_descriptors, room_for
from virtio.device import DESCRIPTORS_MIN
from virtio.socket_file import Listen

DISK = """
[devices.{name}]
type = "blk"
backend = "null"
size = "1M"
socket = "{name}.sock"
"""
VSOCK = """
[devices.{name}]
type = "vsock"
cid = {cid}
path = "{name}.vsock"
socket = "{name}.sock"
connections = {connections}
"""


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend(features=wire.DEVICE_FEATURES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


@contextlib.contextmanager
def no_descriptor_left(more: int = 0) -> Iterator[None]:
    """But so many."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in os.scandir("/proc/self/fd"))
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 64, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(more):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in taken:
            os.close(number)


def test_room_is_what_really_can_be_opened() -> None:
    with no_descriptor_left(5):
        assert room_for(5)
        assert not room_for(6)
        assert room_for(5)
    assert room_for(32)


@pytest.mark.parametrize("left", [0, 1, 7])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "messages"])
async def test_descriptors_that_find_no_room_are_not_lost(kind: socket.SocketKind, left: int) -> None:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs, capture_logs() as logs:
        shortage = Shortage("a message", structlog.get_logger())
        with open(os.devnull, "rb") as nowhere:  # noqa: PTH123, ASYNC230
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes_of([nowhere.fileno()] * 8))]
            await theirs.sendmsg([b"message"], ancillary)
        received: list[tuple[bytes, int]] = []

        async def receive() -> None:
            data, came, flags = await receive_with_descriptors(ours, 100, 4096, shortage)
            fds = received_descriptors(came)
            received.append((data, len(fds)))
            assert not flags & socket.MSG_CTRUNC
            for fd in fds:
                fd.close()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                with no_descriptor_left(left):
                    nursery.start_soon(receive)
                    while not logs:
                        await trio.testing.wait_all_tasks_blocked()
                    assert received == []
        assert received == [(b"message", 8)]
        assert [entry["event"] for entry in logs] == [
            "out of descriptors: a message waits",
            "descriptors are to be had again: a message goes on",
        ]


def bytes_of(numbers: list[int]) -> bytes:
    return b"".join(number.to_bytes(4, sys.byteorder) for number in numbers)


async def test_a_front_end_keeps_its_connection_through_a_shortage_of_descriptors(
    backend: RecordingBackend, path: Path
) -> None:
    with capture_logs() as logs:
        async with serving(backend, Listen(path)) as server:
            with await FrontEnd.connect(path) as front_end:
                await front_end.negotiate()
                await front_end.start_ring()
                await front_end.ask(17)
                kick = wire.eventfd()
                with no_descriptor_left():
                    await front_end.send(wire.message(13, u64(0)), [kick])
                    while not any(entry["event"].startswith("out of descriptors") for entry in logs):
                        await trio.testing.wait_all_tasks_blocked()
                assert await front_end.ask(17) == u64(2)
            assert not server.stats.protocol_errors
            assert server.stats.connections == 1


async def test_a_front_end_that_leaves_in_a_shortage_gives_back_what_it_had(
    backend: RecordingBackend, path: Path
) -> None:
    with capture_logs() as logs:
        async with serving(backend, Listen(path)):
            front_end = await FrontEnd.connect(path)
            await front_end.negotiate()
            kick = wire.eventfd()
            with no_descriptor_left():
                await front_end.send(wire.message(13, u64(0)), [kick])
                while not any(entry["event"].startswith("out of descriptors") for entry in logs):
                    await trio.testing.wait_all_tasks_blocked()
                front_end.close()
                await backend.called("reset")


# The limit


def configuration(folder: Path, *tables: str) -> Path:
    file = folder / "hyperbell.toml"
    file.write_text('[daemon]\nmetrics = "off"\n' + "".join(tables))
    return file


def run(command: str, file: Path, soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return subprocess.run(
        [sys.executable, "-m", "daemon.cli", command, str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_check_says_how_many_descriptors_a_configuration_may_need(tmp_path: Path) -> None:
    file = configuration(tmp_path, *(DISK.format(name=f"disk{number}") for number in range(3)))
    needed = worst_case(load_config(file))
    short = run("check", file, 256, needed - 1)
    assert short.returncode == 0
    assert re.search(
        rf"may need {needed} file descriptors.*may have {needed - 1}.*LimitNOFILE={needed}\b", short.stderr
    )
    assert "LimitNOFILE" not in run("check", file, 256, needed).stderr


def test_every_device_and_all_that_it_may_connect_is_in_the_sum(tmp_path: Path) -> None:
    one = worst_case(load_config(configuration(tmp_path, DISK.format(name="a"))))
    two = worst_case(load_config(configuration(tmp_path, DISK.format(name="a"), DISK.format(name="b"))))
    assert two > one + 500  # a front-end may bring a file for each of 509 regions
    few = VSOCK.format(name="s", cid=3, connections=1)
    many = VSOCK.format(name="s", cid=3, connections=1001)
    few_sum, many_sum = (worst_case(load_config(configuration(tmp_path, table))) for table in (few, many))
    assert many_sum >= few_sum + 1000


def test_a_process_with_too_few_descriptors_shares_them_out_among_its_devices(tmp_path: Path) -> None:
    tables = [VSOCK.format(name=f"s{cid}", cid=cid, connections=512) for cid in (3, 4, 5)]
    config = load_config(configuration(tmp_path, *tables, DISK.format(name="disk")))
    needed = worst_case(config)
    enough = shares(config, needed)
    assert enough["disk"] == DESCRIPTORS_MIN
    assert set(enough.values()) == {DESCRIPTORS_MIN, 2 * 512 + 2 * 65 + 2 * 64}
    few = shares(config, 1500)
    assert few["disk"] == enough["disk"]
    assert max(few[name] - few["s3"] for name in ("s3", "s4", "s5")) <= 1
    assert DESCRIPTORS_MIN < few["s3"] < enough["s3"]
    # With them all, and front-ends that bring a table of memory each, the process has enough.
    assert needed - sum(enough.values()) + sum(few.values()) - 4 * (509 - 8) <= 1500
    assert set(shares(config, 10).values()) == {DESCRIPTORS_MIN}


SOFT = """
import resource, sys
sys.argv = ["hyperbell", "serve", {file!r}, "--log-format", "json"]
from daemon import cli
from daemon.running import app
async def run(self):
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
app.App.run = run
cli.main(sys.argv[1:])
"""


def test_the_daemon_takes_the_hard_limit_as_its_own_and_says_when_it_is_too_low(tmp_path: Path) -> None:
    file = configuration(tmp_path, DISK.format(name="disk"))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))

    done = subprocess.run(
        [sys.executable, "-c", SOFT.format(file=str(file))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["300", "300"]
    assert "LimitNOFILE=" in done.stderr
