"""``hyperbell qemu-args`` knows the QEMU it writes for, and whose devices it prints."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from daemon.attach.qemu_front_ends import FRONT_ENDS, NET_QUEUE_SIZE_MIN
from daemon.attach.qemu_version import QemuVersion, installed_version, parse_version
from daemon.cli import main
from daemon.devices.catalogue import device_types
from virtio.devices import REGISTRY
from virtio.errors import HostError

TYPES = {
    "disk": 'type = "blk"\nbackend = "null"\nsize = "1M"',
    "lan": 'type = "net"',
    "entropy": 'type = "rng"',
    "vs": 'type = "vsock"\ncid = 3\npath = "/run/h/vs.path"',
    "pins": 'type = "gpio"\nlines = ["a"]',
    "bus": 'type = "i2c"\n[[devices.bus.chips]]\nkind = "eeprom"\naddress = 80',
    "keys": 'type = "input"',
    "con": 'type = "console"\nports = [{name = "a"}, {name = "b"}]',
}
LISTENING = "\n".join(f'[devices.{name}]\nsocket = "/run/h/{name}.sock"\n{keys}' for name, keys in TYPES.items())
RECONNECTABLE = ("disk", "lan")
VERSIONS = ("7.2", "8.2", "9.0", "9.1", "9.2", "10.0.13", "10.2", "11.1", "12.0")
SHOUT = """
from virtio import Device
class Shout(Device):
    virtio_id = NUMBER
    type_name = "shout"
    async def handle(self, queue, chain): pass
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "all.toml"
    path.write_text(LISTENING)
    return path


