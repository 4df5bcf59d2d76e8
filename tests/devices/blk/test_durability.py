"""The block device: when a write is durable (5.2.5.2, 5.2.6.2), and that a flush is one."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.front_end.frontend import NATIVE_SETTINGS, Setting, every_native_setting, plugged
from kit.guest.blk import (
    CONFIG_WRITEBACK,
    F_CONFIG_WCE,
    F_FLUSH,
    BlkDriver,
    contents,
    folder_on_disk,
    make_disk,
    pattern,
)

from virtio.fd import OwnedFd

HERE = Path(__file__).parent
SYS_CACHESTAT = 451

PLAIN, DURABLE, ONE_SYNC, NOTHING = [2, 0, 0], [0, 2, 0], [0, 0, 1], [0, 0, 0]
# What two writes cost, as [plain writes, writes with RWF_DSYNC, syncs], by the configured mode.
EXPECTED_WRITES = {
    "writeback": {
        "both features": PLAIN,
        "FLUSH only": PLAIN,
        "CONFIG_WCE only": PLAIN,
        "neither": DURABLE,  # a driver that cannot flush must find every write durable
        "a legacy driver that can flush": PLAIN,
        "a legacy driver that cannot": DURABLE,
        "writeback = 0": DURABLE,
        "writeback = 1": PLAIN,
        "after a reset": PLAIN,
    },
    "writethrough": {
        "both features": DURABLE,
        "FLUSH only": DURABLE,
        "CONFIG_WCE only": DURABLE,
        "neither": DURABLE,
        "a legacy driver that can flush": DURABLE,
        "a legacy driver that cannot": DURABLE,
        "writeback = 0": DURABLE,
        "writeback = 1": PLAIN,
        "after a reset": DURABLE,
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """What durability_probe.py counted, of an image on a disk: one on a tmpfs is served as memory."""
    folder = tmp_path_factory.mktemp("durability")
    library = folder / "sync_calls.so"
    compile_command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(HERE / "sync_calls.c"), "-ldl"]
    subprocess.run(compile_command, check=True, timeout=60)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join([*sys.path[1:], "."])}
    with folder_on_disk(folder) as place:
        output = subprocess.run(
            [sys.executable, HERE / "durability_probe.py", place / "image"],
            check=True, capture_output=True, timeout=60, env=environment,
        )  # fmt: skip
    results: dict[str, dict[str, list[int]]] = json.loads(output.stdout)
    return results


@pytest.mark.parametrize("mode", EXPECTED_WRITES)
def test_a_write_is_durable_at_once_exactly_where_the_driver_may_count_on_it(
    measured: dict[str, dict[str, list[int]]], mode: str
) -> None:
    found = {name: count for name, count in measured[mode].items() if ":" not in name}
    assert found == EXPECTED_WRITES[mode]


@pytest.mark.parametrize("mode", EXPECTED_WRITES)
def test_a_flush_is_one_sync_whatever_the_mode(measured: dict[str, dict[str, list[int]]], mode: str) -> None:
    found = [count for name, count in measured[mode].items() if name.endswith(": flush")]
    assert found == [ONE_SYNC] * 6


@pytest.mark.parametrize("mode", EXPECTED_WRITES)
def test_zeroes_and_discards_are_durable_where_writes_are(measured: dict[str, dict[str, list[int]]], mode: str) -> None:
    for name, writes in EXPECTED_WRITES[mode].items():
        if f"{name}: zeroes" in measured[mode]:
            expected = NOTHING if writes == PLAIN else [0, 0, 2]
            assert measured[mode][f"{name}: zeroes"] == expected, name


# --- the same on both reactors, seen from the page cache ---


class Cachestat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")]


def unwritten_pages(path: Path) -> int:
    """Pages of the file that only memory has; skips where the kernel cannot tell."""
    wanted = (ctypes.c_uint64 * 2)(0, 0)  # from 0 to the end
    found = Cachestat()
    libc = ctypes.CDLL(None, use_errno=True)
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        if libc.syscall(SYS_CACHESTAT, fd.fileno(), ctypes.byref(wanted), ctypes.byref(found), 0) != 0:
            assert ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP)
            pytest.skip("this kernel has no cachestat() (Linux 6.5)")
    return int(found.dirty) + int(found.writeback)


@pytest.fixture
def clean_image(disk_folder: Path) -> Path:
    path = disk_folder / "image"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    unwritten_pages(path)  # skips here, outside of any nursery
    return path


@pytest.mark.parametrize("setting", [s for s in NATIVE_SETTINGS if s.ring == "split"], ids=str)
async def test_no_page_of_a_durable_write_is_left_in_memory_only(setting: Setting, clean_image: Path) -> None:
    async with plugged(make_disk("file", clean_image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await p.guest.link.write_config(CONFIG_WRITEBACK, b"\0")
        for n in range(8):
            await disk.write(8 * n, pattern(4096, n))
            assert unwritten_pages(clean_image) == 0
        await p.guest.link.write_config(CONFIG_WRITEBACK, b"\1")
        left = 0
        for n in range(8):  # the kernel may write any of them back by itself, but hardly all
            await disk.write(8 * n, pattern(4096, n + 1))
            left += unwritten_pages(clean_image)
        assert left > 0
        await disk.flush()
        assert unwritten_pages(clean_image) == 0


# --- what the driver sees ---


@every_native_setting
@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
async def test_the_driver_sees_the_mode_and_changes_it_only_when_that_was_negotiated(
    setting: Setting, mode: str, tmp_path: Path
) -> None:
    default = b"\1" if mode == "writeback" else b"\0"
    other = b"\0" if mode == "writeback" else b"\1"
    async with plugged(make_disk("file", tmp_path / "image", write_cache=mode), setting, start=False) as p:
        link = p.guest.link
        assert await link.device_features() & (F_FLUSH | F_CONFIG_WCE) == F_FLUSH | F_CONFIG_WCE
        await p.guest.start()
        assert await link.read_config(CONFIG_WRITEBACK, 1) == default
        await link.write_config(CONFIG_WRITEBACK, other)
        assert await link.read_config(CONFIG_WRITEBACK, 1) == other
        await link.reset()
        p.guest.forget_queues()
        await p.guest.start(without=F_CONFIG_WCE)
        assert await link.read_config(CONFIG_WRITEBACK, 1) == default
        await link.write_config(CONFIG_WRITEBACK, other)
        assert await link.read_config(CONFIG_WRITEBACK, 1) == default


@every_native_setting
@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
async def test_after_a_reset_the_default_mode_shows_before_anything_is_negotiated(
    setting: Setting, mode: str, tmp_path: Path
) -> None:
    default = b"\1" if mode == "writeback" else b"\0"
    async with plugged(make_disk("file", tmp_path / "image", write_cache=mode), setting) as p:
        link = p.guest.link
        await link.write_config(CONFIG_WRITEBACK, b"\0" if mode == "writeback" else b"\1")
        await link.reset()
        assert await link.read_config(CONFIG_WRITEBACK, 1) == default


@every_native_setting
async def test_only_the_writeback_byte_of_the_config_space_can_be_written(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting) as p:
        link = p.guest.link
        before = await link.read_config(0, 60)
        await link.write_config(0, b"\xff" * 32)
        await link.write_config(33, b"\xff" * 27)
        assert await link.read_config(0, 60) == before
        await link.write_config(0, before[:32] + b"\0" + b"\xff" * 27)
        assert await link.read_config(0, 60) == before[:32] + b"\0" + before[33:]


@every_native_setting
async def test_flushes_are_counted_and_what_was_flushed_is_in_the_file(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "image"
    async with plugged(make_disk("file", path), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        for n in range(1, 6):
            await disk.write(8 * n, pattern(4096, n))
            await disk.flush()
            assert p.op("flush") == (n, 0)
            assert contents(path)[4096 * n :][:4096] == pattern(4096, n)
