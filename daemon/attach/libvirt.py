"""The parts of a libvirt domain that attach the configured devices.

Disks are ``<disk type='vhostuser'>``, network interfaces ``<interface type='vhostuser'>``. libvirt has no element for
the others, so they go in as QEMU's options: as JSON, for libvirt writes its own devices so, and QEMU makes devices of
plain words before those, on the slots that libvirt has meant for its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from xml.etree import ElementTree

from config.loader import Device
from daemon.attach.qemu import PORT_NOTIFY, attached, possible
from daemon.attach.qemu_front_ends import QUEUE_SIZE_MAX, VECTORS_UNMASKED_SINCE
from daemon.attach.request import Answer, Request, connects, mac, mebibytes, net_options, queue_size

_QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
RECONNECT_SECONDS: Final = 1


def attach(request: Request) -> Answer:
    """The XML of the request's devices."""
    return attach_with(request, None)


def attach_with(request: Request, environment: Mapping[str, str] | None) -> Answer:
    """With ``environment`` (what the preload library needs) the guest can ring by hypercall."""
    devices, answer = possible(request)
    if devices:
        answer.text = libvirt_xml(request, devices, environment)
    if request.accel is None:
        answer.notes.append('the domain is of type "kvm"; --accel tcg makes it one of type "qemu", without KVM')
    return answer


def libvirt_xml(request: Request, devices: Sequence[Device], environment: Mapping[str, str] | None = None) -> str:
    """One well-formed document with ``devices``, which QEMU can have."""
    hypercall = environment is not None
    domain = ElementTree.Element("domain", {"type": "qemu" if request.accel == "tcg" else "kvm"})
    _comment(domain, "Merge these elements into your domain; the daemon maps the guest's memory: it is shared.")
    memory = ElementTree.SubElement(domain, "memory", {"unit": "MiB"})
    memory.text = str(mebibytes(request.memory))
    backing = ElementTree.SubElement(domain, "memoryBacking")
    ElementTree.SubElement(backing, "source", {"type": "memfd"})
    ElementTree.SubElement(backing, "access", {"mode": "shared"})
    disks = [device for device in devices if _is_libvirt_disk(device)]
    interfaces = [device for device in devices if device.common.type == "net"]
    silent = request.accel == "tcg" and request.qemu() < VECTORS_UNMASKED_SINCE
    if disks or interfaces:
        parts = ElementTree.SubElement(domain, "devices")
        for index, disk in enumerate(disks):
            parts.append(_disk(disk, index, alias=hypercall))
        for interface in interfaces:
            parts.append(_interface(interface, alias=hypercall or silent))
    if any(device.common.iommu for device in devices):
        iommu = ElementTree.SubElement(_child(domain, "devices"), "iommu", {"model": "intel"})
        remapping = {"intremap": "off"} if request.accel == "tcg" else {}
        ElementTree.SubElement(iommu, "driver", {**remapping, "iotlb": "on"})
    others = [device for device in devices if device not in disks and device not in interfaces]
    if others or environment or (silent and interfaces):
        domain.set("xmlns:qemu", _QEMU_NAMESPACE)
    if hypercall or (silent and interfaces):
        _override(domain, disks, interfaces, hypercall=hypercall, silent=silent)
    command_line: ElementTree.Element | None = None
    if environment is not None:
        command_line = _libvirt_hypercall(domain, environment)
    if others:
        _comment(domain, "libvirt has no element for these devices: QEMU's own options stand for them.")
        _comment(
            domain, "With AppArmor or SELinux, libvirt does not label their sockets: allow QEMU to connect to them."
        )
        if command_line is None:
            command_line = ElementTree.SubElement(domain, "qemu:commandline")
        for device in others:
            told = attached(device, request.qemu(), request.accel, hypercall=hypercall)
            for argument in (argument for option in told.json_options() for argument in option):
                ElementTree.SubElement(command_line, "qemu:arg", {"value": argument})
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")


def _child(parent: ElementTree.Element, tag: str) -> ElementTree.Element:
    found = parent.find(tag)
    return ElementTree.SubElement(parent, tag) if found is None else found


def _comment(parent: ElementTree.Element, text: str) -> None:
    parent.append(ElementTree.Comment(f" {text} "))


def _is_libvirt_disk(device: Device) -> bool:
    """A vhost-user disk of libvirt connects to the daemon, never the other way round."""
    return device.common.type == "blk" and not connects(device)


