"""Which doorbells of stock QEMU's VMs get a connection id: the rules, and what is shown. Without I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from structlog.testing import capture_logs

from transports.stock_qemu.messages import Message, Reason, Type, VmFlag
from transports.stock_qemu.vms import BELLS_MAX, QemuDoorbells, Vm
from virtio.errors import PeerError

SHOWN: Final = VmFlag.KEY_SHOWN | VmFlag.CPUID_SEEN | VmFlag.HYPERV
BELL: Final = 0x109000


class Library:
    """One VM's library that is connected to ``doorbells``, without the wire."""

    def __init__(self, doorbells: QemuDoorbells, flags: VmFlag = SHOWN, reason: int = 0, name: str = "") -> None:
        self.doorbells = doorbells
        self.wakes = 0
        self.left = False
        self.vm: Vm = doorbells.connect(17, self._wake, lambda: self.left)
        self.tell(flags, reason, name)

    def _wake(self) -> None:
        self.wakes += 1

    def tell(self, flags: VmFlag, reason: int = 0, name: str = "") -> None:
        self.doorbells.receive(self.vm, Message(Type.VM, flags=flags, result=reason, name=name))

    def bell(self, eventfd: int | None, bell: int = BELL, serial: int = 1, registered: bool = False) -> None:
        self.doorbells.receive(self.vm, Message(Type.BELL, bell=bell, serial=serial, flags=int(registered)), eventfd)

    def gone(self, bell: int = BELL, serial: int = 1) -> None:
        self.doorbells.receive(self.vm, Message(Type.BELL_GONE, bell=bell, serial=serial))

    def answer(self, result: int, registered: bool, serial: int = 1, bell: int = BELL) -> None:
        message = Message(Type.ANSWER, bell=bell, serial=serial, flags=int(registered), result=result)
        self.doorbells.receive(self.vm, message)

    def orders(self) -> list[tuple[str, int, int]]:
        """What it is told, but for the welcome."""
        found = [message for message in self.vm.commands() if message.type != Type.WELCOME]
        return [(Type(message.type).name, message.bell, message.serial) for message in found]


@pytest.fixture
def doorbells() -> QemuDoorbells:
    doorbells = QemuDoorbells()
    doorbells.set_policy("disk", "offer")
    return doorbells


REGISTER: Final = [("REGISTER", BELL, 1)]
WITHDRAW: Final = [("WITHDRAW", BELL, 1)]


@pytest.mark.parametrize("kick_first", [True, False])
def test_a_doorbell_is_registered_once_its_eventfd_is_a_queues(doorbells: QemuDoorbells, kick_first: bool) -> None:
    library = Library(doorbells)
    steps: list[Callable[[], None]] = [lambda: doorbells.kick_changed("disk", 0, 5), lambda: library.bell(5)]
    for step in steps if kick_first else reversed(steps):
        assert library.orders() == []
        step()
    assert library.orders() == REGISTER
    assert library.orders() == []


def test_the_library_is_welcomed_once(doorbells: QemuDoorbells) -> None:
    library = Library(doorbells)
    assert library.wakes == 1
    library.tell(SHOWN)
    assert [message.type for message in library.vm.commands()] == [Type.WELCOME]
    assert list(library.vm.commands()) == []


def test_an_eventfd_that_is_no_queues_gets_no_id(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(6)
    library.bell(None, BELL + 1)  # of a kernel that does not tell
    assert library.orders() == []


@pytest.mark.parametrize(
    ("policy", "flags", "offered"),
    [
        ("offer", SHOWN, True),
        ("offer", SHOWN | VmFlag.MAY_NEST, True),
        ("withhold", SHOWN, False),
        ("auto", SHOWN, True),
        ("auto", SHOWN | VmFlag.MAY_NEST, False),
        ("offer", VmFlag.CPUID_SEEN | VmFlag.HYPERV, False),  # the guest does not see the leaf
    ],
)
def test_the_policy_and_what_the_guest_is_shown_decide(
    doorbells: QemuDoorbells, policy: str, flags: VmFlag, offered: bool
) -> None:
    doorbells.set_policy("disk", policy)  # type: ignore[arg-type]
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells, flags)
    library.bell(5)
    assert library.orders() == (REGISTER if offered else [])


