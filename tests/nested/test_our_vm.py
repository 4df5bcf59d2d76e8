"""Our own VM under mainline KVM: its tests, run in H, where hypercalls are to be had and instructions are executed."""

from __future__ import annotations

import pytest
from nested.inner_tests import run_tests_in
from nested.laboratory import Laboratory

# What a KVM that emulates each instruction cannot show, and beside each refusal its positive control.
OF_MAINLINE_KVM_ALONE = (
    "test_a_hypercall_rings_its_id_and_no_other",
    "test_a_withdrawn_id_gives_a_status_and_can_be_registered_again",
    "test_a_connection_id_that_is_taken_is_refused_by_name",
)
FILES = ("test_kvm_doorbells", "test_kvm_ends", "test_kvm_vm", "test_kvm_host")


@pytest.mark.nested
def test_hypercalls_ring_the_ids_of_our_vm(laboratory: Laboratory) -> None:
    run = laboratory.play(lambda host: run_tests_in(host, FILES[:1], " or ".join(OF_MAINLINE_KVM_ALONE), 120))
    assert run.outcomes == dict.fromkeys(OF_MAINLINE_KVM_ALONE, "PASSED"), run.text


@pytest.mark.nested_full
def test_all_that_our_vm_promises_holds_under_mainline_kvm(laboratory: Laboratory) -> None:
    run = laboratory.play(lambda host: run_tests_in(host, FILES, "not kernel_without_the_hypercall_doorbell", 500))
    assert len(run.outcomes) > 60, run.text
    assert run.not_passed == {}, run.text
