"""The eventfds through which a guest and this process wake each other without leaving the kernel."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from transports.hypercall import NUMBER_MAX
from transports.kvm.native import check, lib
from virtio.errors import HostError
from virtio.fd import OwnedFd


class Registration:
    """One eventfd that KVM knows: an ioeventfd, an irqfd, or a hypercall's connection id."""

    def __init__(self, owner: Doorbells, what: str, fd: OwnedFd, undo: Callable[[int], int]) -> None:
        self.what = what
        self._owner = owner
        self._fd = fd
        self._undo = undo

    def remove(self) -> None:
        """KVM does not use the eventfd any more when this returns. Again is harmless.

        ``HostError``: KVM did not let go; it may still signal the eventfd, and may be asked again.
        """
        if self._fd.closed:
            return
        check(self._undo(self._fd.fileno()), f"taking away the {self.what}")
        self._owner.forget(self)
        self._fd.close()

    def drop(self) -> None:
        """The VM is gone, and KVM's half with it."""
        self._fd.close()


class Doorbells:
    """What is registered with one VM. Each fd given stays the caller's; a duplicate is kept for the way back."""

    def __init__(self, vm: Any, why_no_hypercall: str | None) -> None:
        self._vm = vm
        self._why_no_hypercall = why_no_hypercall
        self._registered: set[Registration] = set()

    def ioeventfd_mmio(self, gpa: int, length: int, datamatch: int | None, fd: OwnedFd) -> Registration:
        return self._ioeventfd(0, gpa, length, datamatch, fd, f"doorbell at address {gpa:#x}")

    def ioeventfd_pio(self, port: int, length: int, datamatch: int | None, fd: OwnedFd) -> Registration:
        return self._ioeventfd(lib.VM_BELL_PIO, port, length, datamatch, fd, f"doorbell at port {port:#x}")

    def _ioeventfd(
        self, flags: int, address: int, length: int, datamatch: int | None, fd: OwnedFd, what: str
    ) -> Registration:
        if datamatch is not None:
            flags |= lib.VM_BELL_DATAMATCH
            what += f" for value {datamatch:#x}"

        def change(number: int, more: int) -> int:
            return lib.vm_ioeventfd(self._vm, address, length, datamatch or 0, flags | more, number)

        code = change(fd.fileno(), 0)
        if code == -errno.EEXIST:
            raise HostError(f"the {what} is already taken", errno=errno.EEXIST)
        if code == -errno.ENOSPC:
            raise HostError(f"the {what}: a VM of this kernel can have no more doorbells", errno=errno.ENOSPC)
        check(code, f"registering the {what}")
        return self._keep(what, fd, lambda number: change(number, lib.VM_BELL_REMOVE))

    def irqfd(self, gsi: int, fd: OwnedFd) -> Registration:
        what = f"interrupt {gsi}'s eventfd"
        check(lib.vm_irqfd(self._vm, gsi, fd.fileno(), 0), f"registering {what}")
        return self._keep(what, fd, lambda number: lib.vm_irqfd(self._vm, gsi, number, 1))

    def hypercall_id(self, connection_id: int, fd: OwnedFd) -> Registration:
        if not 0 <= connection_id <= NUMBER_MAX:
            raise ValueError(f"connection id {connection_id:#x} has more than 24 bits")
        if self._why_no_hypercall is not None:
            raise HostError(self._why_no_hypercall, errno=errno.ENOTTY)
        what = f"connection id {connection_id:#x}"
        code = lib.vm_hypercall_id(self._vm, connection_id, fd.fileno(), 0)
        if code == -errno.EEXIST:
            raise HostError(f"{what} is already taken", errno=errno.EEXIST)
        check(code, f"registering {what}")
        return self._keep(what, fd, lambda number: lib.vm_hypercall_id(self._vm, connection_id, number, 1))

    def _keep(self, what: str, fd: OwnedFd, undo: Callable[[int], int]) -> Registration:
        try:
            registration = Registration(self, what, fd.duplicate(), undo)
        except HostError as error:
            undo(fd.fileno())
            raise HostError(f"keeping the {what}: {error}", errno=error.errno) from error
        self._registered.add(registration)
        return registration

    def forget(self, registration: Registration) -> None:
        self._registered.discard(registration)

    def close(self) -> None:
        """With the VM: KVM gives its halves up when the VM's last descriptor is closed."""
        while self._registered:
            self._registered.pop().drop()
