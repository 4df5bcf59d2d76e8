"""The other side of a configuration: what QEMU or libvirt must be told to attach the configured devices."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from config.loader import Config, Device
from daemon.device_classes import device_class
from virtio.devices import REGISTRY
from virtio.devices.net import NetOptions

QEMU_QUEUE_SIZE_MAX: Final = 1024  # QEMU's VIRTQUEUE_MAX_SIZE: it refuses to start with more
PORT_NOTIFY: Final = "modern-pio-notify"  # QEMU's property that gives a device a notify port: bells are ports
HYPERCALL_CPU: Final = "host,hv-relaxed"  # the least that makes KVM take Hyper-V's hypercalls from this guest
NO_HYPERCALL_SOCKET: Final = (
    'there is no socket where QEMU could report; add to [daemon]: hypercall_socket = "/run/hyperbell/hypercall.sock"'
)
_QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
QEMU_NET_QUEUE_SIZE_MIN: Final = 256  # smaller ones it refuses for a network interface


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """QEMU's device for one of our types. ``queue_options`` says whether it takes num-queues and queue-size.

    ``queue_size``: what its queues have where it leaves no choice.
    """

    driver: str
    queue_options: bool
    queue_size: int = 0


FRONT_ENDS: Final[Mapping[str, FrontEnd]] = {
    "blk": FrontEnd("vhost-user-blk-pci", queue_options=True),
    "gpio": FrontEnd("vhost-user-gpio-pci", queue_options=False, queue_size=256),
    "i2c": FrontEnd("vhost-user-i2c-pci", queue_options=False, queue_size=4),
    "input": FrontEnd("vhost-user-input-pci", queue_options=False, queue_size=64),
    "net": FrontEnd("virtio-net-pci", queue_options=False),
    "rng": FrontEnd("vhost-user-rng-pci", queue_options=False),
    "vsock": FrontEnd("vhost-user-vsock-pci", queue_options=False),
}
"""The front-ends of QEMU 7.2. Another type is attached by that of its virtio_id, or not at all."""


def why_not(device: Device) -> str:
    """Why QEMU cannot have ``device``; "" when it can."""
    if device.common.type == "net" and device.common.queue_size < QEMU_NET_QUEUE_SIZE_MIN:
        return (
            f'device "{device.name}": the queues of QEMU\'s network interface have {QEMU_NET_QUEUE_SIZE_MIN} to '
            f"{QEMU_QUEUE_SIZE_MAX} entries; set queue_size accordingly"
        )
    front_end = _front_end(device)
    if front_end is not None and device.common.queue_size < front_end.queue_size:
        return (
            f'device "{device.name}": the queues of QEMU\'s {front_end.driver} have {front_end.queue_size} entries; '
            f"set queue_size = {front_end.queue_size} or more"
        )
    if front_end is not None:
        return ""
    return (
        f'device "{device.name}": QEMU (seen: 7.2) has no vhost-user front-end for a {device.common.type} device, '
        "so there are no options that would attach it"
    )


def _front_end(device: Device) -> FrontEnd | None:
    """QEMU has a front-end for each kind of device; what the guest sees behind it is the same for any class of it."""
    type_name = device.common.type
    if type_name in FRONT_ENDS:
        return FRONT_ENDS[type_name]
    kind = device_class(type_name)
    # That of network interfaces wants to know more than the class says.
    alike = (ours for name, ours in FRONT_ENDS.items() if name != "net" and REGISTRY[name].virtio_id == kind.virtio_id)
    return next(alike, None)


def qemu_arguments(devices: Iterable[Device], memory: str, machine: str, *, hypercall: bool) -> list[list[str]]:
    """QEMU's options for ``devices``, each an option and its argument.

    ``hypercall``: with what the guest needs in order to ring by hypercall.

    ``memory`` is the guest's RAM as QEMU writes sizes; it has to be shared memory, for the daemon maps it.
    ``machine`` "" leaves the machine type to the rest of the command line.
    """
    options = [
        ["-m", memory],
        ["-object", f"memory-backend-memfd,id=mem,size={memory},share=on"],
        ["-machine", ",".join(filter(None, (machine, "memory-backend=mem")))],
    ]
    if hypercall:
        options.append(["-cpu", HYPERCALL_CPU])
    for device in devices:
        options += _device_options(device, hypercall)
    return options


def hypercall_notes(config: Config, *, q35: bool, vm: Sequence[str] = (), stable: bool = False) -> Iterator[str]:
    """What no option of QEMU says about the hypercall doorbell; ``vm``: what hyperbell qemu must be given too.

    ``stable``: a key is among it.
    """
    if config.daemon.hypercall_socket is None:
        yield NO_HYPERCALL_SOCKET
    start = shlex.join(["hyperbell", "qemu", "--config", str(config.path), *vm])
    yield f"start QEMU through: {start} -- qemu-system-x86_64 -accel kvm ..."
    if not stable:
        yield "a VM that migrates or is saved needs a stable key there: --secret FILE --uuid UUID, or --key"
    yield "the guest loses KVM's paravirtual spinlocks, IPIs and yield, and ptp_kvm: their hypercalls would go astray"
    if q35:
        yield (
            "on q35 every PCI Express root port takes 4096 of the 65536 I/O ports: some 10 to 15 devices get a port "
            "doorbell and with it the hypercall, the others ring by memory write only"
        )


def pasteable(options: Iterable[list[str]]) -> str:
    """``options`` for a shell, one a line, each line but the last ending in a backslash."""
    return " \\\n".join(shlex.join(option) for option in options)


def _device_options(device: Device, hypercall: bool) -> list[list[str]]:
    front_end = _front_end(device)
    assert front_end is not None, "why_not() told the caller"
    chardev = f"char-{device.name}"
    # A comma ends a value in QEMU's option syntax; two of them stand for one.
    channel = f"socket,id={chardev},path={str(device.common.socket).replace(',', ',,')}"
    if device.common.mode == "connect":
        channel += ",server=on"
    notify = f",{PORT_NOTIFY}=on" if hypercall else ""
    if device.common.type == "net":
        # QEMU shows the guest a config space of its own, so it has to be told what is in ours.
        options = _net_options(device)
        size = _queue_size(device)
        netdev = f"vhost-user,id=net-{device.name},chardev={chardev}"
        interface = f"{front_end.driver},netdev=net-{device.name},mac={_mac(device)}"
        if options.mtu is not None:
            interface += f",host_mtu={options.mtu}"
        if device.queues > 1:
            netdev += f",queues={device.queues}"
            # An interrupt for each queue, one for the control queue and one for changes of the configuration.
            interface += f",mq=on,vectors={2 * device.queues + 2}"
        return [
            ["-chardev", channel],
            ["-netdev", netdev],
            ["-device", f"{interface},rx_queue_size={size},tx_queue_size={size}{notify}"],
        ]
    driver = f"{front_end.driver},chardev={chardev}"
    if front_end.queue_options:
        driver += f",num-queues={device.queues},queue-size={_queue_size(device)}"
    return [["-chardev", channel], ["-device", driver + notify]]


def _net_options(device: Device) -> NetOptions:
    assert isinstance(device.options, NetOptions)
    return device.options


def _mac(device: Device) -> str:
    return _net_options(device).address(device.name).hex(":")


def _queue_size(device: Device) -> int:
    return min(device.common.queue_size, QEMU_QUEUE_SIZE_MAX)


def libvirt_xml(devices: Sequence[Device], memory_mib: int, environment: Mapping[str, str] | None = None) -> str:
    """The parts of a libvirt domain that attach ``devices``; one well-formed document.

    Disks are ``<disk type='vhostuser'>``, network interfaces ``<interface type='vhostuser'>``. libvirt has no element
    for the others, so they go in as QEMU options.
    With ``environment`` (what the preload library needs) the guest can ring by hypercall.
    """
    hypercall = environment is not None
    domain = ElementTree.Element("domain", {"type": "kvm"})
    domain.append(
        ElementTree.Comment(
            " Merge these elements into your domain; the daemon maps the guest's memory: it is shared. "
        )
    )
    memory = ElementTree.SubElement(domain, "memory", {"unit": "MiB"})
    memory.text = str(memory_mib)
    backing = ElementTree.SubElement(domain, "memoryBacking")
    ElementTree.SubElement(backing, "source", {"type": "memfd"})
    ElementTree.SubElement(backing, "access", {"mode": "shared"})
    disks = [device for device in devices if _is_libvirt_disk(device)]
    interfaces = [device for device in devices if device.common.type == "net"]
    if disks or interfaces:
        parts = ElementTree.SubElement(domain, "devices")
        for index, disk in enumerate(disks):
            parts.append(_disk(disk, index, hypercall))
        for interface in interfaces:
            parts.append(_interface(interface, hypercall))
    others = [device for device in devices if device not in disks and device not in interfaces]
    if others or environment:
        domain.set("xmlns:qemu", _QEMU_NAMESPACE)
    command_line: ElementTree.Element | None = None
    if environment is not None:
        command_line = _libvirt_hypercall(domain, [*disks, *interfaces], environment)
    if others:
        domain.append(
            ElementTree.Comment(" libvirt has no element for these devices: QEMU's own options stand for them. ")
        )
        domain.append(
            ElementTree.Comment(
                " With AppArmor or SELinux, libvirt does not label their sockets: allow QEMU to connect to them. "
            )
        )
        if command_line is None:
            command_line = ElementTree.SubElement(domain, "qemu:commandline")
        options = [option for device in others for option in _device_options(device, hypercall)]
        for argument in (argument for option in options for argument in option):
            ElementTree.SubElement(command_line, "qemu:arg", {"value": argument})
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")


def _is_libvirt_disk(device: Device) -> bool:
    """A vhost-user disk of libvirt connects to the daemon, never the other way round."""
    return device.common.type == "blk" and device.common.mode == "listen"


def _libvirt_hypercall(
    domain: ElementTree.Element, devices: Iterable[Device], environment: Mapping[str, str]
) -> ElementTree.Element:
    """What the hypercall doorbell needs in a domain; its <qemu:commandline>, for more to be put in."""
    hyperv = ElementTree.SubElement(ElementTree.SubElement(domain, "features"), "hyperv")
    ElementTree.SubElement(hyperv, "relaxed", {"state": "on"})
    domain.append(ElementTree.Comment(" Ports as doorbells (libvirt 8.2): a bell number is a port and a queue. "))
    override = ElementTree.SubElement(domain, "qemu:override")
    for device in devices:
        overridden = ElementTree.SubElement(override, "qemu:device", {"alias": _alias(device)})
        front_end = ElementTree.SubElement(overridden, "qemu:frontend")
        ElementTree.SubElement(front_end, "qemu:property", {"name": PORT_NOTIFY, "type": "bool", "value": "true"})
    domain.append(
        ElementTree.Comment(
            " The library that QEMU is started with. AppArmor or SELinux must allow QEMU to map it and to connect to "
            "the socket. It takes itself out of the environment of QEMU's children. "
        )
    )
    command_line = ElementTree.SubElement(domain, "qemu:commandline")
    for name, value in environment.items():
        ElementTree.SubElement(command_line, "qemu:env", {"name": name, "value": value})
    return command_line


def _alias(device: Device) -> str:
    """libvirt keeps an alias of the user's own that begins so."""
    return f"ua-{device.name}"


