"""Our network device with a driver of somebody else's: DPDK's, as the benchmark runs it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.matrix import OURS
from tests.bench.packets import (
    BURST,
    BURSTS,
    DPDK,
    QUEUE_SIZE,
    Driver,
    PacketResult,
    PacketSample,
    PacketServer,
    check_packet_bars,
)
from tests.bench.servers import SOCKET_NAME, Server, serve_command

SAMPLE = PacketSample(packets_per_second=500_000, cpu_s_per_million=2.0, sleeps_per_second=0, disturbed=0)
RESULT = PacketResult(SAMPLE, idle_seconds=5, idle_cpu_seconds=0)


needs_testpmd = pytest.mark.skipif(
    shutil.which("dpdk-testpmd") is None, reason="no dpdk-testpmd: apt-get install dpdk-dev"
)


@needs_testpmd
def test_every_frame_that_a_dpdk_driver_sends_comes_back_once() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with PacketServer(OURS, cpus[0], cpus[-1]).drive() as (server, driver):
        driver.wait_for(100 * BURST * BURSTS)
        driver.stop()
        sent = driver.sent()
        driver.say("set fwd rxonly")
        driver.say("start")
        driver.wait_for(sent)
        assert (driver.received(), driver.sent()) == (sent, sent)
        server.check()


@needs_testpmd
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_a_dpdk_driver_that_listens_goes_on_with_a_daemon_that_was_killed_and_came_back(ring: str) -> None:
    """It then sends no SET_OWNER, opens with ENABLE and GET_VRING_BASE, and gives base 0 for rings that were used."""
    packed = ring == "packed"
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="hyperbell-bench-") as name:
        folder = Path(name)
        lines = ["[daemon]", 'metrics = "off"', "[devices.net]", 'type = "net"', 'backend = "null"']
        lines += ['frames = "reflect"', f'socket = "{folder / SOCKET_NAME}"', 'mode = "connect"']
        lines += [f"queue_size = {QUEUE_SIZE}", f"packed = {str(packed).lower()}"]
        command = serve_command(folder, lines)
        options = ",server=1,packed_vq=1" if packed else ",server=1"
        with Driver(folder / SOCKET_NAME, folder, cpus[-1], options=options) as driver:
            with Server(OURS, command, folder, cpus[0]) as server:
                driver.start()
                driver.wait_for(100 * BURST * BURSTS)
                server.send_signal(signal.SIGKILL)
            for times in (1, 2):
                with Server(OURS, command, folder, cpus[0]) as server:
                    driver.wait_for_reconnection(times)
                    if packed:
                        driver.go_round_again(100 * BURST * BURSTS)
                    else:
                        driver.wait_for(driver.received() + 100 * BURST * BURSTS)
                    server.check()
                    server.send_signal(signal.SIGKILL)


def test_half_of_the_rate_and_no_cpu_when_idle_pass() -> None:
    twice = replace(RESULT, run=replace(SAMPLE, packets_per_second=1_000_000), idle_cpu_seconds=5)
    assert [bar.passed for bar in check_packet_bars({OURS: RESULT, DPDK: twice})] == [True, True]


def test_less_than_half_of_the_rate_and_an_idle_device_that_uses_cpu_fail() -> None:
    ours = replace(RESULT, run=replace(SAMPLE, packets_per_second=499_000), idle_cpu_seconds=0.1)
    theirs = replace(RESULT, run=replace(SAMPLE, packets_per_second=1_000_000))
    assert [bar.passed for bar in check_packet_bars({OURS: ours, DPDK: theirs})] == [False, False]
