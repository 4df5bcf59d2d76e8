"""What libvirt is told."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from daemon.attach.libvirt import _letters
from daemon.cli import main

NAMES = {"qemu": "http://libvirt.org/schemas/domain/qemu/1.0"}
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
NET = """
[devices.lan]
type = "net"
socket = "/run/hyperbell/lan.sock"
mac = "02:00:5E:10:20:30"
queue_size = 512
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hyperbell.toml"
    path.write_text(TWO)
    return path


def xml(capsys: pytest.CaptureFixture[str], *arguments: object, qemu: str = "11.1") -> ElementTree.Element:
    assert main(["qemu-args", "--libvirt", "--qemu", qemu, *map(str, arguments)]) == 0
    return ElementTree.fromstring(capsys.readouterr().out)


def test_libvirt_gets_a_domain_with_shared_memory_and_vhostuser_disks(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = xml(capsys, file, "--memory", "2G")
    assert (domain.tag, domain.get("type")) == ("domain", "kvm")
    memory = domain.find("memory")
    assert memory is not None
    assert (memory.text, memory.get("unit")) == ("2048", "MiB")
    source, access = domain.find("memoryBacking/source"), domain.find("memoryBacking/access")
    assert source is not None
    assert access is not None
    assert (source.get("type"), access.get("mode")) == ("memfd", "shared")
    (disk,) = domain.findall("devices/disk")
    assert disk.attrib == {"type": "vhostuser", "device": "disk"}
    parts = {part.tag: part.attrib for part in disk}
    assert parts["driver"] == {"name": "qemu", "type": "raw", "queues": "4", "queue_size": "512"}
    assert parts["source"] == {"type": "unix", "path": "/run/hyperbell/disk.sock"}
    assert parts["target"] == {"dev": "vda", "bus": "virtio"}


def test_a_device_that_libvirt_has_no_element_for_is_one_that_qemu_makes_after_libvirts_own(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(argument.get("value")) for argument in xml(capsys, file).findall("qemu:commandline/qemu:arg", NAMES)
    ]
    assert arguments[0::2] == ["-chardev", "-device"]
    assert arguments[1] == "socket,id=char-entropy,path=/run/hyperbell/entropy.sock"
    assert json.loads(arguments[3]) == {"driver": "vhost-user-rng-pci", "chardev": "char-entropy", "id": "entropy"}


def test_every_disk_and_interface_that_libvirt_connects_reconnects(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(TWO + NET)
    sources = xml(capsys, file).findall("devices/*/source")
    assert len(sources) == 2
    for source in sources:
        (reconnect,) = source
        assert (reconnect.tag, reconnect.attrib) == ("reconnect", {"enabled": "yes", "timeout": "1"})
    file.write_text(NET.replace("queue_size", 'mode = "connect"\nqueue_size'))
    (source,) = xml(capsys, file).findall("devices/*/source")
    assert len(source) == 0
    assert source.get("mode") == "server"


def test_a_disk_that_connects_is_no_vhostuser_disk_of_libvirt(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(TWO.replace("queues = 4", 'mode = "connect"\nqueues = 4'))
    domain = xml(capsys, file, "disk")
    assert domain.findall("devices/disk") == []
    arguments = [str(argument.get("value")) for argument in domain.findall("qemu:commandline/qemu:arg", NAMES)]
    assert arguments[1].endswith(",server=on")
    assert json.loads(arguments[3])["num-queues"] == 4


def test_disks_are_named_as_linux_names_them() -> None:
    assert [_letters(index) for index in (0, 25, 26, 51, 52, 701, 702)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]


def test_libvirt_gets_a_vhostuser_interface(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(TWO + NET.replace("queue_size", "queues = 4\nmtu = 1400\nqueue_size"))
    domain = xml(capsys, file)
    assert len(domain.findall("devices/disk")) == 1
    (interface,) = domain.findall("devices/interface")
    assert interface.attrib == {"type": "vhostuser"}
    assert {part.tag: part.attrib for part in interface} == {
        "mac": {"address": "02:00:5e:10:20:30"},
        "source": {"type": "unix", "path": "/run/hyperbell/lan.sock", "mode": "client"},
        "model": {"type": "virtio"},
        "driver": {"queues": "4", "rx_queue_size": "512", "tx_queue_size": "512"},
        "mtu": {"size": "1400"},
    }
    assert not any("lan" in str(element.get("value")) for element in domain.iter())


def test_a_guest_without_kvm_is_another_type_of_domain(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(TWO + NET)
    assert xml(capsys, file, "--accel", "tcg").get("type") == "qemu"
    assert xml(capsys, file, "--accel", "kvm").get("type") == "kvm"
    assert main(["qemu-args", str(file), "--libvirt", "--qemu", "11.1"]) == 0
    assert "--accel tcg makes it one of" in capsys.readouterr().err
    old = xml(capsys, file, "--accel", "tcg", qemu="7.2")
    (device,) = old.findall("qemu:override/qemu:device", NAMES)
    (alias,) = old.findall("devices/interface/alias")
    (changed,) = device.findall("qemu:frontend/qemu:property", NAMES)
    assert device.get("alias") == alias.get("name") == "ua-lan"
    assert changed.attrib == {"name": "vectors", "type": "unsigned", "value": "0"}
    assert xml(capsys, file, "--accel", "tcg").findall("qemu:override", NAMES) == []


def completed(domain: ElementTree.Element) -> str:
    """With the elements that a user's own domain has."""
    for tag, text in (("name", "web1"), ("vcpu", "4")):
        ElementTree.SubElement(domain, tag).text = text
    machine = ElementTree.SubElement(ElementTree.SubElement(domain, "os"), "type", {"arch": "x86_64", "machine": "q35"})
    machine.text = "hvm"
    ElementTree.register_namespace("qemu", NAMES["qemu"])
    return ElementTree.tostring(domain, encoding="unicode")


@pytest.mark.parametrize("accel", ["kvm", "tcg"])
@pytest.mark.parametrize("qemu", ["7.2", "11.1"])
@pytest.mark.parametrize("more", [(), ("--hypercall",)])
def test_the_domain_is_valid_by_libvirts_own_schema(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], accel: str, qemu: str, more: tuple[str, ...]
) -> None:
    validator = shutil.which("virt-xml-validate")
    if validator is None:
        pytest.skip("virt-xml-validate is not installed (Debian: libvirt-clients)")
    text = TWO.replace("queues = 4", "queues = 4\niommu = true")
    file.write_text('[daemon]\nhypercall_socket = "h.sock"\n' + text + NET)
    domain = xml(capsys, file, "--accel", accel, *more, qemu=qemu)
    (tmp_path / "domain.xml").write_text(completed(domain))
    checked = subprocess.run(
        [validator, tmp_path / "domain.xml", "domain"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
