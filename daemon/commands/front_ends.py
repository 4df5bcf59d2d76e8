"""The commands ``hyperbell attach``, ``qemu-args`` and ``uml``: what they take, and what they print."""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import cache
from typing import Final

from config.loader import Config
from daemon.attach import libvirt, qemu, uml
from daemon.attach.hypercall import hypercall_notes
from daemon.attach.qemu_start import check_vm_name, chosen_key, hypercall_socket, preload_environment
from daemon.attach.qemu_version import NEWEST, OLDEST, PROGRAM, QemuVersion, installed_version, parse_version
from daemon.attach.request import Answer, Request, chosen_devices
from daemon.attach.vmms import VMMS
from daemon.commands.command import Command, add_file, add_vm_options, load_config, memory_size, vm_options

QEMU_ARGS_EPILOG: Final = """\
examples:
  hyperbell qemu-args disk.toml                       every device of the file
  hyperbell qemu-args disk.toml disk --memory 4G      one of them, and a guest with 4 GiB
  hyperbell qemu-args all.toml --guest web1           the devices with guest = "web1"
  hyperbell qemu-args disk.toml --qemu 11.1           for another QEMU than the one that is installed here
  eval "qemu-system-x86_64 -accel kvm $(hyperbell qemu-args disk.toml)"
  hyperbell qemu-args disk.toml --libvirt             XML for virsh edit
  hyperbell qemu-args disk.toml --hypercall           with what the hypercall doorbell needs; see hyperbell qemu

The guest's memory is shared with the daemon, so -m and the memory backend belong to the options. What no option says
is said in notes, on stderr: which devices QEMU cannot reconnect, and what to do about it. Where the file serves several
guests, --guest (or the names of devices) says whose options are wanted; without it they are not mixed up, but refused.
"""
ATTACH_EPILOG: Final = """\
Each device that the monitor cannot have is named on stderr with the reason; notes say what no option says.

examples:
  hyperbell attach disk.toml --vmm cloud-hypervisor --memory 1G
  hyperbell attach disk.toml --vmm firecracker | sh   calls of its API, for a microVM that has not started
  hyperbell attach disk.toml --vmm crosvm
  hyperbell attach disk.toml --vmm libkrun            calls of its C interface
  hyperbell attach disk.toml --vmm uml                words for User-mode Linux; see hyperbell uml
  hyperbell attach all.toml --vmm qemu --guest web1   as hyperbell qemu-args
  hyperbell attach disk.toml --vmm libvirt            as hyperbell qemu-args --libvirt
"""
UML_EPILOG: Final = """\
becomes LINUX, with the devices of the file and its memory on the command line. The daemon must run. User-mode Linux is
Linux as a process: it needs no KVM and no emulator. Debian's package user-mode-linux has it as linux.uml, with drivers
for blk, net, vsock and console (as modules).

examples:
  hyperbell uml disk.toml -- linux.uml root=/dev/vda rw con=fd:0,fd:1
  hyperbell uml disk.toml --print --memory 512M -- linux.uml initrd=initrd.img
"""


def add_qemu_args_options(parser: argparse.ArgumentParser) -> None:
    _add_choice(parser)
    parser.add_argument("--libvirt", action="store_true", help="print the XML of a libvirt domain instead")
    _add_qemu_options(parser)
    parser.add_argument("--hypercall", action="store_true", help="with what the hypercall doorbell needs")
    add_vm_options(parser)


def add_attach_options(parser: argparse.ArgumentParser) -> None:
    _add_choice(parser)
    parser.add_argument("--vmm", choices=list(VMMS), required=True, help="the virtual machine monitor")
    _add_qemu_options(parser)


