"""A machine of our own with devices under mainline KVM: ``tests/integration/test_kvm_machine.py``, run in H.

There the toy guest and the daemon check every byte and count every ring; here H's KVM says which doorbells it saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from kit.guest.toy_machine import KEY
from nested.inner_tests import InnerRun, bring_toy, run_tests_in
from nested.laboratory import Laboratory

from guest.nested.level import Level
from guest.nested.tracing import Counts, watch_doorbells
from transports.hypercall import connection_id
from transports.kvm.machine.slots import slot
from virtio.mmio.registers import OFFSETS

FILE = "test_kvm_machine"
SECONDS = 120.0
ALL_SECONDS = 500.0

QUEUES = {0: 2, 1: 1, 2: 2}
"""By device: the disk, the entropy and the network device of ``toy_machine``, in its order."""
CONNECTION_IDS = {
    connection_id(slot(device).bell(queue), KEY) for device, count in QUEUES.items() for queue in range(count)
}
PLACES = {
    "mmio": {slot(device).gpa + OFFSETS["QueueNotify"] for device in QUEUES},
    "pio": {slot(device).port for device in QUEUES},
}
BY_HYPERCALL = "test_hypercalls_carry_every_request_and_the_guest_accepts_nothing_less"
PLAIN = "test_every_byte_of_every_device_is_right_and_every_ring_is_counted_by_its_kind"
UNDER_LOAD = "test_withdrawn_and_offered_again_under_load_no_request_is_lost"
TAKEN = "test_an_id_that_is_taken_leaves_its_queue_with_the_plain_doorbell"


@dataclass(frozen=True)
class Traced:
    """What H's KVM saw while some of the tests ran in it."""

    run: InnerRun
    seen: Counts

    @property
    def plain(self) -> set[int]:
        """Where plain doorbells of our devices were rung."""
        return self.seen.ioeventfds.keys() & set().union(*PLACES.values())


async def traced(host: Level, selection: str, timeout_seconds: float = SECONDS) -> Traced:
    await bring_toy(host)
    async with watch_doorbells(host) as trace:
        run = await run_tests_in(host, [FILE], selection, timeout_seconds)
        return Traced(run, await trace.counts())


@pytest.mark.nested
def test_kvm_sees_every_queue_rung_by_its_connection_id_and_no_plain_doorbell(laboratory: Laboratory) -> None:
    done = laboratory.play(lambda host: traced(host, BY_HYPERCALL))
    assert done.run.outcomes == {BY_HYPERCALL: "PASSED"}, done.run.text
    assert done.seen.hypercalls.keys() == CONNECTION_IDS
    assert done.plain == set()


@pytest.mark.nested
def test_kvm_sees_the_plain_doorbells_where_they_belong_and_no_hypercall(laboratory: Laboratory) -> None:
    done = laboratory.play(lambda host: traced(host, "every_byte and pio-32-bit-1"))
    assert done.run.outcomes == {f"{PLAIN}[pio-32-bit-1]": "PASSED"}, done.run.text
    assert done.seen.hypercalls == {}
    assert done.plain == PLACES["pio"]


@pytest.mark.nested
def test_ids_withdrawn_and_offered_again_under_load_lose_no_request(laboratory: Laboratory) -> None:
    done = laboratory.play(lambda host: traced(host, UNDER_LOAD))
    assert done.run.outcomes == {UNDER_LOAD: "PASSED"}, done.run.text
    assert done.seen.hypercalls.keys() <= CONNECTION_IDS
    assert done.seen.hypercalls
    assert done.plain


@pytest.mark.nested
def test_a_taken_id_leaves_its_queue_with_the_plain_doorbell(laboratory: Laboratory) -> None:
    """The entropy device's id is another's: KVM sees its plain doorbell, and the hypercalls of its neighbours."""
    done = laboratory.play(lambda host: traced(host, TAKEN))
    assert done.run.outcomes == {TAKEN: "PASSED"}, done.run.text
    assert connection_id(slot(1).bell(0), KEY) not in done.seen.hypercalls
    assert slot(1).gpa + OFFSETS["QueueNotify"] in done.plain


@pytest.mark.nested_full
def test_all_that_a_machine_of_ours_promises_holds_under_mainline_kvm(laboratory: Laboratory) -> None:
    """Hostile guests too, with an honest one beside them."""
    done = laboratory.play(lambda host: traced(host, "", ALL_SECONDS))
    assert len(done.run.outcomes) > 23, done.run.text
    assert done.run.not_passed == {}, done.run.text
