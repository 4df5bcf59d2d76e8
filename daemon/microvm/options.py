"""The command line of ``hyperbell microvm``: what it takes, and what of it cannot be."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from config.options import OptionDevice, parse_devices
from config.problems import ConfigError, Problem, explain
from config.schema import DaemonConfig
from daemon.attach.qemu_start import chosen_key
from daemon.devices.catalogue import device_types

MEMORY_MAX_MIB: Final = 3072
"""Above, at 0xC0000000, begins what is not memory: devices, APICs."""

CONSOLE_ARGUMENTS: Final = "console=hvc0 panic=-1"
EARLY_ARGUMENTS: Final = "earlyprintk=ttyS0,115200"

EPILOG: Final = """\
The kernel is an ELF file (vmlinux) or a bzImage (vmlinuz) with the PVH entry, which distributions' kernels have; it
needs virtio_mmio and ACPI, built in or as modules of the initrd (Debian's cloud kernel has them). /dev/kvm must be a
real one: where a hypervisor makes it in software (PVM), programs run on it, but not Linux.

A kernel that is installed is /boot/vmlinuz-$(uname -r); on some distributions only root may read it. Debian packages
that hold one (linux-image-cloud-amd64 itself holds none, it depends on the newest):
  Debian 12            linux-image-6.1.0-N-cloud-amd64         boot/vmlinuz-*
  Debian 13            linux-image-6.12.N+deb13-cloud-amd64    boot/vmlinuz-*
  its backports        linux-binary-7.N+deb13-cloud-amd64      usr/lib/modules/*/vmlinuz
Debian 13's are packed by zstd, Debian 12's by lz4: the program of that name must be installed.

The terminal is the guest's /dev/hvc0, a virtio console: console=hvc0 is on the kernel's command line, and panic=-1, so
that a kernel that panics ends the machine; what --append says comes later and wins. Ctrl-A x ends the machine, Ctrl-A h
shows the keys. The log has only warnings, unless --log-level asks for more. Before the guest has loaded its console
driver only --early-serial shows what the kernel says.

Devices are described as in a configuration file, TYPE,KEY=VALUE,... (hyperbell schema lists the keys); a comma in a
value is written twice, an array as it stands in a file. hypercall=offer, withhold or auto says whether the guest may
ring the device by hypercall. It can only if the machine has a key (--key, or --secret and --uuid).

devices, for instance:
  --device blk,path=disk.img,queues=2      a disk: /dev/vda
  --device blk,backend=memory,size=1G      one that is forgotten
  --device rng                             entropy
  --device net                             a network card without a network
  --device console,backend=socket,path=tty.sock
  --device 'gpio,lines=["button", "led"],control=pins.sock'

example:
  package=$(apt-cache depends linux-image-cloud-amd64 | grep -o 'linux-image-[0-9].*')
  apt-get download $package && dpkg -x $package*.deb kernel
  truncate -s 1G disk.img
  hyperbell microvm --kernel kernel/boot/vmlinuz-* --initrd initrd.img --memory 512M --cpus 2 \\
      --device blk,path=disk.img --device rng --append "root=/dev/vda rw"

signals:
  SIGTERM, SIGINT, SIGHUP  end the machine; the guest is not asked
exit status:
  0  the guest powered off, or it was ended by a signal or Ctrl-A x
  1  it crashed, or was reset (a reboot too: this machine does not start anew), or could not be started
  2  wrong usage, 78 a wrong description of a device
"""


@dataclass(frozen=True, slots=True)
class MicrovmOptions:
    """What is to be run, all checked that can be without touching the host."""

    kernel: Path
    initrd: Path | None
    append: str
    memory_size: int
    cpus: int
    devices: Mapping[str, OptionDevice]
    daemon: DaemonConfig
    key: int | None
    nested: bool
    early_serial: bool
    kvm: str

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        early = EARLY_ARGUMENTS if self.early_serial else ""
        return " ".join(filter(None, (CONSOLE_ARGUMENTS, early, self.append)))


def add_options(parser: argparse.ArgumentParser, memory: Any) -> None:
    """Everything ``read_options`` wants; ``memory`` is the type of a size."""
    parser.add_argument("--kernel", metavar="FILE", type=Path, required=True, help="vmlinux or vmlinuz")
    parser.add_argument("--initrd", metavar="FILE", type=Path, help="its first root file system")
    parser.add_argument("--append", metavar="TEXT", default="", help="more of the kernel's command line")
    parser.add_argument("--memory", metavar="SIZE", type=memory, default="256M", help="RAM, at most 3G (256M)")
    parser.add_argument("--cpus", metavar="N", type=_cpus, default=1, help="virtual CPUs (1)")
    parser.add_argument("--device", metavar="TYPE[,KEY=VALUE]...", action="append", default=[], help="see below")
    parser.add_argument("--early-serial", action="store_true", help="show the kernel's first words on stderr")
    parser.add_argument("--nested", action="store_true", help="the guest may run guests itself")
    parser.add_argument("--metrics", metavar="ADDRESS:PORT", default="off", help="serve /metrics there (off)")
    parser.add_argument("--control", metavar="PATH", type=Path, help="control socket, for hyperbell show and hypercall")
    parser.add_argument(
        "--doorbell-costs", metavar="FILE", type=Path, help="what hyperbell doorbells --save has written"
    )
    parser.add_argument(
        "--stop-seconds",
        metavar="N",
        type=int,
        default=10,
        help="how long the end waits for storage that hangs (10)",
    )
    parser.add_argument("--kvm", metavar="PATH", default="/dev/kvm", help=argparse.SUPPRESS)
    group = parser.add_argument_group("the key of the hypercall doorbell; without one there is no such doorbell")
    group.add_argument("--key", metavar="HEX", help="the machine's key, 24 bits")
    group.add_argument("--secret", metavar="FILE", type=Path, help="the file with the secret to derive its key from")
    group.add_argument("--uuid", metavar="UUID", help="with --secret: the machine's UUID")


def read_options(arguments: argparse.Namespace) -> MicrovmOptions:
    """Raises ``ConfigError`` with every mistake in devices and addresses, or ``HostError`` for another one."""
    problems: list[Problem] = []
    devices: Mapping[str, OptionDevice] = {}
    try:
        devices = parse_devices(arguments.device, device_types())
    except ConfigError as error:
        problems += error.problems
    daemon = _daemon(arguments, problems)
    mebibytes = int(arguments.memory[:-1]) * (1024 if arguments.memory.endswith("G") else 1)
    if mebibytes > MEMORY_MAX_MIB:
        problems.append(_problem("--memory", f"{arguments.memory} is more than this machine has room for", "3G"))
    if problems:
        raise ConfigError(problems)
    return MicrovmOptions(
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        append=arguments.append,
        memory_size=mebibytes << 20,
        cpus=arguments.cpus,
        devices=devices,
        daemon=daemon,
        key=chosen_key(arguments.key, arguments.secret, arguments.uuid),
        nested=arguments.nested,
        early_serial=arguments.early_serial,
        kvm=arguments.kvm,
    )


def _daemon(arguments: argparse.Namespace, problems: list[Problem]) -> DaemonConfig:
    """The addresses, by the rules that a configuration file has for them."""
    try:
        return DaemonConfig(
            metrics=arguments.metrics,
            control=arguments.control,
            doorbell_costs=arguments.doorbell_costs,
            stop_seconds=arguments.stop_seconds,
        )
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.append(
                _problem(f"--{str(detail['loc'][0]).replace('_', '-')}", *explain(detail, DaemonConfig, ()))
            )
        return DaemonConfig(metrics="off")


def _problem(option: str, message: str, hint: str) -> Problem:
    return Problem(Path(option), 0, "", "", message, hint)


def _cpus(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of CPUs")
    return int(text)
