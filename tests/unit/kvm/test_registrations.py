"""What KVM was given and does not give back: it stays known, and can be asked for again. KVM is a double here."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
from kit.front_end.vhost_user_wire import no_fd_leaks, no_further_descriptors

from transports.kvm.machine.hypercalls import HypervEventfds
from transports.kvm.vm.doorbells import Doorbells, Registration
from virtio.errors import HostError
from virtio.fd import OwnedFd

ID = 0x5A5B5A


class Kvm:
    """A VM's connection ids; ``code`` is the answer to a DEASSIGN."""

    why_no_hypercall = None

    def __init__(self) -> None:
        self.code = 0
        self.ids: set[int] = set()
        self.asked = 0
        self.doorbells = Doorbells(None, None)

    def hypercall_id(self, connection: int, fd: OwnedFd) -> Registration:
        self.ids.add(connection)
        registration = Registration(self.doorbells, f"connection id {connection:#x}", fd.duplicate(), self.deassign)
        self.doorbells._registered.add(registration)
        return registration

    def deassign(self, number: int) -> int:
        self.asked += 1
        assert os.fstat(number)  # the eventfd is open still
        if self.code == 0:
            self.ids.clear()
        return self.code


@pytest.fixture
def fd() -> Iterator[OwnedFd]:
    with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)) as one:
        yield one


def test_an_id_that_kvm_did_not_let_go_can_be_withdrawn_later(fd: OwnedFd) -> None:
    kvm: Any = Kvm()
    with no_fd_leaks():
        kind = HypervEventfds(kvm)
        kind.register(ID, fd)
        kvm.code = -errno.EIO
        for _ in range(2):
            with pytest.raises(HostError, match=f"taking away the connection id {ID:#x}: Input/output error"):
                kind.withdraw(ID)
            assert kvm.ids == {ID}
        kvm.code = 0
        kind.withdraw(ID)
        kind.withdraw(ID)  # it is not here any more
        assert (kvm.ids, kvm.asked) == (set(), 3)


def test_what_kvm_never_let_go_ends_with_the_vm(fd: OwnedFd) -> None:
    kvm: Any = Kvm()
    with no_fd_leaks():
        registration = kvm.hypercall_id(ID, fd)
        kvm.code = -errno.EIO
        with pytest.raises(HostError):
            registration.remove()
        kvm.doorbells.close()
        registration.remove()  # the VM is gone, and nobody is asked
        assert kvm.asked == 1


def test_the_lack_of_a_descriptor_is_an_error_of_the_hosts(fd: OwnedFd) -> None:
    with no_further_descriptors(), pytest.raises(HostError, match="Too many open files") as caught:
        fd.duplicate()
    assert caught.value.errno == errno.EMFILE
