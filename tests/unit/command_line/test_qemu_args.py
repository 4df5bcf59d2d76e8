"""What QEMU is told."""

from __future__ import annotations

import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from daemon.cli import main

OLD = ("--qemu", "7.2")
TWO = """
[devices.disk]
type = "blk"
backend = "null"
size = "1M"
socket = "/run/hyperbell/disk.sock"
queues = 4
queue_size = 512
[devices.entropy]
type = "rng"
socket = "/run/hyperbell/entropy.sock"
"""
VSOCK = """
[devices.vsock]
type = "vsock"
socket = "/run/hyperbell/vsock.sock"
cid = 3
path = "/run/hyperbell/guest.vsock"
"""
CONSOLE = """
[devices.console]
type = "console"
socket = "/run/hyperbell/console.sock"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hyperbell.toml"
    path.write_text(TWO)
    return path


def options(text: str) -> list[tuple[str, str]]:
    """The options in ``text`` as a shell would hand them to QEMU."""
    words = shlex.split(text.replace("\\\n", ""))
    return list(zip(words[::2], words[1::2], strict=True))


def test_every_device_gets_a_chardev_and_a_device_and_shares_the_memory(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qemu-args", *OLD, str(file)]) == 0
    assert options(capsys.readouterr().out) == [
        ("-m", "256M"),
        ("-object", "memory-backend-memfd,id=mem,size=256M,share=on"),
        ("-machine", "memory-backend=mem"),
        ("-chardev", "socket,id=char-disk,path=/run/hyperbell/disk.sock,reconnect=1"),
        ("-device", "vhost-user-blk-pci,chardev=char-disk,num-queues=4,queue-size=512"),
        ("-chardev", "socket,id=char-entropy,path=/run/hyperbell/entropy.sock"),
        ("-device", "vhost-user-rng-pci,chardev=char-entropy,id=entropy"),
    ]


def test_each_option_has_a_line_and_all_but_the_last_go_on(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["qemu-args", *OLD, str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("-") for line in lines)
    assert [line.endswith(" \\") for line in lines] == [True] * 6 + [False]


def test_one_device_memory_and_machine_can_be_chosen(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qemu-args", *OLD, str(file), "entropy", "--memory", "4G", "--machine", "q35"]) == 0
    found = options(capsys.readouterr().out)
    assert ("-machine", "q35,memory-backend=mem") in found
    assert ("-object", "memory-backend-memfd,id=mem,size=4G,share=on") in found
    assert [argument for name, argument in found if name == "-device"] == [
        "vhost-user-rng-pci,chardev=char-entropy,id=entropy"
    ]


def test_a_device_that_connects_finds_qemu_listening(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(TWO.replace("queues = 4", 'mode = "connect"'))
    main(["qemu-args", *OLD, str(tmp_path / "c.toml"), "disk"])
    assert ("-chardev", "socket,id=char-disk,path=/run/hyperbell/disk.sock,server=on") in options(
        capsys.readouterr().out
    )


def test_odd_characters_in_a_path_reach_qemu_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(TWO.replace("hyperbell/disk", "my disks, 'one'"))
    main(["qemu-args", *OLD, str(tmp_path / "c.toml"), "disk"])
    assert ("-chardev", "socket,id=char-disk,path=/run/my disks,, 'one'.sock,reconnect=1") in options(
        capsys.readouterr().out
    )


def test_a_socket_device_is_attached_and_tells_its_context_id_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(VSOCK)
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml")]) == 0
    assert options(capsys.readouterr().out)[3:] == [
        ("-chardev", "socket,id=char-vsock,path=/run/hyperbell/vsock.sock"),
        ("-device", "vhost-user-vsock-pci,chardev=char-vsock,id=vsock"),
    ]


def test_a_device_without_a_front_end_is_named_on_stderr_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(TWO + CONSOLE)
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml")]) == 0
    captured = capsys.readouterr()
    assert "console" not in captured.out
    assert 'device "console"' in captured.err
    assert "no vhost-user front-end" in captured.err
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml"), "console"]) == 1
    assert capsys.readouterr().out == ""


def test_an_unknown_device_is_a_failure_that_names_the_known_ones(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qemu-args", *OLD, str(file), "dsik"]) == 1
    assert "disk, entropy" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0M", "256", "1T", "-1G", "256M,share=off"])
def test_a_memory_size_is_megabytes_or_gigabytes(file: Path, size: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["qemu-args", *OLD, str(file), f"--memory={size}"])
    assert caught.value.code == 2


NET = """
[devices.lan]
type = "net"
socket = "/run/hyperbell/lan.sock"
mac = "02:00:5E:10:20:30"
queue_size = 512
"""


def test_a_network_interface_gets_a_netdev_and_its_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(NET)
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml")]) == 0
    assert options(capsys.readouterr().out)[3:] == [
        ("-chardev", "socket,id=char-lan,path=/run/hyperbell/lan.sock,reconnect=1"),
        ("-netdev", "vhost-user,id=net-lan,chardev=char-lan"),
        (
            "-device",
            "virtio-net-pci,netdev=net-lan,mac=02:00:5e:10:20:30,rx_queue_size=512,tx_queue_size=512",
        ),
    ]


def test_a_network_interface_with_several_queues_has_an_interrupt_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(NET + "queues = 4\nmtu = 1400\n")
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml")]) == 0
    found = dict(options(capsys.readouterr().out))
    assert found["-netdev"] == "vhost-user,id=net-lan,chardev=char-lan,queues=4"
    interface = found["-device"].split(",")
    assert {"mq=on", "vectors=10", "host_mtu=1400"} < set(interface)


def test_a_network_interface_with_queues_too_small_for_qemu_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(NET.replace("512", "128"))
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml"), "lan"]) == 1
    assert "256 to 1024 entries; set queue_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "driver", "entries"),
    [
        ('type = "gpio"\nlines = ["a"]', "vhost-user-gpio-pci", 256),
        ('type = "i2c"\n[[devices.d.chips]]\nkind = "eeprom"\naddress = 80', "vhost-user-i2c-pci", 4),
        ('type = "input"', "vhost-user-input-pci", 64),
    ],
)
def test_queues_smaller_than_what_qemu_insists_on_are_refused_with_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str, driver: str, entries: int
) -> None:
    for size, status in ((entries, 0), (entries // 2, 1)):
        (tmp_path / "c.toml").write_text(f'[devices.d]\nsocket = "s.sock"\nqueue_size = {size}\n{keys}\n')
        assert main(["qemu-args", *OLD, str(tmp_path / "c.toml"), "d"]) == status
        said = capsys.readouterr()
        assert (f"{driver},chardev=char-d" in said.out) == (status == 0)
        assert (f"set queue_size = {entries} or more" in said.err) == (status == 1)


def test_qemu_and_libvirt_are_told_of_packed_rings_and_an_iommu_where_the_device_offers_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = "packed = true\niommu = true\ntype = "
    (tmp_path / "c.toml").write_text((TWO + NET).replace("type = ", both))
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml")]) == 0
    devices = [argument for name, argument in options(capsys.readouterr().out) if name == "-device"]
    devices = [device for device in devices if "chardev=" in device or "netdev=" in device]
    assert len(devices) == 3
    assert all(",packed=on,iommu_platform=on,ats=on" in device for device in devices)
    assert main(["qemu-args", *OLD, str(tmp_path / "c.toml"), "--libvirt"]) == 0
    domain = ElementTree.fromstring(capsys.readouterr().out)
    drivers = [*domain.findall("devices/disk/driver"), *domain.findall("devices/interface/driver")]
    assert len(drivers) == 2
    assert all({"packed": "on", "iommu": "on", "ats": "on"}.items() <= driver.attrib.items() for driver in drivers)
    assert any('"packed": true, "iommu_platform": true' in str(element.get("value")) for element in domain.iter())
