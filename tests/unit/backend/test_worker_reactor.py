"""Which reactor a worker has is known, and why: in the log, in ``hyperbell show`` and in the metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from structlog.testing import capture_logs

from config.schema import WorkerConfig
from daemon.commands.show_table import render
from daemon.running.assembly import start_workers
from daemon.running.control import respond
from daemon.state import DaemonState

WITHOUT_IO_URING = """
import ctypes, json, struct, sys
import trio
from structlog.testing import capture_logs
from config.schema import WorkerConfig
from daemon.running.assembly import start_workers

# seccomp: io_uring_setup (425) answers EPERM, as containers have it
program = struct.pack("<HBBIHBBIHBBIHBBI", 0x20, 0, 0, 0, 0x15, 0, 1, 425, 6, 0, 0, 0x00050001, 6, 0, 0, 0x7FFF0000)
text = ctypes.create_string_buffer(program, len(program))
filter = struct.pack("<H6xQ", 4, ctypes.addressof(text))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()

async def main():
    with capture_logs() as logs:
        async with start_workers({"w": WorkerConfig()}, {"w"}) as workers:
            json.dump([logs, workers["w"].stats().reactor, workers["w"].stats().reason], sys.stdout)

trio.run(main)
"""


def test_where_io_uring_is_forbidden_the_worker_runs_with_epoll_and_a_warning_says_why() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:])}
    command = [sys.executable, "-c", WITHOUT_IO_URING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    logs, reactor, reason = json.loads(done.stdout)
    assert (reactor, reason) == ("epoll", "no io_uring: Operation not permitted")
    (entry,) = [entry for entry in logs if entry["event"].startswith("worker runs")]
    assert (entry["log_level"], entry["worker"], entry["reason"]) == ("warning", "w", reason)


@pytest.mark.parametrize("reactor", ["epoll", "auto"])
async def test_a_worker_says_its_reactor_when_it_starts_and_is_shown_with_it(reactor: Any) -> None:
    with capture_logs() as logs:
        async with start_workers({"w": WorkerConfig(reactor=reactor)}, {"w"}) as workers:
            stats = workers["w"].stats()
    assert stats.reason == ("configured" if reactor == "epoll" else "available")
    assert {"event": "worker runs", "reactor": stats.reactor}.items() <= logs[0].items()
    answer = respond(b'{"command": "stats"}', DaemonState((), (stats,)))
    assert f"w       {stats.reactor}" in render(json.loads(json.dumps(answer, default=str)))
