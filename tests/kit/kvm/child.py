"""A program that makes virtual machines as QEMU does, and does what it is told: a line of JSON in, one out.

It runs with the library preloaded: Python's ``fcntl.ioctl`` is the ``ioctl`` that the library stands before.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41
KVM_IOEVENTFD = 0x4040AE79
KVM_SET_CPUID2 = 0x4008AE90
KVM_SET_MSRS = 0x4008AE89
KVM_GET_CPUID2 = 0xC008AE91
KVM_HYPERV_EVENTFD = 0x4018AEBD

_FAKE = ctypes.CDLL(os.environ["FAKE"]) if "FAKE" in os.environ else None
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.getenv.restype = ctypes.c_char_p
_kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)


def create_vm() -> int:
    return fcntl.ioctl(_kvm, KVM_CREATE_VM, 0)


def create_vcpu(vm: int, number: int) -> int:
    return fcntl.ioctl(vm, KVM_CREATE_VCPU, number)


def set_cpuid(vcpu: int, leaves: list[list[int]]) -> list[list[int]]:
    """Leaves as function, eax, ebx, ecx, edx; what the array holds afterwards."""
    array = bytearray(struct.pack("<II", len(leaves), 0))
    for function, *registers in leaves:
        array += struct.pack("<10I", function, 0, 0, *registers, 0, 0, 0)
    _raw(vcpu, KVM_SET_CPUID2, array)
    return _leaves(bytes(array), len(leaves))


def set_msrs(vcpu: int, registers: list[list[int]]) -> None:
    """Registers as index and value; KVM takes those it knows."""
    array = bytearray(struct.pack("<II", len(registers), 0))
    for index, value in registers:
        array += struct.pack("<IIQ", index, 0, value)
    _raw(vcpu, KVM_SET_MSRS, array)


def get_cpuid(vcpu: int) -> list[list[int]]:
    """What the real KVM was given."""
    array = bytearray(8 + 256 * 40)
    array[:4] = struct.pack("<I", 256)
    _raw(vcpu, KVM_GET_CPUID2, array)
    return _leaves(bytes(array), struct.unpack_from("<I", array)[0])


def _leaves(array: bytes, count: int) -> list[list[int]]:
    return [[row[0], *row[3:7]] for row in struct.iter_unpack("<10I", array[8 : 8 + 40 * count])]


def _raw(fd: int, request: int, array: bytearray) -> None:
    """As a C program calls it: fcntl.ioctl copies what is longer than 1024 bytes in another way."""
    buffer = (ctypes.c_char * len(array)).from_buffer(array)
    if _LIBC.ioctl(fd, ctypes.c_ulong(request), ctypes.byref(buffer)) < 0:
        raise OSError(ctypes.get_errno(), "ioctl")


def ioeventfd(vm: int, port: int, match: int, fd: int, flags: int = 3, size: int = 2) -> None:
    """KVM_IOEVENTFD; flags 3 is a port with a value to match, 7 takes it away."""
    fcntl.ioctl(vm, KVM_IOEVENTFD, struct.pack("<QQIiI36x", match, port, size, fd, flags))


def hyperv_eventfd(vm: int, number: int, fd: int) -> None:
    """As somebody else in the process would."""
    fcntl.ioctl(vm, KVM_HYPERV_EVENTFD, struct.pack("<IiI12x", number, fd, 0))


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def read_eventfd(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def close(fd: int) -> None:
    os.close(fd)


def ids() -> list[int]:
    assert _FAKE is not None
    numbers = (ctypes.c_uint32 * 256)()
    return sorted(numbers[: _FAKE.fake_ids(numbers, 256)])


def calls() -> int:
    assert _FAKE is not None
    count: int = _FAKE.fake_calls()
    return count


def ring(vm: int, number: int) -> int:
    assert _FAKE is not None
    status: int = _FAKE.fake_ring(vm, number)
    return status


def shake(vm: int, port: int, fd: int, count: int) -> None:
    """Register and take away the doorbell so many times, as fast as it goes."""
    for _ in range(count):
        ioeventfd(vm, port, 0, fd)
        ioeventfd(vm, port, 0, fd, 7)


def shake_together(vm: int, ports: list[int], fd: int, count: int) -> None:
    """The same from several threads."""
    threads = [threading.Thread(target=shake, args=(vm, port, fd, count)) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def environment(name: str) -> str | None:
    """The C environment, which ``os.environ`` is a copy of."""
    value = _LIBC.getenv(name.encode())
    return None if value is None else value.decode()


def shell(command: str) -> int:
    """Run it in a child as C's system() does; its exit status."""
    return os.waitstatus_to_exitcode(os.system(command))


def descriptors() -> dict[str, int]:
    """Every open descriptor with its flags, as /proc has them."""
    found = {}
    for entry in Path("/proc/self/fdinfo").iterdir():
        try:
            text = entry.read_text()
        except FileNotFoundError:  # the one that lists them
            continue
        found[entry.name] = int(text.partition("flags:")[2].split()[0], 8)
    return found


def threads() -> dict[str, str]:
    """Every thread's name and the signals it blocks."""
    found = {}
    for entry in Path("/proc/self/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines() if ":\t" in line)
        found[lines["Name"]] = lines["SigBlk"]
    return found


ACTIONS: dict[str, Callable[..., Any]] = {
    action.__name__: action
    for action in (
        create_vm,
        create_vcpu,
        set_cpuid,
        set_msrs,
        get_cpuid,
        ioeventfd,
        hyperv_eventfd,
        eventfd,
        read_eventfd,
        close,
        ids,
        calls,
        ring,
        shake,
        shake_together,
        environment,
        shell,
        descriptors,
        threads,
    )
}


def main() -> None:
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": ACTIONS[name](*arguments)}
        except OSError as error:
            answer = {"error": errno.errorcode[error.errno or 0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
