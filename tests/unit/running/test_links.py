"""A network interface's cable at run time, and what is shown of what moved and what was lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry, generate_latest

from daemon.cli import main
from daemon.commands.show_table import render
from daemon.metrics.page import StateCollector
from daemon.running.control import respond, serve_control
from daemon.running.links import Links
from daemon.state import ConnectionState, DaemonState, DeviceState
from virtio.device import DeviceOptions
from virtio.devices.net.device import Net, NetOptions
from virtio.devices.rng import Rng
from virtio.native.stats import HISTOGRAM_BUCKETS, BackendStats, Lost, OpStats, QueueStats


def op(requests: int, errors: int, size: int) -> OpStats:
    return OpStats(requests, errors, size, (0,) * HISTOGRAM_BUCKETS, 0.0)


def queue(number: int, **ops: OpStats) -> QueueStats:
    every = {name: op(0, 0, 0) for name in ("receive", "transmit", "control")} | ops
    return QueueStats(number, {"kick": 0, "pio": 0, "hypercall": 0}, 0, 0, 0, 0, 0, 0.0, True, False, every)


def state(*, hears_changes: bool = False) -> DaemonState:
    connection = ConnectionState(True, 1, 0, 0, 9, 1, {}, 100.0, hears_changes)
    queues = (
        queue(0, receive=op(5, 0, 3 << 20)),
        queue(1, transmit=op(9, 2, 2048)),
        queue(2, receive=op(1, 0, 1 << 20)),
        queue(3),
    )
    lost = (Lost("transmit", "malformed", 2), Lost("receive", "no_buffers", 7), Lost("receive", "too_large", 1))
    lan = BackendStats("lan", "net", 0, queues, lost=lost, link_up=True)
    return DaemonState((DeviceState(lan, connection, "vhost-user", Path("/run/lan.sock")),), ())


@pytest.fixture
def lan() -> Iterator[Net]:
    device = Net("lan", NetOptions(), 1, 256)
    yield device
    device.close()


def ask(request: dict[str, object], links: Links, **how: bool) -> dict[str, Any]:
    return respond(json.dumps(request).encode(), state(**how), None, links)


@pytest.mark.parametrize("hears_changes", [False, True])
def test_the_link_changes_and_it_is_said_whether_the_guest_hears_of_it(lan: Net, hears_changes: bool) -> None:
    links = Links({"lan": lan})
    for wanted, changed in (("down", True), ("down", False), ("up", True)):
        answer = ask({"command": "link", "device": "lan", "state": wanted}, links, hears_changes=hears_changes)
        assert answer == {
            "ok": True,
            "device": "lan",
            "state": wanted,
            "changed": changed,
            "guest_is_told": hears_changes,
        }
        assert lan.link_up == (wanted == "up")


def test_a_guest_of_our_own_machine_is_always_told(lan: Net) -> None:
    ours = replace(state().devices[0], connection=None, transport="kvm", socket=None)
    answer = respond(
        b'{"command": "link", "device": "lan", "state": "down"}', DaemonState((ours,), ()), None, Links({"lan": lan})
    )
    assert answer["guest_is_told"] is True


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"command": "link"}, "a link is up or down"),
        ({"command": "link", "device": "lan"}, "a link is up or down"),
        ({"command": "link", "device": "lan", "state": True}, "a link is up or down"),
        ({"command": "link", "device": ["lan"], "state": "up"}, "a link is up or down"),
        ({"command": "link", "device": "wan", "state": "up"}, "no device 'wan' is served; there are: lan, entropy"),
        ({"command": "link", "device": "entropy", "state": "up"}, "a rng device has no link"),
    ],
    ids=str,
)
def test_what_is_no_link_is_refused_with_the_reason(lan: Net, request_: dict[str, object], said: str) -> None:
    entropy = Rng("entropy", DeviceOptions(), 1, 64)
    answer = ask(request_, Links({"lan": lan, "entropy": entropy}))
    assert answer["ok"] is False
    assert said in answer["error"]
    assert lan.link_up


async def test_the_command_tells_the_daemon_and_what_came_of_it(
    lan: Net, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, control, state, None, Links({"lan": lan}))

        async def link(*arguments: str) -> int:
            return await trio.to_thread.run_sync(main, ["link", *arguments, "--control", str(control)])

        assert await link("lan", "down") == 0
        assert not lan.link_up
        told = capsys.readouterr()
        assert told.out.splitlines()[-1] == "lan: down"
        assert "no guest is told of it" in told.err
        assert await link("lan", "down") == 0
        assert capsys.readouterr().out.splitlines()[-1] == "lan: down (as before)"
        assert await link("wan", "down") == 1
        assert "no device 'wan' is served" in capsys.readouterr().err
        nursery.cancel_scope.cancel()


def test_each_direction_of_an_interface_is_shown_with_what_was_lost_and_why() -> None:
    stats = json.loads(json.dumps(respond(b'{"command": "stats"}', state()), default=str))
    *_, interfaces = render(stats, now=100.0).split("\n\n")
    assert [line.split() for line in interfaces.splitlines()[1:]] == [
        ["lan", "up", "transmit", "7", "2.0", "KiB", "2", "malformed", "2"],
        ["lan", "up", "receive", "6", "4.0", "MiB", "8", "no", "buffers", "7,", "too", "large", "1"],
    ]


def test_the_metrics_have_every_reason_and_the_link() -> None:
    registry = CollectorRegistry()
    registry.register(StateCollector(state))
    page = generate_latest(registry).decode()
    for line in (
        'hyperbell_frames_lost_total{device="lan",direction="transmit",reason="malformed"} 2.0',
        'hyperbell_frames_lost_total{device="lan",direction="receive",reason="no_buffers"} 7.0',
        'hyperbell_link_up{device="lan"} 1.0',
        'hyperbell_requests_total{device="lan",op="transmit",queue="1"} 9.0',
    ):
        assert line in page


def test_a_device_counts_its_losses_under_names_that_stay(lan: Net) -> None:
    assert {(loss.direction, loss.reason) for loss in lan.lost()} == {
        *(
            ("transmit", reason)
            for reason in ("malformed", "link_down", "disabled", "nobody_there", "another_ports_address")
        ),
        *(("receive", reason) for reason in ("no_buffers", "too_large", "link_down", "filtered", "malformed")),
    }
