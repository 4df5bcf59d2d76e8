"""Our network device with a driver of somebody else's: DPDK's, as the benchmark runs it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from tests.bench.matrix import OURS
from tests.bench.packets import BURST, BURSTS, DPDK, PacketResult, PacketSample, PacketServer, check_packet_bars

SAMPLE = PacketSample(packets_per_second=500_000, cpu_s_per_million=2.0, sleeps_per_second=0, disturbed=0)
RESULT = PacketResult(SAMPLE, idle_seconds=5, idle_cpu_seconds=0)


@pytest.mark.skipif(shutil.which("dpdk-testpmd") is None, reason="no dpdk-testpmd: apt-get install dpdk-dev")
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


def test_half_of_the_rate_and_no_cpu_when_idle_pass() -> None:
    twice = replace(RESULT, run=replace(SAMPLE, packets_per_second=1_000_000), idle_cpu_seconds=5)
    assert [bar.passed for bar in check_packet_bars({OURS: RESULT, DPDK: twice})] == [True, True]


def test_less_than_half_of_the_rate_and_an_idle_device_that_uses_cpu_fail() -> None:
    ours = replace(RESULT, run=replace(SAMPLE, packets_per_second=499_000), idle_cpu_seconds=0.1)
    theirs = replace(RESULT, run=replace(SAMPLE, packets_per_second=1_000_000))
    assert [bar.passed for bar in check_packet_bars({OURS: ours, DPDK: theirs})] == [False, False]
