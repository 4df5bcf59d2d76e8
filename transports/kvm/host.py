"""/dev/kvm of this machine: whether it can be used, and what it can do."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from transports.kvm.cpu.cpuid import CpuidEntry
from transports.kvm.native import check, ffi, lib
from virtio.errors import HostError
from virtio.fd import OwnedFd

KVM_PATH: Final = "/dev/kvm"
API_VERSION: Final = 12  # for good, says the kernel's documentation
CPUID_ENTRIES_FIRST: Final = 128
CPUID_ENTRIES_MAX: Final = 4096

_NEEDED: Final = {
    "user_memory": "KVM_CAP_USER_MEMORY",
    "irqchip": "KVM_CAP_IRQCHIP",
    "pit": "KVM_CAP_PIT2",
    "irqfd": "KVM_CAP_IRQFD",
    "ioeventfd": "KVM_CAP_IOEVENTFD",
    "ioeventfd_any_length": "KVM_CAP_IOEVENTFD_ANY_LENGTH",
    "immediate_exit": "KVM_CAP_IMMEDIATE_EXIT",
}
_NO_HYPERCALL: Final = (
    "this kernel's KVM cannot signal an eventfd from a hypercall: it lacks KVM_CAP_HYPERV_EVENTFD (Linux 4.17 or later "
    "on x86, with CONFIG_KVM_HYPERV)"
)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What KVM says of itself; 0 or False: lacking."""

    api_version: int
    user_memory: bool
    irqchip: bool
    pit: bool
    irqfd: bool
    ioeventfd: bool
    ioeventfd_any_length: bool
    immediate_exit: bool
    hyperv_eventfd: bool
    tsc_deadline: bool
    vcpus_max: int

    @property
    def why_no_hypercall(self) -> str | None:
        """Why the hypercall doorbell cannot be had here; None: it can. A VM works without."""
        return None if self.hyperv_eventfd else _NO_HYPERCALL


def check_abilities(abilities: Abilities, path: str = KVM_PATH) -> None:
    """``HostError`` that names what is missing for a VM of ours."""
    if abilities.api_version != API_VERSION:
        raise HostError(f"{path}: KVM's API version is {abilities.api_version}, and {API_VERSION} is needed")
    missing = [name for field, name in _NEEDED.items() if not getattr(abilities, field)]
    if missing:
        raise HostError(f"{path}: this kernel's KVM lacks {', '.join(missing)}; a newer kernel is needed")


class Kvm:
    """An open /dev/kvm that has all a VM of ours needs. A context manager."""

    def __init__(self, fd: OwnedFd, abilities: Abilities) -> None:
        self.fd = fd
        self.abilities = abilities

    @classmethod
    def open(cls, path: str = KVM_PATH) -> Kvm:
        """``HostError`` says in one line what stands in the way."""
        fd = _open_device(path)
        try:
            raw = ffi.new("struct kvm_abilities *")
            code = lib.kvm_probe(fd.fileno(), raw)
            if code == -errno.ENOTTY:
                raise HostError(f"{path} is not a KVM device", errno=errno.ENOTTY)
            check(code, f"asking {path} for its API version")
            abilities = Abilities(
                api_version=raw.api_version,
                user_memory=bool(raw.user_memory),
                irqchip=bool(raw.irqchip),
                pit=bool(raw.pit),
                irqfd=bool(raw.irqfd),
                ioeventfd=bool(raw.ioeventfd),
                ioeventfd_any_length=bool(raw.ioeventfd_any_length),
                immediate_exit=bool(raw.immediate_exit),
                hyperv_eventfd=bool(raw.hyperv_eventfd),
                tsc_deadline=bool(raw.tsc_deadline),
                vcpus_max=raw.vcpus_max,
            )
            check_abilities(abilities, path)
        except BaseException:
            fd.close()
            raise
        return cls(fd, abilities)

    @property
    def why_no_hypercall(self) -> str | None:
        return self.abilities.why_no_hypercall

    @property
    def tsc_deadline(self) -> bool:
        return self.abilities.tsc_deadline

    @property
    def vcpus_max(self) -> int:
        """The most vCPUs a VM of ours may have here."""
        return min(self.abilities.vcpus_max, int(lib.VMM_VCPUS_MAX))

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """What KVM can show to a guest on this processor."""
        capacity = CPUID_ENTRIES_FIRST
        while True:
            raw = ffi.new("struct cpuid_entry[]", capacity)
            count = lib.kvm_supported_cpuid(self.fd.fileno(), raw, capacity)
            if count != -errno.E2BIG or capacity >= CPUID_ENTRIES_MAX:
                break
            capacity *= 2
        check(count, "KVM_GET_SUPPORTED_CPUID")
        return tuple(CpuidEntry(e.leaf, e.subleaf, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in raw[0:count])

    def close(self) -> None:
        self.fd.close()

    def __enter__(self) -> Kvm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_device(path: str) -> OwnedFd:
    try:
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostError(
            f"no {path}: load kvm_intel or kvm_amd; where that fails, virtualization is off in the firmware, or the "
            "hypervisor of this machine does not pass it on",
            errno=errno.ENOENT,
        ) from None
    except PermissionError as error:
        raise HostError(_no_permission(path), errno=error.errno or errno.EACCES) from None
    except OSError as error:
        raise HostError(f"opening {path}: {error.strerror}", errno=error.errno or 0) from None


def _no_permission(path: str) -> str:
    user = _name(os.geteuid(), lambda number: pwd.getpwuid(number).pw_name)
    found = Path(path).stat()
    group = _name(found.st_gid, lambda number: grp.getgrgid(number).gr_name)
    if found.st_mode & (stat.S_IRGRP | stat.S_IWGRP) == stat.S_IRGRP | stat.S_IWGRP:
        advice = f"its group is {group}: add the user to that group (usermod -a -G {group} {user}), then log in anew"
    else:
        advice = f"its mode is {stat.filemode(found.st_mode)}: its group {group} may not use it either"
    return f"user {user} may not open {path}: {advice}"


def _name(number: int, look_up: Callable[[int], str]) -> str:
    try:
        return look_up(number)
    except KeyError:
        return str(number)