class Printed:
    """What ``hyperbell qemu-args`` printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> None:
        assert main(["qemu-args", *map(str, arguments)]) == status
        said = capsys.readouterr()
        words = shlex.split(said.out.replace("\\\n", ""))
        self.options = list(zip(words[::2], words[1::2], strict=True))
        self.chardevs = {value.split("char-")[1].split(",")[0]: value for name, value in self.options if "-ch" in name}
        self.devices = [value for name, value in self.options if name == "-device"]
        self.said = said.err


@pytest.mark.parametrize("version", VERSIONS)
def test_what_qemu_can_reconnect_is_always_told_to_and_nothing_else_is(
    file: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    printed = Printed(capsys, file, "--qemu", version)
    word = "reconnect=1" if version in ("7.2", "8.2", "9.0", "9.1") else "reconnect-ms="
    assert {"disk", "lan", "entropy", "vs", "pins", "bus", "keys"} <= printed.chardevs.keys()
    for name, channel in printed.chardevs.items():
        assert (f",{word}" in channel) == (name in RECONNECTABLE), channel
        assert channel.count("reconnect") == (name in RECONNECTABLE)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_note_names_every_device_that_qemu_cannot_reconnect_and_says_what_to_do(
    file: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    printed = Printed(capsys, file, "--qemu", version)
    (note,) = [line for line in printed.said.splitlines() if "cannot reconnect" in line]
    named = note.partition(": after")[0]
    for name in printed.chardevs:
        assert (f"{name} (" in named) == (name not in RECONNECTABLE)
    assert "device_del NAME" in note
    # By that name the monitor knows it.
    for name in printed.chardevs.keys() - set(RECONNECTABLE):
        assert any(f"chardev=char-{name}," in device and device.endswith(f"id={name}") for device in printed.devices)


def test_devices_that_reconnect_need_no_note(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Printed(capsys, file, *RECONNECTABLE, "--qemu", "11.1").said == ""


@pytest.mark.parametrize("version", ["7.2", "11.1"])
def test_a_qemu_that_listens_is_not_told_to_reconnect(
    file: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    file.write_text(LISTENING.replace("[devices.disk]", '[devices.disk]\nmode = "connect"'))
    printed = Printed(capsys, file, "disk", "--qemu", version)
    assert printed.chardevs["disk"].endswith("disk.sock,server=on")


def test_a_console_is_attached_by_the_front_end_for_any_type_where_qemu_has_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = Printed(capsys, file, "con", "--qemu", "10.2")
    (device,) = printed.devices
    properties = dict(word.split("=") for word in device.split(",")[1:])
    assert device.startswith("vhost-user-test-device-pci,chardev=char-con,")
    # 5.3.2: two queues of the console, two for control, two for each further port.
    assert (properties["virtio-id"], properties["num_vqs"]) == ("3", "8")
    old = Printed(capsys, file, "con", "--qemu", "10.1", status=1)
    assert old.options == []
    assert 'device "con": QEMU 10.1 has no vhost-user front-end for a console device' in old.said
    assert "QEMU 10.2 has one: vhost-user-test-device-pci" in old.said


@pytest.mark.parametrize(
    ("number", "version", "driver"),
    [
        (4, "7.2", "vhost-user-rng-pci"),
        (2, "7.2", "vhost-user-blk-pci"),
        (25, "8.2", ""),
        (25, "9.0", "vhost-user-snd-pci"),
        (21, "10.1", ""),
        (21, "10.2", "vhost-user-test-device-pci"),
        (14, "11.1", ""),
        (41, "11.1", "vhost-user-gpio-pci"),
        (42, "11.1", ""),
        (45, "10.2", ""),
        (45, "11.0", "vhost-user-spi-pci"),
        (63, "11.1", ""),
        (1, "11.1", ""),
    ],
)
def test_a_device_of_your_own_is_attached_by_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, version: str, driver: str
) -> None:
    (tmp_path / "shout.py").write_text(SHOUT.replace("NUMBER", str(number)))
    (tmp_path / "c.toml").write_text('[devices.mine]\ntype = "./shout.py:Shout"\nsocket = "mine.sock"\n')
    printed = Printed(capsys, tmp_path / "c.toml", "--qemu", version, status=0 if driver else 1)
    if driver:
        assert printed.devices[0].startswith(f"{driver},chardev=char-mine")
    else:
        assert f"(type number {number})" in printed.said


@pytest.mark.parametrize("has_config", [False, True])
def test_qemu_asks_for_a_config_space_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_config: bool
) -> None:
    more = "    def config_space(self): return b'1234'\n" if has_config else ""
    (tmp_path / "shout.py").write_text(SHOUT.replace("NUMBER", "21") + more)
    (tmp_path / "c.toml").write_text('[devices.mine]\ntype = "./shout.py:Shout"\nsocket = "mine.sock"\n')
    (device,) = Printed(capsys, tmp_path / "c.toml", "--qemu", "11.1").devices
    assert ("config_size=256" in device) == has_config


def test_every_type_of_ours_is_attached_by_todays_qemu(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {keys.split('"')[1] for keys in TYPES.values()} == set(REGISTRY) == set(device_types())
    printed = Printed(capsys, file, "--qemu", "11.1")
    assert len(printed.devices) == len(TYPES)
    assert "no vhost-user front-end" not in printed.said


def test_queues_that_qemu_sizes_itself_are_as_each_version_has_them() -> None:
    sizes = {
        version: [FRONT_ENDS[number].queue_size(parse_version(version)) for number in (4, 18, 19, 34, 41)]
        for version in ("7.2", "8.2", "9.0", "11.1")
    }
    assert sizes["7.2"] == sizes["8.2"] == [4, 64, 128, 4, 256]
    assert sizes["9.0"] == sizes["11.1"] == [4, 4, 128, 4, 64]


def test_the_line_for_a_network_interface_is_one_that_qemu_can_take_without_kvm(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queues = LISTENING.replace('type = "net"', 'type = "net"\nqueues = 2')
    for text in (LISTENING, queues):
        file.write_text(text)
        (interface,) = Printed(capsys, file, "lan", "--qemu", "7.2", "--accel", "tcg").devices
        assert [word for word in interface.split(",") if word.startswith("vectors")] == ["vectors=0"]
        for more in (("7.2", "--accel", "kvm"), ("11.1", "--accel", "tcg"), ("11.1",)):
            printed = Printed(capsys, file, "lan", "--qemu", *more)
            assert "vectors=0" not in printed.devices[0]
            assert printed.said == ""
    assert "--accel tcg prints" in Printed(capsys, file, "lan", "--qemu", "7.2").said


def test_an_input_device_is_left_out_where_qemu_would_not_start_with_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        "only where the guest runs with KVM"
        in Printed(capsys, file, "keys", "--qemu", "7.2", "--accel", "tcg", status=1).said
    )
    assert "does not start with keys" in Printed(capsys, file, "keys", "--qemu", "7.2").said
    for more in (("7.2", "--accel", "kvm"), ("11.1", "--accel", "tcg"), ("11.1",)):
        printed = Printed(capsys, file, "keys", "--qemu", *more)
        assert len(printed.devices) == 1
        assert "KVM" not in printed.said


def test_a_limit_that_debian_13s_qemu_exceeds_is_noted(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(LISTENING.replace('type = "blk"', 'type = "blk"\nqueue_size = 512'))
    note = "gives each queue 1024 entries whatever is asked for"
    assert note in Printed(capsys, file, "disk", "--qemu", "10.0.13").said
    assert note not in Printed(capsys, file, "disk", "--qemu", "11.1").said
    file.write_text(LISTENING.replace('type = "blk"', 'type = "blk"\nqueue_size = 1024'))
    assert note not in Printed(capsys, file, "disk", "--qemu", "10.0.13").said


@pytest.mark.parametrize(("said", "advised"), [("", 256), ("queue_size = 64", 64), ("queue_size = 1024", 1024)])
def test_the_advised_queue_size_is_moderate_where_the_file_says_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], said: str, advised: int
) -> None:
    file.write_text(LISTENING.replace('type = "blk"', f'type = "blk"\n{said}').replace('"net"', f'"net"\n{said}'))
    assert f"queue-size={advised}" in Printed(capsys, file, "disk", "--qemu", "11.1").devices[0]
    if advised >= NET_QUEUE_SIZE_MIN:
        assert f"rx_queue_size={advised}" in Printed(capsys, file, "lan", "--qemu", "11.1").devices[0]


def test_devices_behind_an_iommu_have_it_before_them_and_a_port_each(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = LISTENING.replace('type = "blk"', 'type = "blk"\niommu = true')
    file.write_text(text.replace('type = "net"', 'type = "net"\niommu = true'))
    printed = Printed(capsys, file, "disk", "entropy", "lan", "--qemu", "7.2", "--accel", "tcg")
    assert dict(printed.options)["-machine"] == "q35,memory-backend=mem"
    iommu, *others = printed.devices
    assert iommu == "intel-iommu,device-iotlb=on"
    kinds = [device.split(",")[0] for device in others]
    assert kinds == ["pcie-root-port", "vhost-user-blk-pci", "pcie-root-port", "virtio-net-pci", "vhost-user-rng-pci"]
    assert (others[0], others[2]) == ("pcie-root-port,id=port-disk,chassis=1", "pcie-root-port,id=port-lan,chassis=2")
    assert others[1].endswith(",iommu_platform=on,ats=on,bus=port-disk")
    assert others[3].endswith(",iommu_platform=on,ats=on,bus=port-lan")
    assert "iommu" not in others[4]
    assert "port-" not in others[4]


def test_an_iommu_without_kvm_remaps_no_interrupts_where_qemu_would_by_default(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(LISTENING.replace('type = "blk"', 'type = "blk"\niommu = true'))
    assert Printed(capsys, file, "disk", "--qemu", "11.1", "--accel", "tcg").devices[0].endswith(",intremap=off")
    plain = Printed(capsys, file, "disk", "--qemu", "11.1")
    assert "intremap" not in plain.devices[0]
    assert "needs intremap=off; --accel tcg prints it" in plain.said
    assert "intremap" not in Printed(capsys, file, "disk", "--qemu", "10.0").said


def test_an_iommu_is_not_to_be_had_on_a_machine_without_pci_express(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(LISTENING.replace('type = "blk"', 'type = "blk"\niommu = true'))
    said = Printed(capsys, file, "disk", "--qemu", "11.1", "--machine", "pc", status=1).said
    assert 'device "disk": iommu = true takes a virtual IOMMU' in said


# Which QEMU


@pytest.mark.parametrize(
    ("text", "version"), [("7.2", (7, 2, 0)), ("11.1.3", (11, 1, 3)), ("10.0.13", (10, 0, 13)), ("9.2.50", (9, 2, 50))]
)
def test_a_version_is_read(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version
    assert str(parse_version(text)) == text


@pytest.mark.parametrize(
    "text", ["11", "", "abc", "7.2-rc1", "7.2.", "-1.2", "6.2", "0.0", "7.1.9", "7.2.3.4", "\uff17.2"]
)
def test_what_is_no_version_or_too_old_is_wrong_usage(
    file: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["qemu-args", str(file), f"--qemu={text}"])
    assert caught.value.code == 2
    assert "argument --qemu: " in capsys.readouterr().err


def program(tmp_path: Path, script: str) -> str:
    path = tmp_path / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_installed_qemu_is_asked_for_its_version(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, 'echo "QEMU emulator version 9.1.2 (Debian 1:9.1.2+ds-1)"; echo "Copyright (c) 2003-2024"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert installed_version() == QemuVersion(9, 1, 2)
    assert "reconnect=1" in Printed(capsys, file, "disk").chardevs["disk"]
    assert "reconnect-ms" in Printed(capsys, file, "disk", "--qemu", "9.2").chardevs["disk"]


def test_the_version_that_was_assumed_without_a_qemu_is_said(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "note: there is no qemu-system-x86_64 here: these are for QEMU 11.1" in Printed(capsys, file, "disk").said
    assert Printed(capsys, file, "disk", "--qemu", "8.0").said == ""


def test_a_qemu_that_is_newer_than_what_is_known_is_noted(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "QEMU 12.0 is newer than 11.1" in Printed(capsys, file, "disk", "--qemu", "12.0").said
    assert Printed(capsys, file, "disk", "--qemu", "11.1.9").said == ""


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo something else", "does not say a version (status 0)"),
        ("echo QEMU emulator version 8.0.0; exit 3", "does not say a version (status 3)"),
        ("echo QEMU emulator version 5.2.0", "QEMU 5.2 is too old"),
    ],
)
def test_a_qemu_that_cannot_be_asked_is_an_error_that_says_what_to_do(
    tmp_path: Path, script: str, complaint: str
) -> None:
    path = program(tmp_path, script)
    with pytest.raises(HostError) as caught:
        installed_version(path)
    assert complaint in str(caught.value)
    assert path in str(caught.value)
    assert str(caught.value).endswith("say which QEMU it is for: --qemu VERSION")


# Whose devices


def several(*guests: str | None) -> str:
    tables = []
    for number, guest in enumerate(guests):
        key = "" if guest is None else f'guest = "{guest}"\n'
        for kind in ("entropy", "lan"):
            tables.append(f'[devices.{kind}{number}]\nsocket = "/run/h/{kind}{number}.sock"\n{key}{TYPES[kind]}\n')
    return "".join(tables)


def test_the_devices_of_one_guest_are_printed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(several("web1", "web2"))
    for number, guest in enumerate(("web1", "web2")):
        printed = Printed(capsys, file, "--guest", guest, "--qemu", "11.1")
        assert list(printed.chardevs) == [f"entropy{number}", f"lan{number}"]
        assert [value for name, value in printed.options if name == "-netdev"] == [
            f"vhost-user,id=net-lan{number},chardev=char-lan{number}"
        ]
    named = Printed(capsys, file, "lan1", "--guest", "web2", "--qemu", "11.1")
    assert list(named.chardevs) == ["lan1"]


def test_a_file_of_one_named_guest_needs_no_choice(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(several("web1"))
    assert list(Printed(capsys, file, "--qemu", "11.1").chardevs) == ["entropy0", "lan0"]


def test_devices_of_several_guests_are_never_mixed_up(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(several("web1", "web2", None))
    said = Printed(capsys, file, "--qemu", "11.1", status=1)
    assert said.options == []
    assert "without the key guest: entropy2, lan2" in said.said
    assert "--guest web1 or --guest web2" in said.said
    assert list(Printed(capsys, file, "entropy2", "lan2", "--qemu", "11.1").chardevs) == ["entropy2", "lan2"]
    assert Printed(capsys, file, "entropy0", "lan2", "--qemu", "11.1", status=1).options == []


@pytest.mark.parametrize(
    ("text", "arguments", "complaint"),
    [
        (several("web1", "web2"), ["--guest", "web3"], 'no device with guest = "web3"; its guests are: web1, web2'),
        (several(None), ["--guest", "web1"], "none of its devices has the key guest"),
        (several("web1", "web2"), ["lan0", "--guest", "web2"], 'the device "lan0" is not one of the guest "web2"'),
        (several("web1"), ["lan7"], 'has no device "lan7"; it has: entropy0, lan0'),
    ],
)
def test_a_choice_that_is_not_in_the_file_is_one_clear_error(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str], complaint: str
) -> None:
    file.write_text(text)
    printed = Printed(capsys, file, *arguments, "--qemu", "11.1", status=1)
    assert printed.options == []
    assert complaint in printed.said
    assert str(file) in printed.said
    assert len(printed.said.splitlines()) == 1


def test_a_guests_name_is_checked_with_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(several("web 1"))
    assert main(["check", str(file)]) == 78
    assert f'{file}:3: [devices.entropy0] guest: "web 1" cannot be a guest\'s name' in capsys.readouterr().err
