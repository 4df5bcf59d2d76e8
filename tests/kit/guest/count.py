"""How many real guests a test run booted, in one of its last lines: green tests that booted none would say so.

A guest counts when its console was read to say that userspace runs (``guest/boot/console.py``). What the processes of
pytest-xdist count is added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import pytest
from xdist.workermanage import WorkerController

from guest.boot.console import BOOTED

OUTPUT = "guests_booted"
_of_workers: Counter[str] = Counter()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker: tell the process that started it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[OUTPUT] = dict(BOOTED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController, error: object) -> None:
    _of_workers.update(getattr(node, "workeroutput", {}).get(OUTPUT, {}))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    yield
    counted = BOOTED + _of_workers
    kinds = ", ".join(f"{kind} {counted[kind]}" for kind in sorted(counted))
    terminalreporter.write_line(f"guests booted: {counted.total()}{f' ({kinds})' if kinds else ''}")