def _disk(device: Device, index: int, hypercall: bool) -> ElementTree.Element:
    disk = ElementTree.Element("disk", {"type": "vhostuser", "device": "disk"})
    driver = {
        "name": "qemu",
        "type": "raw",
        "queues": str(device.queues),
        "queue_size": str(_queue_size(device)),
    }
    ElementTree.SubElement(disk, "driver", driver)
    ElementTree.SubElement(disk, "source", {"type": "unix", "path": str(device.common.socket)})
    ElementTree.SubElement(disk, "target", {"dev": f"vd{_letters(index)}", "bus": "virtio"})
    if hypercall:
        ElementTree.SubElement(disk, "alias", {"name": _alias(device)})
    return disk


def _interface(device: Device, hypercall: bool) -> ElementTree.Element:
    interface = ElementTree.Element("interface", {"type": "vhostuser"})
    ElementTree.SubElement(interface, "mac", {"address": _mac(device)})
    # libvirt names the role of QEMU here.
    mode = "server" if device.common.mode == "connect" else "client"
    ElementTree.SubElement(interface, "source", {"type": "unix", "path": str(device.common.socket), "mode": mode})
    ElementTree.SubElement(interface, "model", {"type": "virtio"})
    size = str(_queue_size(device))
    queues = {"queues": str(device.queues)} if device.queues > 1 else {}
    ElementTree.SubElement(interface, "driver", {**queues, "rx_queue_size": size, "tx_queue_size": size})
    if (mtu := _net_options(device).mtu) is not None:
        ElementTree.SubElement(interface, "mtu", {"size": str(mtu)})
    if hypercall:
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
