"""The arithmetic of 2009."""

from __future__ import annotations

import pytest

from daemon.doorbells.worth import RingRates, apportion, worth

COSTS = {"mmio": 900e-9, "mmio-match": 1300e-9, "pio": 800e-9, "hypercall": 400e-9, "exit": 5e-6}


def test_ten_thousand_hypercalls_a_second_and_four_tenths_of_a_microsecond_are_four_tenths_of_a_percent() -> None:
    found = worth(RingRates({"pio": 0.0}, 10_000, "pio"), COSTS)
    assert found.saved == pytest.approx(0.004)
    assert found.possible == 0
    assert not found.plain_cheaper


def test_plain_rings_show_what_is_possible_and_each_kind_counts_by_its_own_cost() -> None:
    found = worth(RingRates({"mmio": 10_000, "pio": 20_000}, 0, "mmio"), COSTS)
    assert found.saved == 0
    assert found.possible == pytest.approx(10_000 * 500e-9 + 20_000 * 400e-9)


def test_both_at_once_are_told_apart() -> None:
    found = worth(RingRates({"mmio-match": 1_000}, 3_000, "mmio-match"), COSTS)
    assert found.saved == pytest.approx(3_000 * 900e-9)
    assert found.possible == pytest.approx(1_000 * 900e-9)


def test_a_device_at_rest_saves_nothing_and_could_not() -> None:
    found = worth(RingRates({"pio": 0.0}, 0, "pio"), COSTS)
    assert (found.saved, found.possible, found.plain_cheaper) == (0, 0, False)


def test_where_a_hypercall_is_slower_it_could_save_nothing_and_what_it_costs_is_said() -> None:
    found = worth(RingRates({"pio": 1_000}, 1_000, "pio"), COSTS | {"hypercall": 1000e-9})
    assert found.saved == pytest.approx(-1_000 * 200e-9)
    assert found.possible == 0
    assert found.plain_cheaper


def test_one_kind_that_is_cheaper_does_not_eat_up_what_another_could_save() -> None:
    found = worth(RingRates({"mmio": 1_000, "pio": 1_000}, 0, "mmio"), COSTS | {"hypercall": 850e-9})
    assert found.possible == pytest.approx(1_000 * 50e-9)
    assert found.plain_cheaper


def test_without_the_hypercalls_cost_nothing_is_claimed() -> None:
    costs = {kind: cost for kind, cost in COSTS.items() if kind != "hypercall"}
    assert worth(RingRates({"pio": 5.0}, 5.0, "pio"), costs).saved is None
    assert worth(RingRates({"pio": 5.0}, 5.0, "pio"), costs).possible is None
    assert worth(RingRates({"pio": 0.0}, 0.0, "pio"), costs).possible == 0
    assert not worth(RingRates({"pio": 5.0}, 5.0, "pio"), costs).plain_cheaper


def test_without_the_plain_cost_only_what_needs_it_is_unknown() -> None:
    costs = {kind: cost for kind, cost in COSTS.items() if kind != "mmio"}
    found = worth(RingRates({"mmio": 0.0, "pio": 1_000}, 1_000, "mmio"), costs)
    assert found.saved is None
    assert found.possible == pytest.approx(1_000 * 400e-9)
    assert worth(RingRates({"mmio": 1.0}, 0.0, "mmio"), costs).possible is None


def test_the_total_is_all_rings() -> None:
    assert RingRates({"mmio": 1.0, "pio": 2.0}, 3.0, "mmio").total == 6


@pytest.mark.parametrize(
    ("hypercalls", "kicks", "expected"),
    [
        (300, {"a": 100, "b": 300}, {"a": 75, "b": 225}),
        (0, {"a": 100}, {"a": 0}),
        (50, {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}),
        (1_000, {"a": 100, "b": 300}, {"a": 100, "b": 300}),
        (50, {}, {}),
    ],
)
def test_a_vms_hypercalls_are_apportioned_by_kicks_and_never_more_than_there_were(
    hypercalls: float, kicks: dict[str, float], expected: dict[str, float]
) -> None:
    assert apportion(hypercalls, kicks) == pytest.approx(expected)