def test_a_policy_that_changes_takes_the_id_away_and_gives_it_back(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    assert library.orders() == REGISTER
    library.answer(0, True)
    wakes = library.wakes
    doorbells.set_policy("disk", "withhold")
    assert library.wakes > wakes
    assert library.orders() == WITHDRAW
    library.answer(0, False)
    doorbells.set_policy("disk", "offer")
    assert library.orders() == REGISTER


def test_what_changes_there_and_back_before_it_was_told_is_not_told(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    doorbells.set_policy("disk", "withhold")
    assert library.orders() == []


def test_a_queue_that_stands_keeps_its_id(doorbells: QemuDoorbells) -> None:
    """It rings QEMU's own eventfd as the plain doorbell does; without it the guest would ring plainly for seconds."""
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    assert library.orders() == REGISTER
    library.answer(0, True)
    doorbells.kick_changed("disk", 0, None)
    assert library.orders() == []
    (bell,) = doorbells.snapshot()[0].bells
    assert (bell.device, bell.queue, bell.registered) == ("disk", 0, True)
    doorbells.kick_changed("disk", 0, 5)
    assert library.orders() == []


def test_a_policy_takes_the_id_of_a_queue_that_stands_too(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    library.orders()
    doorbells.kick_changed("disk", 0, None)
    doorbells.set_policy("disk", "withhold")
    assert library.orders() == WITHDRAW
    doorbells.set_policy("disk", "offer")
    assert library.orders() == REGISTER


def test_a_queue_that_starts_with_another_kick_takes_the_old_id_away(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    library.bell(6, BELL + 1)
    assert library.orders() == REGISTER
    doorbells.kick_changed("disk", 0, None)
    doorbells.kick_changed("disk", 0, 6)
    assert library.orders() == [*WITHDRAW, ("REGISTER", BELL + 1, 1)]


def test_a_doorbell_that_appears_while_a_queue_stands_is_not_that_queues(doorbells: QemuDoorbells) -> None:
    """The kernel gives the number of an eventfd that is gone to the next one."""
    doorbells.kick_changed("disk", 0, 5)
    doorbells.kick_changed("disk", 0, None)
    library = Library(doorbells)
    library.bell(5)
    assert library.orders() == []
    doorbells.kick_changed("disk", 0, 6)
    assert library.orders() == []


def test_an_eventfd_of_two_queues_needs_the_consent_of_both(doorbells: QemuDoorbells) -> None:
    doorbells.set_policy("shy", "withhold")
    doorbells.kick_changed("disk", 0, 5)
    doorbells.kick_changed("shy", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    assert library.orders() == []
    doorbells.kick_changed("shy", 0, 6)
    assert library.orders() == REGISTER


def test_a_device_nobody_has_spoken_of_is_withheld(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("unknown", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    assert library.orders() == []


def test_an_id_from_before_this_daemon_stays_until_its_queue_is_known(doorbells: QemuDoorbells) -> None:
    doorbells.set_policy("disk", "withhold")
    library = Library(doorbells)
    library.bell(5, registered=True)
    assert library.orders() == []
    doorbells.kick_changed("disk", 0, 5)
    assert library.orders() == WITHDRAW


def test_an_id_from_before_this_daemon_that_may_stay_is_not_ordered_again(doorbells: QemuDoorbells) -> None:
    library = Library(doorbells)
    library.bell(5, registered=True)
    doorbells.kick_changed("disk", 0, 5)
    assert library.orders() == []
    assert doorbells.snapshot()[0].bells[0].registered


def test_a_doorbell_that_comes_anew_is_another_one(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    library.orders()
    library.bell(5, serial=2)
    assert library.orders() == [("REGISTER", BELL, 2)]
    library.gone(serial=2)
    doorbells.kick_changed("disk", 0, 6)
    assert library.orders() == []


def test_a_vm_that_can_have_no_ids_is_told_nothing_and_counted(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    with capture_logs() as logs:
        library = Library(doorbells, SHOWN, Reason.CPUID_REFUSED)
        library.tell(SHOWN, Reason.CPUID_REFUSED)
    library.bell(5)
    assert library.orders() == []
    assert doorbells.refusals == {"cpuid_refused": 1}
    assert [line["log_level"] for line in logs] == ["info", "warning"]


def test_a_vm_that_loses_its_key_later_is_told_to_withdraw(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    library.orders()
    library.tell(SHOWN & ~VmFlag.KEY_SHOWN, Reason.CPUID_REFUSED)
    assert library.orders() == WITHDRAW


def test_what_kvm_refuses_is_shown_counted_and_logged_once(doorbells: QemuDoorbells) -> None:
    library = Library(doorbells)
    with capture_logs() as logs:
        for number in range(3):
            doorbells.kick_changed("disk", number, 5 + number)
            library.bell(5 + number, BELL + number)
            library.orders()
            library.answer(17, False, bell=BELL + number)
    assert doorbells.refusals == {"EEXIST": 3}
    assert len(logs) == 1
    assert {bell.error for bell in doorbells.snapshot()[0].bells} == {"EEXIST"}


def test_an_error_nobody_knows_has_a_name_too(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    library.bell(5)
    library.orders()
    with capture_logs() as logs:
        for error in (12345, -1, 99999):
            library.answer(error, False)
    assert doorbells.refusals == {"other": 3}
    assert len(logs) == 1  # whatever numbers a peer may think of


@pytest.mark.parametrize("later", [Reason.NONE, Reason.INCOMING])
def test_a_reason_that_changes_ends_the_connection(doorbells: QemuDoorbells, later: Reason) -> None:
    """Else each change would be a line in the log and a count, as often as a peer likes."""
    library = Library(doorbells, SHOWN, Reason.CPUID_REFUSED)
    with pytest.raises(PeerError, match="the first one given stays"):
        library.tell(SHOWN, later)
    assert doorbells.refusals == {"cpuid_refused": 1}


def test_two_vms_do_not_disturb_each_other(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    doorbells.kick_changed("disk", 1, 6)
    one, other = Library(doorbells), Library(doorbells)
    one.bell(5)
    other.bell(6)  # the same number, another VM
    assert (one.orders(), other.orders()) == (REGISTER, REGISTER)
    doorbells.disconnect(one.vm)
    doorbells.kick_changed("disk", 1, 7)
    assert other.orders() == WITHDRAW
    assert [vm.name for vm in doorbells.snapshot()] == ["vm1"]


# Names


def test_a_vm_has_the_name_it_was_given_or_a_number(doorbells: QemuDoorbells) -> None:
    names = ["web1", "", "web1", "a b", "x" * 32, '"}\n', "-x", "vm9"]
    with capture_logs() as logs:
        for name in names:
            Library(doorbells, name=name)
    assert [vm.name for vm in doorbells.snapshot()] == ["web1", "vm0", "vm1", "vm2", "vm3", "vm4", "vm5", "vm9"]
    assert len([line for line in logs if line["log_level"] == "warning"]) == 5


def test_the_name_does_not_change_afterwards(doorbells: QemuDoorbells) -> None:
    library = Library(doorbells, name="web1")
    library.tell(SHOWN, name="other")
    assert [vm.name for vm in doorbells.snapshot()] == ["web1"]


def test_a_library_that_is_back_before_its_end_was_noticed_has_its_name_again(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    first = Library(doorbells, name="web1")
    first.bell(5)
    first.left = True
    with capture_logs() as logs:
        second = Library(doorbells, name="web1")
        second.bell(5, registered=True)
    assert [line["log_level"] for line in logs] == ["info"]
    assert [vm.name for vm in doorbells.snapshot()] == ["web1"]
    doorbells.disconnect(first.vm)  # now it is noticed
    assert [(vm.name, len(vm.bells)) for vm in doorbells.snapshot()] == [("web1", 1)]
    second.left = True
    Library(doorbells, name="web1")
    assert [vm.name for vm in doorbells.snapshot()] == ["web1"]


# Hostile libraries


def test_nothing_may_come_before_the_vm(doorbells: QemuDoorbells) -> None:
    vm = doorbells.connect(1, lambda: None, lambda: False)
    for kind in (Type.BELL, Type.BELL_GONE, Type.ANSWER):
        with pytest.raises(PeerError, match="does not tell of the VM"):
            doorbells.receive(vm, Message(kind), 5)
    assert doorbells.snapshot() == ()
    doorbells.disconnect(vm)


@pytest.mark.parametrize(
    "message",
    [
        Message(Type.BELL_GONE, bell=BELL + 1),
        Message(Type.ANSWER, bell=BELL + 1),
        Message(Type.ANSWER, bell=BELL, serial=2),
        Message(Type.VM, result=77),
        Message(Type.VM, result=-1),
    ],
)
def test_what_contradicts_the_state_ends_the_connection(doorbells: QemuDoorbells, message: Message) -> None:
    library = Library(doorbells)
    library.bell(5)
    with pytest.raises(PeerError):
        doorbells.receive(library.vm, message)


def test_there_is_a_bound_for_doorbells(doorbells: QemuDoorbells) -> None:
    library = Library(doorbells)
    for number in range(BELLS_MAX):
        library.bell(5, bell=0x10000 + number)
    library.bell(5, bell=0x10000, serial=2)  # in place of the first
    with pytest.raises(PeerError, match="more than"):
        library.bell(5, bell=0x10000 + BELLS_MAX)


def test_flags_that_nobody_knows_change_nothing(doorbells: QemuDoorbells) -> None:
    library = Library(doorbells)
    doorbells.receive(library.vm, Message(Type.VM, flags=0xFFFFFFFF & ~int(VmFlag.MAY_NEST)))
    assert library.vm.flags == ~VmFlag.MAY_NEST


def test_nothing_is_left_of_a_vm_that_has_gone(doorbells: QemuDoorbells) -> None:
    doorbells.kick_changed("disk", 0, 5)
    library = Library(doorbells)
    for number in range(20):
        library.bell(5, bell=BELL + number)
    doorbells.disconnect(library.vm)
    doorbells.kick_changed("disk", 0, None)
    assert doorbells._bells == {}
    assert doorbells._queues == {}
    assert doorbells._vms == []