def add_uml_options(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    _add_guest(parser)
    parser.add_argument("--print", action="store_true", help="print the command line instead of running it")
    parser.add_argument("command", metavar="LINUX", nargs="+", help="User-mode Linux and its arguments, after --")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("devices", metavar="DEVICE", nargs="*", help="only these devices")
    _add_guest(parser)


def _add_guest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guest", metavar="NAME", help='only the devices with guest = "NAME"')
    parser.add_argument("--memory", metavar="SIZE", type=memory_size, default="256M", help="the guest's RAM (256M)")


def _add_qemu_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("QEMU and libvirt")
    group.add_argument(
        "--qemu", metavar="VERSION", type=_version, help=f"the version of QEMU, {OLDEST} or later (the installed one's)"
    )
    group.add_argument("--accel", choices=("kvm", "tcg"), help="what the guest runs with (kvm, with notes about tcg)")
    group.add_argument("--machine", choices=("q35", "pc"), help="also choose the machine type")


def _version(text: str) -> QemuVersion:
    try:
        return parse_version(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def qemu_args(arguments: argparse.Namespace) -> int:
    """Print how QEMU attaches the configured devices."""
    config = load_config(arguments.file)
    request = _request(config, arguments)
    key = chosen_key(arguments.key, arguments.secret, arguments.uuid)
    vm = vm_options(arguments)
    check_vm_name(arguments.name)
    if arguments.libvirt:
        environment = None
        if arguments.hypercall:
            environment = preload_environment(hypercall_socket(config), key, arguments.name)
        answer = libvirt.attach_with(request, environment)
    else:
        devices, answer = qemu.possible(request)
        if devices:
            answer.text = qemu.pasteable(qemu.qemu_arguments(request, devices, hypercall=arguments.hypercall))
    if answer.text and arguments.hypercall:
        answer.notes += hypercall_notes(config, q35=arguments.machine != "pc", vm=vm, stable=key is not None)
    elif vm:
        answer.notes.append(f"{vm[0]} is for the hypercall doorbell, and changes nothing without --hypercall")
    return _told(answer)


def attach(arguments: argparse.Namespace) -> int:
    """Print how a virtual machine monitor attaches the configured devices."""
    return _told(VMMS[arguments.vmm](_request(load_config(arguments.file), arguments)))


def user_mode_linux(arguments: argparse.Namespace) -> int:
    """Become User-mode Linux with the configured devices, or print its command line."""
    devices = chosen_devices(load_config(arguments.file), [], arguments.guest)
    words, answer = uml.kernel_words(Request(devices, arguments.memory, lambda: NEWEST))
    answer.text = shlex.join([*arguments.command, *words]) if words else ""
    if words and not arguments.print:
        _say(answer)
        uml.run(arguments.command, words)
    return _told(answer)


def _request(config: Config, arguments: argparse.Namespace) -> Request:
    version = arguments.qemu

    @cache
    def qemu_version() -> QemuVersion:
        found = version or installed_version()
        if found is None:
            _note(f"there is no {PROGRAM} here: these are for QEMU {NEWEST}; for another one: --qemu VERSION")
            return NEWEST
        if found[:2] > NEWEST[:2]:
            _note(f"QEMU {found} is newer than {NEWEST}, the newest that hyperbell knows: it is told the same")
        return found

    devices = chosen_devices(config, arguments.devices, arguments.guest)
    return Request(devices, arguments.memory, qemu_version, arguments.accel, arguments.machine or "")


def _told(answer: Answer) -> int:
    """Print ``answer``; the exit status: 1 when there is nothing to attach."""
    _say(answer)
    if not answer.text:
        return 1
    print(answer.text)
    return 0


def _say(answer: Answer) -> None:
    """What belongs to stderr. Notes are about what can be attached."""
    for reason in answer.refused:
        print(f"hyperbell: {reason}", file=sys.stderr)
    for note in answer.notes if answer.text else ():
        _note(note)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


QEMU_ARGS: Final = Command(
    "qemu-args", "print the QEMU options that attach the devices", qemu_args, add_qemu_args_options, QEMU_ARGS_EPILOG
)
ATTACH: Final = Command(
    "attach", "print what another virtual machine monitor is told", attach, add_attach_options, ATTACH_EPILOG
)
UML: Final = Command("uml", "start User-mode Linux with the devices", user_mode_linux, add_uml_options, UML_EPILOG)
