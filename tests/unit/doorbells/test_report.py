"""What a measurement is reported as: honesty, JSON, the file for the daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit.doorbell_reports import MEDIANS, measurement

from daemon.doorbells.measure import make_report, report_of
from daemon.doorbells.report import VERSION, Report, load, save, to_json
from virtio.errors import HostError


def codes(report: Report) -> list[str]:
    return [reason.code for reason in report.reasons]


def test_cycles_become_nanoseconds_by_the_counters_own_rate() -> None:
    report = report_of(measurement(), below="")
    pio = report.find("pio")
    assert pio is not None
    assert pio.kernel is not None
    assert pio.thread is not None
    assert (pio.kernel.median_ns, pio.kernel.p99_ns, pio.kernel.median_cycles) == (600.0, 1200.0, 1800)
    assert pio.thread.median_ns == 3100.0


def test_a_quiet_machine_of_its_own_is_trusted() -> None:
    report = report_of(measurement(), below="")
    assert report.trustworthy
    assert not report.reasons


@pytest.mark.parametrize(
    ("below", "guest_loop", "spread", "code", "meaningless"),
    [
        ("QEMU's TCG", 2_000, 0.01, "emulated-host", True),
        ("", 8_000_000, 0.01, "emulated-guest", True),
        ("KVM", 2_000, 0.01, "nested", False),
        ("", 2_000, 0.5, "noisy", False),
    ],
)
def test_what_makes_figures_worth_less_is_said(
    below: str, guest_loop: int, spread: float, code: str, meaningless: bool
) -> None:
    report = report_of(measurement(guest_loop=guest_loop, spread=spread), below)
    assert not report.trustworthy
    assert codes(report) == [code]
    assert report.meaningless is meaningless


def test_threads_may_wake_up_differently_fast_but_not_anyhow() -> None:
    assert report_of(measurement(thread_spread=0.4), below="").trustworthy
    assert codes(report_of(measurement(thread_spread=0.6), below="")) == ["noisy"]


def test_all_reasons_are_given_the_worst_first() -> None:
    report = report_of(measurement(guest_loop=8_000_000, spread=0.5), below="KVM")
    assert codes(report) == ["emulated-guest", "nested", "noisy"]


def test_a_kind_that_does_not_work_has_its_reason_and_no_cost() -> None:
    report = report_of(measurement(no_hypercall="this KVM cannot"), below="")
    call = report.find("hypercall")
    assert call is not None
    assert call.why_not == "this KVM cannot"
    assert report.costs("kernel").keys() == MEDIANS.keys() - {"hypercall"}
    assert report.trustworthy


def test_costs_are_seconds_by_kind_and_target() -> None:
    report = report_of(measurement(), below="")
    assert report.costs("kernel")["hypercall"] == pytest.approx(400e-9)
    assert report.costs("thread")["hypercall"] == pytest.approx(2900e-9)
    assert "cpuid" not in report.costs("thread")


@pytest.mark.parametrize(
    ("path", "words"), [("/dev/null", "is not a KVM device"), ("/dev/no-such-kvm", "no /dev/no-such-kvm")]
)
def test_without_kvm_every_kind_says_why_and_nothing_is_trusted(path: str, words: str) -> None:
    report = make_report(path)
    assert not report.measured_something
    assert not report.trustworthy
    assert {measured.kind for measured in report.doorbells} == {"mmio", "mmio-match", "pio", "hypercall"}
    assert all(words in (measured.why_not or "") for measured in report.doorbells)


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    report = report_of(measurement(no_hypercall="this KVM cannot"), below="KVM")
    path = tmp_path / "costs.json"
    path.write_text("an older one")
    save(report, path)
    assert load(path) == report
    assert json.loads(path.read_text())["hyperbell_doorbells"] == VERSION
    assert [file.name for file in tmp_path.iterdir()] == ["costs.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_cannot_be_written_is_said_and_nothing_stays_behind(tmp_path: Path) -> None:
    report = report_of(measurement(), below="")
    with pytest.raises(HostError, match=r"nowhere/costs.json: cannot be written: No such file"):
        save(report, tmp_path / "nowhere" / "costs.json")
    (tmp_path / "costs.json").mkdir()
    with pytest.raises(HostError, match="cannot be written"):
        save(report, tmp_path / "costs.json")
    assert [file.name for file in tmp_path.iterdir()] == ["costs.json"]


def document(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(to_json(report_of(measurement(), below="")))
    return found | changes


def without_a_figure() -> dict[str, Any]:
    broken = document()
    del broken["doorbells"][0]["kernel"]
    return broken


def with_a_cost(cost: object) -> dict[str, Any]:
    broken = document()
    broken["doorbells"][0]["kernel"]["median_ns"] = cost
    return broken


def with_two_of_a_kind() -> dict[str, Any]:
    broken = document()
    broken["doorbells"].append(broken["doorbells"][0])
    return broken


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[]", "valid dictionary|object"),
        (b'{"costs": 1}', "hyperbell_doorbells: Field required"),
        (b" " * (1 << 21), "too large"),
        (json.dumps(document(hyperbell_doorbells=2)).encode(), "hyperbell_doorbells"),
        (json.dumps(document(surprise=1)).encode(), "surprise"),
        (json.dumps(document(trustworthy=False)).encode(), "trustworthy"),
        (json.dumps(without_a_figure()).encode(), "mmio needs figures"),
        (json.dumps(with_a_cost(-1.0)).encode(), "median_ns"),
        (json.dumps(with_a_cost("400")).encode(), "median_ns"),
        (json.dumps(with_a_cost(True)).encode(), "median_ns"),
        (json.dumps(with_a_cost(float("nan"))).encode(), "median_ns|JSON"),
        (json.dumps(with_two_of_a_kind()).encode(), "twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_one_line_that_names_it_and_the_remedy(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(content)
    with pytest.raises(HostError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "hyperbell doorbells --save" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="does not exist; make it"):
        load(tmp_path / "none.json")
    with pytest.raises(HostError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_a_report_of_nothing_is_no_file_of_costs(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save(make_report("/dev/null"), path)
    with pytest.raises(HostError, match="has no costs"):
        load(path)
