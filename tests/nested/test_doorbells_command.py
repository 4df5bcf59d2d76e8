"""``hyperbell doorbells`` on real KVM: every kind works and is measured, and that the host is emulated is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pytest
import trio
from nested.laboratory import Laboratory

from daemon.doorbells.report import DOORBELLS, Report
from daemon.doorbells.table import render
from guest.boot.toy import prepare_toy
from guest.nested.level import Level
from guest.nested.tracing import Counts, watch_doorbells
from transports.kvm.doorbell_cost.rounds import (
    BELLS,
    KERNEL,
    KEY,
    MMIO,
    MMIO_MATCH,
    PIO,
    THREAD,
    WARM_UP_RINGS,
    WARM_UP_ROUNDS,
)
from transports.kvm.machine.slots import slot

pytestmark = pytest.mark.nested_full

SECONDS: Final = 120
WARM_UP: Final = WARM_UP_ROUNDS * WARM_UP_RINGS
PLACES: Final = {"mmio": MMIO, "mmio-match": MMIO_MATCH, "pio": PIO}
CONNECTION_IDS: Final = {target: bell ^ KEY for target, bell in BELLS.items()}


@dataclass
class Record:
    report: Report
    saved: str
    seen: Counts


async def scenario(host: Level) -> Record:
    async with watch_doorbells(host) as trace:
        answer = await host.run("hyperbell doorbells --json --save /tmp/costs.json", timeout_seconds=SECONDS)
        seen = await trace.counts()
    report = Report.model_validate_json("\n".join(answer.lines), strict=True)
    return Record(report, (await host.read("/tmp/costs.json")).decode(), seen)


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


@pytest.mark.parametrize("kind", DOORBELLS)
def test_every_kind_works_and_is_measured_to_both_targets(record: Record, kind: str) -> None:
    (measured,) = (measured for measured in record.report.doorbells if measured.kind == kind)
    assert measured.why_not is None
    assert measured.kernel is not None
    assert measured.thread is not None
    assert 0 < measured.kernel.median_ns <= measured.kernel.p99_ns
    assert measured.kernel.median_ns < measured.thread.median_ns


@pytest.mark.parametrize("kind", PLACES)
def test_kvm_saw_exactly_the_plain_rings_that_are_reported(record: Record, kind: str) -> None:
    (measured,) = (measured for measured in record.report.doorbells if measured.kind == kind)
    assert measured.kernel is not None
    assert measured.thread is not None
    assert record.seen.ioeventfds[PLACES[kind][KERNEL]] == measured.kernel.rings + WARM_UP
    assert record.seen.ioeventfds[PLACES[kind][THREAD]] >= measured.thread.rings


def test_kvm_saw_exactly_the_hypercalls_that_are_reported(record: Record) -> None:
    measured = record.report.find("hypercall")
    assert measured is not None
    assert measured.kernel is not None
    assert measured.thread is not None
    tried_before = 1  # in a VM of its own
    assert record.seen.hypercalls[CONNECTION_IDS[KERNEL]] == measured.kernel.rings + WARM_UP + tried_before
    assert record.seen.hypercalls[CONNECTION_IDS[THREAD]] >= measured.thread.rings


def test_exits_are_measured_beside_them(record: Record) -> None:
    costs = record.report.costs("kernel")
    assert 0 < costs["cpuid"] < costs["exit"]


def test_that_the_figures_mean_nothing_is_said(record: Record) -> None:
    assert not record.report.trustworthy
    assert record.report.reasons[0].code == "emulated-host"
    assert record.report.host.below == "QEMU's TCG"
    text = " ".join(render(record.report).split())
    assert "THESE FIGURES MEAN NOTHING: this machine is itself emulated" in text
    assert "At 10,000 rings a second the hypercall," in text


def test_the_file_for_the_daemon_is_the_same(record: Record) -> None:
    assert Report.model_validate_json(record.saved, strict=True) == record.report


async def test_a_machine_of_our_own_shows_what_its_hypercalls_save(host: Level) -> None:
    """The toy guest rings by hypercall without end; the daemon multiplies what it counts with what was measured."""
    toy = await trio.to_thread.run_sync(lambda: prepare_toy(print).program(64))
    await host.write("/tmp/toy", await trio.Path(toy).read_bytes())
    await host.run("[ -s /tmp/costs.json ] || hyperbell doorbells --save /tmp/costs.json", timeout_seconds=SECONDS)
    place = slot(1)
    append = f"device=4:{place.gpa:#x}:{place.gsi}:{place.port:#x} doorbell=hypercall mode=loop requests=100000000"
    words = f"--memory 4M --kernel /tmp/toy --device rng,name=entropy --key 5a5a5a --append '{append}'"
    page = "http://127.0.0.1:9481/metrics"
    command = f"hyperbell microvm {words} --doorbell-costs /tmp/costs.json --metrics 127.0.0.1:9481"
    async with host.job("worth", command):
        share = 'hyperbell_doorbell_cpu_share{device="entropy",what="saved"}'
        wait = (
            f"n=0; until wget -q -O - {page} | grep -F '{share}'; do n=$((n+1)); [ $n -lt 600 ] || break; usleep 99999"
        )
        answer = await host.run(f"{wait}; done; wget -q -O - {page} | grep doorbell", timeout_seconds=SECONDS)
    found = dict(line.rsplit(" ", 1) for line in answer.lines if line.startswith("hyperbell_"))
    rate = float(found['hyperbell_doorbell_rings_per_second{device="entropy",kind="hypercall"}'])
    costs = {
        kind: float(found[f'hyperbell_doorbell_cost_seconds{{kind="{kind}",target="kernel"}}'])
        for kind in ("mmio", "hypercall")
    }
    assert rate > 0
    assert float(found[share]) == pytest.approx(rate * (costs["mmio"] - costs["hypercall"]))
    assert float(found["hyperbell_doorbell_costs_trustworthy"]) == 0
