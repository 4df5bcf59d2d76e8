"""What many rings come down to."""

from __future__ import annotations

import pytest

from transports.kvm.doorbell_cost.statistics import percentile, summarize


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5], 50, 5),
        ([5], 99, 5),
        ([1, 2], 50, 1),
        ([1, 2, 3], 50, 2),
        (list(range(1, 101)), 99, 99),
        (list(range(1, 101)), 100, 100),
        (list(range(1, 1001)), 99, 990),
        ([1, 2, 3], 0, 1),
    ],
)
def test_a_percentile_is_a_value_that_was_measured(values: list[int], percent: float, expected: int) -> None:
    assert percentile(values, percent) == expected


def test_nothing_has_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_measuring_itself_is_subtracted_and_never_more_than_there_is() -> None:
    summary = summarize([[100, 110, 120], [130, 140, 5000]], overhead=20)
    assert summary is not None
    assert (summary.median, summary.p99, summary.rings) == (100, 4980, 6)
    small = summarize([[5, 5, 5]], overhead=20)
    assert small is not None
    assert (small.median, small.p99) == (0, 0)


def test_rings_in_any_order_and_rounds_of_any_length_give_the_same() -> None:
    one = summarize([[3, 1, 2], [9]])
    assert one == summarize([[1, 2, 3], [], [9]])


def test_rounds_that_agree_have_no_spread_and_a_disturbed_machine_shows() -> None:
    quiet = summarize([[100, 100, 900]] * 10)
    assert quiet is not None
    assert quiet.spread == 0
    busy = summarize([[100] * 3] * 5 + [[180] * 3] * 5)
    assert busy is not None
    assert busy.spread == pytest.approx(0.8)


def test_no_rings_at_all_have_no_summary() -> None:
    assert summarize([]) is None
    assert summarize([[], []]) is None
