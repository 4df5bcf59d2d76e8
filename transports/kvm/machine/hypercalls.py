"""Hypercalls that signal eventfds, by KVM_HYPERV_EVENTFD: the one kind of ``HypercallKind`` there is code for."""

from __future__ import annotations

from transports.kvm.vm.doorbells import Registration
from transports.kvm.vm.vmm import Vm
from virtio.fd import OwnedFd


class HypervEventfds:
    """The connection ids of one VM (``transports.hypercall.HypercallKind``)."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._registered: dict[int, Registration] = {}

    @property
    def why_not(self) -> str | None:
        return self._vm.why_no_hypercall

    def register(self, connection: int, fd: OwnedFd) -> None:
        self._registered[connection] = self._vm.hypercall_id(connection, fd)

    def withdraw(self, connection: int) -> None:
        """An id that is not registered here is let be: it may be another device's."""
        registration = self._registered.get(connection)
        if registration is not None:
            registration.remove()
            del self._registered[connection]  # not earlier: while KVM holds it, it can be asked for again
