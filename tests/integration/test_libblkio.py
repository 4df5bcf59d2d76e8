"""libblkio itself as the front-end of disks with default keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from kit.front_end.scene import DaemonProcess, LogBook
from kit.host.libblkio import Blkio, blkio

SIZE: Final = 16 << 20
LENGTH: Final = 64 << 10
CONFIGURATION: Final = """
[daemon]
metrics = "off"

[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"
queues = 2
"""


class House:
    """A daemon with one disk, which may be started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = LogBook()
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(SIZE))
        (folder / "disk.toml").write_text(CONFIGURATION)
        self.start()

    def start(self) -> None:
        mark = self.log.mark
        self.daemon = DaemonProcess(self.folder / "disk.toml", self.log)
        self.log.wait_for(mark, "serving")

    def complaints(self) -> list[str]:
        return [entry["event"] for entry in self.log.since(0) if entry["level"] in ("warning", "error")]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    assert house.daemon.stop() == 0


def use(disk: Blkio, image: Path, queue: int = 0) -> None:
    """Every kind of request, and what it does to the image."""
    content = os.urandom(4 * LENGTH)
    disk.memory[: len(content)] = content
    for at in range(0, len(content), LENGTH):
        disk.ask("write", at, at, LENGTH, queue=queue)
    assert disk.done(4, queue=queue) == [0] * 4
    disk.ask("flush", queue=queue)
    assert disk.done(queue=queue) == [0]
    assert image.read_bytes()[: len(content)] == content
    disk.ask("read", 8 * LENGTH, LENGTH, LENGTH, queue=queue)
    assert disk.done(queue=queue) == [0]
    assert disk.memory[8 * LENGTH : 9 * LENGTH] == content[LENGTH : 2 * LENGTH]
    disk.ask("write_zeroes", 0, LENGTH, queue=queue)
    disk.ask("discard", 2 * LENGTH, LENGTH, queue=queue)
    assert disk.done(2, queue=queue) == [0, 0]
    assert image.read_bytes()[:LENGTH] == bytes(LENGTH)


def test_each_kind_of_request_does_what_it_says_on_each_queue(house: House) -> None:
    with blkio(house.folder / "disk.sock", queues=2) as disk:
        assert disk.capacity == SIZE
        for queue in range(2):
            use(disk, house.image, queue)
    assert house.complaints() == []


def test_it_comes_back_as_often_as_it_likes_and_after_a_restart_of_the_daemon(house: House) -> None:
    for _ in range(3):
        with blkio(house.folder / "disk.sock") as disk:
            use(disk, house.image)
    assert house.daemon.stop() == 0
    house.start()
    with blkio(house.folder / "disk.sock") as disk:
        use(disk, house.image)
    assert house.complaints() == []
