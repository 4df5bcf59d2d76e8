"""Our own VM under mainline KVM: its tests, run in H, where hypercalls are to be had and instructions are executed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from nested.laboratory import Laboratory

from guest.level import Level

# What a KVM that emulates each instruction cannot show, and beside each refusal its positive control.
OF_MAINLINE_KVM_ALONE = (
    "test_a_hypercall_rings_its_id_and_no_other",
    "test_a_withdrawn_id_gives_a_status_and_can_be_registered_again",
    "test_a_connection_id_that_is_taken_is_refused_by_name",
)
FILES = ("doorbells", "ends", "vm", "host")
# Without what these tests do not use: imports are what takes the time in an emulated machine.
PYTEST = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 pytest -p pytest_trio.plugin --noconftest -v --color=no --no-header"


async def outcomes_in(host: Level, names: tuple[str, ...], selection: str, timeout_seconds: float) -> Mapping[str, str]:
    """Each selected test of our VM by name, and how it went in ``host``."""
    files = " ".join(f"tests/integration/test_kvm_{name}.py" for name in names)
    command = f"cd /project && {PYTEST} {files} -k '{selection}'"
    answer = await host.run(command, status=None, timeout_seconds=timeout_seconds)
    found = (re.match(r"\S+::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", line) for line in answer.lines)
    return {match[1]: match[2] for match in found if match is not None}


@pytest.mark.nested
def test_hypercalls_ring_the_ids_of_our_vm(laboratory: Laboratory) -> None:
    async def scenario(host: Level) -> Mapping[str, str]:
        return await outcomes_in(host, ("doorbells",), " or ".join(OF_MAINLINE_KVM_ALONE), 120)

    assert laboratory.play(scenario) == dict.fromkeys(OF_MAINLINE_KVM_ALONE, "PASSED")


@pytest.mark.nested_full
def test_all_that_our_vm_promises_holds_under_mainline_kvm(laboratory: Laboratory) -> None:
    async def scenario(host: Level) -> Mapping[str, str]:
        return await outcomes_in(host, FILES, "not kernel_without_the_hypercall_doorbell", 500)

    outcomes = laboratory.play(scenario)
    assert len(outcomes) > 60
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "PASSED"} == {}