def _override(
    domain: ElementTree.Element, disks: Iterable[Device], interfaces: Sequence[Device], *, hypercall: bool, silent: bool
) -> None:
    """Properties of QEMU's devices that libvirt has no word for (8.2 and later)."""
    if hypercall:
        _comment(domain, "Ports as doorbells (libvirt 8.2): a bell number is a port and a queue.")
    override = ElementTree.SubElement(domain, "qemu:override")
    for device in (*(disks if hypercall else ()), *interfaces):
        overridden = ElementTree.SubElement(override, "qemu:device", {"alias": _alias(device)})
        front_end = ElementTree.SubElement(overridden, "qemu:frontend")
        if hypercall:
            ElementTree.SubElement(front_end, "qemu:property", {"name": PORT_NOTIFY, "type": "bool", "value": "true"})
        if silent and device in interfaces:
            ElementTree.SubElement(front_end, "qemu:property", {"name": "vectors", "type": "unsigned", "value": "0"})


def _libvirt_hypercall(domain: ElementTree.Element, environment: Mapping[str, str]) -> ElementTree.Element:
    """What the hypercall doorbell needs in a domain; its <qemu:commandline>, for more to be put in."""
    hyperv = ElementTree.SubElement(ElementTree.SubElement(domain, "features"), "hyperv")
    ElementTree.SubElement(hyperv, "relaxed", {"state": "on"})
    _comment(
        domain,
        "The library that QEMU is started with. AppArmor or SELinux must allow QEMU to map it and to connect to "
        "the socket. It takes itself out of the environment of QEMU's children.",
    )
    command_line = ElementTree.SubElement(domain, "qemu:commandline")
    for name, value in environment.items():
        ElementTree.SubElement(command_line, "qemu:env", {"name": name, "value": value})
    return command_line


def _alias(device: Device) -> str:
    """libvirt keeps an alias of the user's own that begins so."""
    return f"ua-{device.name}"


def _asked_for(device: Device) -> dict[str, str]:
    """Attributes of <driver> for what a device offers only where it is asked for."""
    packed = {"packed": "on"} if device.common.packed else {}
    return packed | ({"iommu": "on", "ats": "on"} if device.common.iommu else {})


def _source(device: Device, attributes: Mapping[str, str]) -> ElementTree.Element:
    """Where the daemon listens, or QEMU does; a QEMU that connects does so again when the daemon has restarted."""
    source = ElementTree.Element("source", {"type": "unix", "path": str(device.common.socket), **attributes})
    if not connects(device):
        ElementTree.SubElement(source, "reconnect", {"enabled": "yes", "timeout": str(RECONNECT_SECONDS)})
    return source


def _disk(device: Device, index: int, *, alias: bool) -> ElementTree.Element:
    disk = ElementTree.Element("disk", {"type": "vhostuser", "device": "disk"})
    driver = {
        "name": "qemu",
        "type": "raw",
        "queues": str(device.queues),
        "queue_size": str(queue_size(device, QUEUE_SIZE_MAX)),
        **_asked_for(device),
    }
    ElementTree.SubElement(disk, "driver", driver)
    disk.append(_source(device, {}))
    ElementTree.SubElement(disk, "target", {"dev": f"vd{_letters(index)}", "bus": "virtio"})
    if alias:
        ElementTree.SubElement(disk, "alias", {"name": _alias(device)})
    return disk


def _interface(device: Device, *, alias: bool) -> ElementTree.Element:
    interface = ElementTree.Element("interface", {"type": "vhostuser"})
    ElementTree.SubElement(interface, "mac", {"address": mac(device)})
    # libvirt names the role of QEMU here.
    interface.append(_source(device, {"mode": "server" if connects(device) else "client"}))
    ElementTree.SubElement(interface, "model", {"type": "virtio"})
    size = str(queue_size(device, QUEUE_SIZE_MAX))
    queues = {"queues": str(device.queues)} if device.queues > 1 else {}
    sizes = {"rx_queue_size": size, "tx_queue_size": size}
    ElementTree.SubElement(interface, "driver", {**queues, **sizes, **_asked_for(device)})
    if (mtu := net_options(device).mtu) is not None:
        ElementTree.SubElement(interface, "mtu", {"size": str(mtu)})
    if alias:
        ElementTree.SubElement(interface, "alias", {"name": _alias(device)})
    return interface


def _letters(index: int) -> str:
    """a, b, ... z, aa, ab, ...: how Linux names the disks of one kind."""
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
