"""The report for people."""

from __future__ import annotations

import re

import pytest
from kit.doorbell_reports import MEDIANS, measurement

from daemon.doorbells.measure import make_report, report_of
from daemon.doorbells.table import bars, render
from daemon.text import share, span


def test_the_table_has_every_kind_with_its_figures() -> None:
    text = render(report_of(measurement(), below=""))
    rows = [
        r"PIO, by value +600 ns +1\.20 us +1,800 +0\.60 % +3\.10 us +6\.20 us",
        r"hypercall +400 ns +800 ns +1,200 +0\.40 % +2\.90 us +5\.80 us",
        r"exit to userspace +2\.00 us +4\.00 us +6,000 +2\.00 % +- +-",
    ]
    assert all(re.search(f"^{row}$", text, re.MULTILINE) for row in rows)


@pytest.mark.parametrize("width", [50, 64, 79, 80, 100, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    report = report_of(measurement(guest_loop=8_000_000, no_hypercall="this KVM cannot"), below="KVM")
    assert max(map(len, render(report, width).splitlines())) <= width


def test_a_narrow_terminal_still_has_the_medians() -> None:
    text = render(report_of(measurement(), below=""), 50)
    assert "P99" not in text
    assert re.search(r"^PIO, by value +600 ns +0\.60 % +3\.10 us$", text, re.MULTILINE)


def test_the_question_of_2009_is_answered() -> None:
    """ "At 10K hypercalls/sec, a 0.4us difference will buy us 0.4%"."""
    text = " ".join(render(report_of(measurement({**MEDIANS, "pio": (2_400, 9_300)}), below="")).split())
    assert "At 10,000 rings a second the hypercall," in text
    assert "beside PIO, by value it saves 400 ns, 0.40 % of a CPU" in text


def test_a_hypercall_that_costs_more_is_said_to() -> None:
    text = " ".join(render(report_of(measurement({**MEDIANS, "hypercall": (2_400, 9_900)}), below="")).split())
    assert "beside PIO, by value it costs 200 ns more, 0.20 % of a CPU" in text


def test_meaningless_figures_are_called_so_before_they_are_shown_and_after() -> None:
    text = render(report_of(measurement(), below="QEMU's TCG"))
    assert text.index("THESE FIGURES MEAN NOTHING") < text.index("MEDIAN")
    assert "they mean nothing" in text[text.index("At 10,000 rings") :].replace("\n", " ")
    assert "\x1b" not in text


def test_figures_to_be_taken_with_care_are_called_so() -> None:
    text = render(report_of(measurement(spread=0.5), below=""))
    assert text.index("TAKE THESE FIGURES WITH CARE") < text.index("MEDIAN")
    assert "measure again" in text.replace("\n", " ")


def test_a_trusted_report_warns_of_nothing() -> None:
    text = render(report_of(measurement(), below=""))
    assert "THESE FIGURES" not in text
    assert "nothing." not in text


def test_only_a_terminal_that_wants_it_gets_escapes() -> None:
    report = report_of(measurement(spread=0.5), below="")
    assert "\x1b" not in render(report)
    assert "\x1b[1mTAKE" in render(report, bold=True)


def test_a_kind_that_does_not_work_is_named_with_its_reason() -> None:
    text = render(report_of(measurement(no_hypercall="this KVM cannot"), below=""))
    assert "hypercall does not work here: this KVM cannot." in text
    assert "At 10,000 rings" not in text


def test_one_reason_for_all_kinds_is_one_sentence() -> None:
    text = render(make_report("/dev/null"))
    assert "No doorbell works here: /dev/null is not a KVM device." in text
    assert "MEDIAN" not in text
    assert "#" not in text


def test_bars_are_in_proportion_and_aligned() -> None:
    one, two, zero = bars([("a", 1000.0), ("longer", 2000.0), ("none", 0.0)], 60)
    assert abs(two.count("#") - 2 * one.count("#")) <= 1
    assert zero.count("#") == 1
    assert {line.index("#") for line in (one, two, zero)} == {9}
    assert len(two) <= 60
    assert two.endswith(" 2.00 us")


def test_bars_of_nothing_but_zeroes_are_drawn_too() -> None:
    assert [line.count("#") for line in bars([("a", 0.0)], 40)] == [1]


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0 ns"),
        (0.4, "0.40 ns"),
        (85.23, "85.2 ns"),
        (99.97, "100 ns"),
        (999.4, "999 ns"),
        (999.6, "1.00 us"),
        (1240, "1.24 us"),
        (310_000, "310 us"),
        (4_500_000, "4.50 ms"),
        (1_200_000_000, "1.20 s"),
        (12_000_000_000, "12.0 s"),
    ],
)
def test_a_time_has_three_digits_and_its_unit(nanoseconds: float, text: str) -> None:
    assert span(nanoseconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.0, "0 %"), (0.004, "0.40 %"), (0.12, "12 %"), (-0.0005, "-0.05 %"), (0.099, "9.90 %")]
)
def test_a_share_is_in_percent_of_one_cpu(ratio: float, text: str) -> None:
    assert share(ratio) == text
