"""What the operator turns off takes with it what requires it, and what must be offered cannot be turned off."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from config.loader import Config, load
from config.problems import ConfigError
from daemon.devices.catalogue import device_types, feature_bits
from daemon.devices.features import ALWAYS_OFFERED, REQUIREMENTS
from daemon.running.assembly import assemble
from daemon.running.files import Files
from daemon.running.opening import open_devices
from transports import TRANSPORTS
from virtio.devices import REGISTRY

KEYS = {
    "net": 'backend = "switch"\nswitch = "lan"\nqueues = 2\n',
    "blk": 'backend = "memory"\nsize = "1M"\n',
    "i2c": 'backend = "simulated"\nchips = [{ address = 0x50, kind = "eeprom" }]\n',
    "vsock": 'cid = 3\npath = "host.vsock"\n',
}


def configured(folder: Path, kind: str, *off: str) -> Config:
    features = ", ".join(f"{name} = false" for name in off)
    path = folder / "mine.toml"
    path.write_text(f'[devices.mine]\ntype = "{kind}"\nsocket = "mine.sock"\n{KEYS[kind]}features = {{ {features} }}\n')
    return load(path, device_types(), TRANSPORTS)


async def offered(folder: Path, kind: str, *off: str) -> set[str]:
    """The names of the features that the driver of a device of that kind is offered."""
    config = configured(folder, kind, *off)
    files = Files()
    devices = await open_devices(files, config.devices)
    async with assemble(devices, config.devices, config.workers, files) as assembly:
        bits = assembly.backends["mine"].device_features()
    return {name for name, bit in feature_bits(REGISTRY[kind]).items() if bits >> bit & 1}


def net(*names: str) -> set[str]:
    return {f"VIRTIO_NET_F_{name}" for name in names}


@pytest.mark.parametrize(
    ("kind", "off", "with_it"),
    [
        ("net", net("CTRL_VQ"), net("MQ", "CTRL_RX", "GUEST_ANNOUNCE", "CTRL_MAC_ADDR")),
        ("net", net("CSUM"), net("HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO")),
        ("net", net("GUEST_CSUM"), net("GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6")),
        ("net", net("HOST_TSO4"), set()),
        ("net", net("HOST_TSO4", "HOST_TSO6"), net("HOST_ECN")),
        ("net", net("GUEST_TSO4", "GUEST_TSO6"), net("GUEST_ECN")),
        ("net", net("STATUS"), net("GUEST_ANNOUNCE")),
        ("net", net("MRG_RXBUF"), set()),
        ("blk", {"VIRTIO_BLK_F_FLUSH"}, {"VIRTIO_BLK_F_CONFIG_WCE"}),
        ("blk", {"VIRTIO_BLK_F_CONFIG_WCE"}, set()),
        ("vsock", {"VIRTIO_VSOCK_F_STREAM"}, set()),
    ],
)
async def test_what_requires_a_feature_that_is_turned_off_is_not_offered_either(
    tmp_path: Path, kind: str, off: set[str], with_it: set[str]
) -> None:
    before = await offered(tmp_path, kind)
    assert off | with_it <= before
    with capture_logs() as logs:
        after = await offered(tmp_path, kind, *sorted(off))
    assert before - after == off | with_it
    told = [line["features"] for line in logs if line["event"] == "not offered: requires what is turned off"]
    assert told == ([sorted(with_it)] if with_it else [])


@pytest.mark.parametrize(("kind", "name"), [("i2c", "VIRTIO_I2C_F_ZERO_LENGTH_REQUEST"), ("net", "VIRTIO_F_VERSION_1")])
def test_what_a_device_must_offer_cannot_be_turned_off(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path, kind, name)
    (only,) = caught.value.problems
    assert f"[devices.mine] features.{name}: is always offered: " in str(only)
    assert "(virtio 1.3, " in str(only)


def test_the_names_in_the_tables_are_those_that_devices_offer() -> None:
    known = {name for kind in REGISTRY.values() for name in feature_bits(kind)}
    for name, one_of in REQUIREMENTS:
        assert {name, *one_of} <= known
    assert known >= ALWAYS_OFFERED.keys()
