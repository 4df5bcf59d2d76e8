"""What a device offers behind vhost-user and in a machine of our own, with the keys that an operator has for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
from kit.front_end.vhost_user_wire import FrontEnd

from config.loader import load
from config.options import parse_devices
from config.problems import ConfigError
from config.schema import DEFAULT_WORKER, WorkerConfig
from daemon.devices.catalogue import Configured, device_types
from daemon.running.assembly import Assembly, assemble
from daemon.running.files import Files
from daemon.running.opening import open_devices
from guest.boot.service import free_port, serve
from transports import TRANSPORTS
from transports.vhost_user.serving.endpoint import Inherit
from transports.vhost_user.serving.server import VhostUserServer
from virtio import spec
from virtio.devices import REGISTRY
from virtio.fd import OwnedFd
from virtio.mmio.register_file import RegisterFile

OWN: Final = """
from virtio import Chain, Device, Queue


class Echo(Device):
    virtio_id = 42
    type_name = "echo"

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(chain.read())
"""
OF_A_FILE: Final = "./echo.py:Echo"
KEYS: Final = {
    "blk": 'backend = "memory"\nsize = "1M"\n',
    "console": "",
    "gpio": 'backend = "simulated"\nlines = ["button", "led"]\n',
    "i2c": 'backend = "simulated"\nchips = [{ address = 0x50, kind = "eeprom" }]\n',
    "input": "",
    "net": "",
    "rng": "",
    "vsock": 'cid = 3\npath = "host.vsock"\n',
    OF_A_FILE: "",
}
ALWAYS: Final = ("VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_EVENT_IDX", "VIRTIO_F_VERSION_1")
every_type = pytest.mark.parametrize("kind", sorted(KEYS))


def configure(folder: Path, kind: str, more: str = "") -> dict[str, Configured]:
    (folder / "echo.py").write_text(OWN)
    path = folder / "mine.toml"
    path.write_text(f'[devices.mine]\ntype = "{kind}"\nsocket = "mine.sock"\n{KEYS[kind]}{more}\n')
    return dict(load(path, device_types(), TRANSPORTS).devices)


@asynccontextmanager
async def assembled(configured: dict[str, Configured]) -> AsyncIterator[Assembly]:
    files = Files()
    devices = await open_devices(files, configured)
    async with assemble(devices, configured, {DEFAULT_WORKER: WorkerConfig()}, files) as assembly:
        yield assembly


def ring_features(bits: int) -> set[str]:
    return {name for name, bit in spec.RING_FEATURES.items() if bits >> bit & 1}


@asynccontextmanager
async def front_end_of(folder: Path, kind: str, more: str = "") -> AsyncIterator[FrontEnd]:
    """A front-end that is connected to a device of that type."""
    configured = configure(folder, kind, more)
    async with assembled(configured) as assembly, trio.open_nursery() as nursery:
        ours, theirs = trio.socket.socketpair()
        server = VhostUserServer(assembly.backends["mine"], Inherit(OwnedFd(ours.detach())))
        nursery.start_soon(server.run)
        with FrontEnd(theirs) as front_end:
            yield front_end


async def told_to_a_front_end(folder: Path, kind: str, more: str = "") -> set[str]:
    """The ring features that a device of that type offers to a front-end which asks over its socket."""
    async with front_end_of(folder, kind, more) as front_end:
        return ring_features(int.from_bytes(await front_end.ask(1), "little"))


def test_every_type_that_there_is_is_asked() -> None:
    assert {*REGISTRY, OF_A_FILE} == KEYS.keys()


@every_type
async def test_with_no_key_but_its_own_a_device_offers_what_every_front_end_can_carry(
    kind: str, tmp_path: Path
) -> None:
    assert await told_to_a_front_end(tmp_path, kind) == set(ALWAYS)


@every_type
async def test_packed_rings_and_an_iommu_are_offered_where_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    assert await told_to_a_front_end(tmp_path, kind, "packed = true") == {*ALWAYS, "VIRTIO_F_RING_PACKED"}
    assert await told_to_a_front_end(tmp_path, kind, "iommu = true") == {*ALWAYS, "VIRTIO_F_ACCESS_PLATFORM"}


@every_type
async def test_no_front_end_is_ever_offered_the_reset_of_one_ring(kind: str, tmp_path: Path) -> None:
    """The back-end would hear nothing of it, and go on writing where the ring was."""
    more = "packed = true\niommu = true\nfeatures = { VIRTIO_F_EVENT_IDX = true }"
    offered = await told_to_a_front_end(tmp_path, kind, more)
    assert offered == {*ALWAYS, "VIRTIO_F_RING_PACKED", "VIRTIO_F_ACCESS_PLATFORM"}
    with pytest.raises(ConfigError) as caught:
        configure(tmp_path, kind, "features = { VIRTIO_F_RING_RESET = true }")
    (only,) = caught.value.problems
    assert "[devices.mine] features.VIRTIO_F_RING_RESET: cannot be offered over vhost-user" in str(only)


@every_type
async def test_the_features_of_a_key_can_be_turned_off_by_name_as_well(kind: str, tmp_path: Path) -> None:
    off = "features = { VIRTIO_F_RING_PACKED = false, VIRTIO_F_ACCESS_PLATFORM = false, VIRTIO_F_RING_RESET = false }"
    assert await told_to_a_front_end(tmp_path, kind, off) == set(ALWAYS)


@pytest.mark.parametrize(
    ("feature", "key"), [("VIRTIO_F_RING_PACKED", "packed"), ("VIRTIO_F_ACCESS_PLATFORM", "iommu")]
)
def test_a_feature_and_its_key_may_not_contradict_each_other(feature: str, key: str, tmp_path: Path) -> None:
    for more, message, hint in (
        (f"features = {{ {feature} = true }}", f"is offered by a key of its own: {key}", f"write {key} = true"),
        (f"{key} = true\nfeatures = {{ {feature} = false }}", f"turns off what {key} = true offers", "keep one"),
    ):
        with pytest.raises(ConfigError) as caught:
            configure(tmp_path, "rng", more)
        (only,) = caught.value.problems
        assert f"[devices.mine] features.{feature}: {message}" in str(only)
        assert hint in str(only)
    both = configure(tmp_path, "rng", f"{key} = true\nfeatures = {{ {feature} = true }}")
    assert getattr(both["mine"].common, key) is True


@pytest.mark.parametrize(
    ("keys", "offered"),
    [
        ("", {*ALWAYS, "VIRTIO_F_RING_PACKED", "VIRTIO_F_RING_RESET"}),
        (",packed=off", {*ALWAYS, "VIRTIO_F_RING_RESET"}),
        (",VIRTIO_F_RING_PACKED=off", {*ALWAYS, "VIRTIO_F_RING_RESET"}),
        (",iommu=on", {*ALWAYS, "VIRTIO_F_RING_PACKED", "VIRTIO_F_RING_RESET", "VIRTIO_F_ACCESS_PLATFORM"}),
    ],
)
async def test_a_machine_of_our_own_offers_packed_rings_and_their_reset_and_obeys_the_same_keys(
    keys: str, offered: set[str]
) -> None:
    configured: dict[str, Configured] = dict(parse_devices([f"rng{keys}"], device_types()))
    async with assembled(configured) as assembly:
        registers = RegisterFile(
            device_id=spec.VIRTIO_ID_RNG,
            device_features=assembly.backends["rng"].device_features(),
            queue_count=1,
            queue_size_max=256,
            config_space=lambda: b"",
        )
        words = []
        for word in range(2):
            registers.write(0x14, 4, word)  # DeviceFeaturesSel
            words.append(registers.read(0x10, 4))
    assert ring_features(words[0] | words[1] << 32) == offered


@every_type
async def test_a_config_space_is_read_in_any_length_and_written_over_what_may_only_be_read(
    kind: str, tmp_path: Path
) -> None:
    """QEMU 11's generic devices write all of it for one byte of the guest's, as it was last read."""
    async with front_end_of(tmp_path, kind) as front_end:
        await front_end.send(wire.message(3))
        offered = int.from_bytes(await front_end.ask(15), "little")
        if not offered & wire.CONFIG:
            assert kind in ("rng", "i2c", OF_A_FILE), "only what has no config space keeps it to itself"
            return
        await front_end.send(wire.message(16, wire.u64(offered)))
        whole = (await front_end.ask(24, wire.config(0, bytes(256))))[12:]
        assert len(whole) == 256
        for offset, size in ((0, 1), (0, 136), (4, 60), (255, 1)):
            part = await front_end.ask(24, wire.config(offset, bytes(size)))
            assert part[12:] == whole[offset : offset + size]
        for size in (1, 60, 136, 256):
            assert await front_end.do(25, wire.config(0, whole[:size])) == 0
            assert (await front_end.ask(24, wire.config(0, bytes(256))))[12:] == whole
        other = bytes(byte ^ 0xFF for byte in whole)
        assert await front_end.do(25, wire.config(0, other)) == 0
        after = (await front_end.ask(24, wire.config(0, bytes(256))))[12:]
        writable = {"input": range(256), "net": range(6)}.get(kind, range(0))  # input: what is asked for is answered
        assert [at for at in range(256) if after[at] != whole[at] and at not in writable] == []


@pytest.mark.parametrize("offered", [False, True])
async def test_the_operator_may_offer_a_network_interfaces_config_space_to_every_front_end(
    offered: bool, tmp_path: Path
) -> None:
    """libkrun negotiates as QEMU does, and reads the guest's address there."""
    port = free_port()
    configure(tmp_path, "net", f'offer_config = {str(offered).lower()}\n[daemon]\nmetrics = "127.0.0.1:{port}"')
    async with serve(tmp_path / "mine.toml", tmp_path, port):
        with await FrontEnd.connect(tmp_path / "mine.sock") as front_end:
            assert bool(int.from_bytes(await front_end.ask(15), "little") & wire.CONFIG) is offered
