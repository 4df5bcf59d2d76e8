"""Rates over a window, and what metrics and tables make of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from kit.doorbell_reports import MEDIANS, measurement
from prometheus_client import CollectorRegistry, generate_latest
from structlog.testing import capture_logs

from daemon.cli import main
from daemon.commands.show_table import render
from daemon.doorbells.measure import make_report, report_of
from daemon.doorbells.policies import Policies
from daemon.doorbells.report import Report, save
from daemon.doorbells.worth import DeviceWorth
from daemon.metrics.page import StateCollector
from daemon.running.control import respond
from daemon.running.doorbell_meter import WINDOW_SECONDS, DoorbellMeter, open_meter
from daemon.state import ConnectionState, DaemonState, DeviceState
from transports.stock_qemu.state import BellState, VmState
from virtio.native.stats import BackendStats, QueueStats

CONNECTION = ConnectionState(True, 1, 0, 0, 9, 1, {}, 100.0)


def queue(number: int, *, kick: int = 0, pio: int = 0, hypercall: int = 0) -> QueueStats:
    rings = {"kick": kick, "pio": pio, "hypercall": hypercall}
    return QueueStats(number, rings, 0, 0, 0, 0, 0, 0.0, True, False, {})


def ours(name: str, *queues: QueueStats) -> DeviceState:
    return DeviceState(BackendStats(name, "blk", 0, queues), None, "kvm", None)


def stock(name: str, *queues: QueueStats) -> DeviceState:
    return DeviceState(BackendStats(name, "blk", 0, queues), CONNECTION, "vhost-user", Path("/run/x.sock"))


def vm(hypercalls: int, *bells: tuple[str, int, bool], name: str = "vm0", pid: int = 7) -> VmState:
    states = tuple(BellState(0xC00000 + n, device, n, registered, "") for device, n, registered in bells)
    return VmState(name, pid, 0.0, True, True, False, "", 1, hypercalls, states)


def report(**options: Any) -> Report:
    return report_of(measurement(**options), below="")


def observed(*states: DaemonState, seconds: float = 5.0, costs: Report | None = None) -> DaemonState:
    """The last of ``states``, with what a meter has to say that saw them ``seconds`` apart."""
    meter = DoorbellMeter(costs or report())
    for number, state in enumerate(states):
        meter.observe(seconds * number, state)
    return replace(states[-1], doorbells=meter.state())


def of(state: DaemonState, name: str) -> DeviceWorth:
    assert state.doorbells is not None
    (found,) = (device for device in state.doorbells.devices if device.device == name)
    return found


def test_rings_in_a_vm_of_ours_are_counted_by_kind() -> None:
    before = DaemonState((ours("disk", queue(0, kick=100, pio=10, hypercall=7)),), ())
    after = DaemonState((ours("disk", queue(0, kick=1_100, pio=510, hypercall=50_007)),), ())
    disk = of(observed(before, after), "disk")
    assert disk.rates.plain == {"mmio": 200, "pio": 100}
    assert disk.rates.hypercall == 10_000
    assert disk.worth.saved == pytest.approx(10_000 * 100e-9)
    assert disk.worth.possible == pytest.approx(200 * 100e-9 + 100 * 200e-9)


def test_several_queues_behind_one_address_ring_by_value_which_costs_more() -> None:
    before = DaemonState((ours("disk", queue(0), queue(1)),), ())
    after = DaemonState((ours("disk", queue(0, kick=500), queue(1, kick=500, hypercall=50_000)),), ())
    disk = of(observed(before, after), "disk")
    assert disk.rates.plain == {"mmio-match": 200, "pio": 0}
    assert disk.worth.saved == pytest.approx(10_000 * 600e-9)


def test_kicks_of_stock_qemu_without_a_port_are_by_mmio() -> None:
    disk = of(
        observed(DaemonState((stock("d", queue(0)),), ()), DaemonState((stock("d", queue(0, kick=500)),), ())), "d"
    )
    assert disk.rates.plain == {"mmio": 100}
    assert disk.rates.hypercall == 0
    assert disk.worth.possible == pytest.approx(100 * 100e-9)


def test_hypercalls_of_stock_qemu_are_kvms_own_count_among_the_kicks() -> None:
    bells = (("d", 0, True), ("n", 0, True), ("n", 1, False))
    before = DaemonState((stock("d", queue(0)), stock("n", queue(0), queue(1))), (), (vm(100, *bells),))
    devices = (stock("d", queue(0, kick=3_000)), stock("n", queue(0, kick=1_000), queue(1, kick=500)))
    found = observed(before, DaemonState(devices, (), (vm(2_100, *bells),)))
    assert of(found, "d").rates.hypercall == pytest.approx(300)
    assert of(found, "d").rates.plain == pytest.approx({"pio": 300})
    assert of(found, "n").rates.hypercall == pytest.approx(100)
    assert of(found, "n").rates.plain == pytest.approx({"pio": 200})
    assert of(found, "d").worth.saved == pytest.approx(300 * 200e-9)


def test_hypercalls_of_another_kind_are_nobodys() -> None:
    before = DaemonState((stock("d", queue(0)),), (), (vm(0, ("d", 0, True)),))
    after = DaemonState((stock("d", queue(0, kick=500)),), (), (vm(1_000_000, ("d", 0, True)),))
    disk = of(observed(before, after), "d")
    assert (disk.rates.hypercall, disk.rates.plain) == (100, {"pio": 0})


def test_a_vm_or_a_queue_that_was_not_there_before_has_no_rate_yet() -> None:
    before = DaemonState((stock("d", queue(0)),), ())
    after = DaemonState(
        (stock("d", queue(0, kick=500)), stock("new", queue(0, kick=900))), (), (vm(999, ("d", 0, True)),)
    )
    found = observed(before, after)
    assert of(found, "d").rates.hypercall == 0
    assert of(found, "new").rates.total == 0


def test_a_counter_that_began_anew_is_not_a_negative_rate() -> None:
    before = DaemonState((ours("d", queue(0, kick=900)),), (), (vm(900, ("d", 0, True)),))
    after = DaemonState((ours("d", queue(0, kick=100)),), (), (vm(0, ("d", 0, True)),))
    assert of(observed(before, after), "d").rates.total == 0


def test_before_the_first_window_there_are_costs_and_no_rates() -> None:
    state = observed(DaemonState((ours("d", queue(0, kick=5)),), ()))
    assert state.doorbells is not None
    assert state.doorbells.devices == ()
    assert state.doorbells.costs["kernel"]["hypercall"] == pytest.approx(400e-9)
    text = render(stats(state))
    assert "SAVES NOW" not in text
    assert "hypercall 400 ns" in text


async def test_the_counters_are_looked_at_once_a_window_and_not_more(autojump_clock: trio.testing.MockClock) -> None:
    looks: list[float] = []
    meter = DoorbellMeter(report())

    def snapshot() -> DaemonState:
        looks.append(trio.current_time())
        return DaemonState((ours("d", queue(0, kick=100 * len(looks))),), ())

    with trio.move_on_after(10 * WINDOW_SECONDS - 1):
        await meter.run(snapshot)
    assert len(looks) == 10
    (device,) = meter.state().devices
    assert device.rates.total == pytest.approx(100 / WINDOW_SECONDS)


# What is shown


def stats(state: DaemonState) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(json.dumps(respond(b'{"command": "stats"}', state, Policies({})), default=str))
    return answer


def ringing(costs: Report | None = None) -> DaemonState:
    before = DaemonState((ours("disk", queue(0)), ours("idle", queue(0))), ())
    after = DaemonState((ours("disk", queue(0, kick=5_000, hypercall=50_000)), ours("idle", queue(0))), ())
    return observed(before, after, costs=costs)


def page(state: DaemonState) -> str:
    registry = CollectorRegistry()
    registry.register(StateCollector(lambda: state))
    return generate_latest(registry).decode()


def test_metrics_have_costs_rates_and_shares() -> None:
    text = page(ringing())
    assert 'hyperbell_doorbell_cost_seconds{kind="hypercall",target="kernel"} 4e-07' in text
    assert 'hyperbell_doorbell_cost_seconds{kind="pio",target="thread"} 3.1e-06' in text
    assert "hyperbell_doorbell_costs_trustworthy 1.0" in text
    assert 'hyperbell_doorbell_rings_per_second{device="disk",kind="hypercall"} 10000.0' in text
    assert 'hyperbell_doorbell_cpu_share{device="disk",what="saved"} 0.001' in text
    (possible,) = re.findall(r'cpu_share\{device="disk",what="possible"\} (\S+)', text)
    assert float(possible) == pytest.approx(0.0001)
    assert 'hyperbell_doorbell_cpu_share{device="idle",what="possible"} 0.0' in text


def test_the_costs_of_no_doorbell_are_said_to_signal_no_eventfd() -> None:
    (words,) = re.findall("# HELP hyperbell_doorbell_cost_seconds (.*)", page(ringing()))
    assert "Kinds exit and cpuid, for comparison, signal no eventfd" in words


def test_metrics_say_when_costs_are_not_to_be_trusted() -> None:
    assert "hyperbell_doorbell_costs_trustworthy 0.0" in page(ringing(report(guest_loop=9_000_000)))


def test_a_share_that_is_not_known_is_not_exported() -> None:
    text = page(ringing(report(no_hypercall="this KVM cannot")))
    assert 'cpu_share{device="disk"' not in text
    assert 'cpu_share{device="idle",what="saved"} 0.0' in text


def test_without_costs_there_is_none_of_it() -> None:
    state = DaemonState((ours("disk", queue(0, kick=5)),), ())
    assert "doorbell_cost" not in page(state)
    assert "SAVES NOW" not in render(stats(state))


def lines(state: DaemonState) -> list[str]:
    return [" ".join(line.split()) for line in render(stats(state)).splitlines()]


def test_show_prints_rates_kinds_and_shares() -> None:
    text = lines(ringing())
    assert "DEVICE RINGS/S BY HYPERCALL PLAIN SAVES NOW COULD SAVE" in text
    assert "disk 11,000 10,000 1,000 by mmio 0.10 % 0.01 %" in text
    assert "idle 0 0 - 0 % 0 %" in text
    assert not any("?" in line for line in text)


def test_show_marks_figures_that_mean_nothing() -> None:
    text = lines(ringing(report(guest_loop=9_000_000)))
    assert "disk 11,000 10,000 1,000 by mmio 0.10 %? 0.01 %?" in text
    assert any(line.startswith("? the guest's instructions are emulated") for line in text)


def test_show_says_where_plain_is_cheaper() -> None:
    text = lines(ringing(report(medians={**MEDIANS, "hypercall": (2_100, 9_900)})))
    assert "disk 11,000 10,000 1,000 by mmio -0.20 % 0 %" in text
    assert "A plain doorbell is cheaper here than a hypercall for: disk, idle." in text


def test_show_says_what_is_unknown_without_a_hypercall() -> None:
    text = lines(ringing(report(no_hypercall="this KVM cannot")))
    assert "disk 11,000 10,000 1,000 by mmio unknown unknown" in text
    assert any("what it could save is unknown" in line for line in text)


# The file


def test_a_bad_file_is_one_warning_and_no_meter(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text("{}")
    with capture_logs() as logs:
        assert open_meter(path) is None
    (entry,) = logs
    assert entry["log_level"] == "warning"
    assert str(path) in entry["reason"]


def test_a_good_file_is_a_meter_and_none_is_none(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save(report(), path)
    with capture_logs() as logs:
        assert open_meter(path) is not None
        assert open_meter(None) is None
    assert not logs


@pytest.mark.parametrize("content", [None, "{}", "nothing"])
def test_check_notes_a_missing_or_bad_file_with_its_line(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    costs, file = tmp_path / "costs.json", tmp_path / "hyperbell.toml"
    if content == "nothing":
        save(make_report("/dev/null"), costs)
    elif content is not None:
        costs.write_text(content)
    file.write_text('[daemon]\ndoorbell_costs = "costs.json"\n[devices.r]\ntype = "rng"\nsocket = "r.sock"\n')
    assert main(["check", str(file)]) == 0
    (note,) = (line for line in capsys.readouterr().err.splitlines() if "doorbell_costs" in line)
    assert note.startswith(f"note: {file}:2: [daemon] doorbell_costs: {costs}")
    assert f"hyperbell doorbells --save {costs}" in note


def test_check_has_no_note_on_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(report(), tmp_path / "costs.json")
    file = tmp_path / "hyperbell.toml"
    file.write_text('[daemon]\ndoorbell_costs = "costs.json"\n[devices.r]\ntype = "rng"\nsocket = "r.sock"\n')
    assert main(["check", str(file)]) == 0
    assert "doorbell_costs" not in capsys.readouterr().err
