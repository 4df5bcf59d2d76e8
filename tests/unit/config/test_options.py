"""Devices on the command line: the same keys and the same complaints as in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.options import OptionDevice, parse_devices
from config.problems import ConfigError
from daemon.devices.catalogue import device_types
from virtio.devices.blk.device import BlkOptions
from virtio.devices.gpio.options import GpioOptions
from virtio.devices.i2c.options import I2cOptions

TYPES = device_types()


def one(text: str) -> OptionDevice:
    (device,) = parse_devices([text], TYPES).values()
    return device


def complaints(*texts: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_devices(texts, TYPES)
    return [str(problem) for problem in raised.value.problems]


def test_a_device_has_its_own_options_and_those_of_every_device() -> None:
    disk = one("blk,path=/srv/disk.img,read_only=on,queues=2,queue_size=128,hypercall=auto,serial=007,name=root")
    assert disk.name == "root"
    assert disk.options == BlkOptions(path=Path("/srv/disk.img"), read_only=True, serial="007")
    assert (disk.queues, disk.common.queue_size, disk.common.hypercall) == (2, 128, "auto")
    assert disk.workers == ("default",)
    entropy = one("rng")
    assert (entropy.name, entropy.queues, entropy.common.hypercall, entropy.workers) == ("rng", 1, "offer", ())


def test_a_comma_in_a_value_is_written_twice() -> None:
    options = one("blk,path=/srv/a,,b,,,,c.img,direct=true").options
    assert options == BlkOptions(path=Path("/srv/a,b,,c.img"), direct=True)


def test_an_array_is_written_as_in_a_file_and_its_commas_once() -> None:
    pins = one('gpio,lines=["button", "a ] b","it\'s",""],control=/run/p,,q').options
    assert pins == GpioOptions(lines=("button", "a ] b", "it's", ""), control=Path("/run/p,q"))
    real = one("i2c,addresses=[0x50,81],backend=adapter,adapter=/dev/i2c-1").options
    assert real == I2cOptions(backend="adapter", adapter=Path("/dev/i2c-1"), addresses=(0x50, 81))
    bus = one("""i2c,chips=[{address=0x48,registers=[{number=1,size=2}]}, {kind='eeprom',address=0x50}],name=bus""")
    assert isinstance(bus.options, I2cOptions)
    assert (bus.name, [chip.address for chip in bus.options.chips]) == ("bus", [0x48, 0x50])
    assert (
        one("net,backend=user,forwards=tcp:127.0.0.1:1:1,,tcp:127.0.0.1:2:2").options
        == one('net,backend=user,forwards=["tcp:127.0.0.1:1:1","tcp:127.0.0.1:2:2"]').options
    )
    assert one("blk,path=[a,,b].img").options == BlkOptions(path=Path("[a,b].img")), "no array"


def test_features_are_turned_off_by_name() -> None:
    disk = one("blk,backend=null,size=1G,VIRTIO_F_EVENT_IDX=off,VIRTIO_BLK_F_DISCARD=off")
    assert disk.common.features == {"VIRTIO_F_EVENT_IDX": False, "VIRTIO_BLK_F_DISCARD": False}


def test_devices_without_a_name_are_called_by_type_and_number() -> None:
    devices = parse_devices(["rng", "blk,backend=null,size=1M", "rng", "rng,name=rng3", "rng"], TYPES)
    assert list(devices) == ["rng", "blk", "rng2", "rng3", "rng4"]


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("blok", '--device blok: there is no device type "blok"', 'did you mean "blk"?'),
        ("", '--device : there is no device type ""', "known here"),
        ("blk", "--device blk: path is missing: name the image, or set backend=memory or", ""),
        ("blk,pth=x", "--device blk,pth=x: pth: unknown key", 'did you mean "path"?'),
        ("rng,queue=1", "queue: unknown key", 'did you mean "queues"?'),
        ("blk,path=x,read_only=maybe", 'read_only: must be true or false, not "maybe"', "for example: read_only="),
        ("blk,path=x,queues=two", 'queues: must be an integer, not "two"', "for example: queues=1"),
        ("blk,path=x,queues=999", "queues: must be from 1 to 256 for a blk device", "for example: queues=1"),
        ("blk,path=x,queue_size=3", "queue_size: must be a power of two", "for example: queue_size=4"),
        ("blk,path=x,hypercall=never", "hypercall: must be 'offer', 'withhold' or 'auto'", ""),
        ("blk,path=x,VIRTIO_F_NOVEL=off", "VIRTIO_F_NOVEL: a blk device has no such feature", ""),
        ("blk,path=x,VIRTIO_F_EVENT_IDX=so", 'VIRTIO_F_EVENT_IDX: must be true or false, not "so"', ""),
        ("blk,path", "path: has no value", "write path=VALUE"),
        ("blk,", "has no value", "write KEY=VALUE"),
        ("blk,path=x,path=y", "path: stands there twice", "keep one of the two"),
        ("rng,name=no/name", "name: this name cannot be used", "begins with a letter"),
        ("rng,worker=fast", "worker: unknown key", ""),
        ("gpio,lines=button", 'lines: must be an array, not "button"', 'lines=["button", "led"]'),
        ("gpio,lines=[button]", "lines: is not an array as in TOML: Invalid value", "in double quotes"),
        ('gpio,lines=["a",control=x', "lines: is not an array as in TOML", ""),
        ('gpio,lines=["a"]b', "lines: is not an array as in TOML", ""),
        ('gpio,lines=["a"],contrl=x', "contrl: unknown key", 'did you mean "control"?'),
        ('gpio,lines=["a","a"]', "names the line 'a' twice", ""),
        ("blk,path=a\0b", "path: holds a NUL character", ""),
    ],
)
def test_a_mistake_names_the_option_and_the_key(text: str, said: str, hint: str) -> None:
    complaint = complaints(text)[0]
    assert complaint.startswith("--device ")
    assert said in complaint
    assert hint in complaint
    assert ' = "' not in complaint


def test_all_mistakes_of_all_devices_come_at_once() -> None:
    assert len(complaints("blk,pth=x,path=x,queues=0", "rng,name=a", "rng,name=a", "nothing")) == 4
