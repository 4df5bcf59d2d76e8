"""How the tests are shared out when several processes run them, as ``make test`` has it (pytest-xdist), and what none
of them may do to its process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.guest.count import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown  # noqa: F401 (hooks)
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from virtio.native import pump

NESTED = "tests/nested/"


class Sharing(LoadFileScheduling):  # type: ignore[misc]  # xdist carries no types
    """A file's tests stay together, for they share what is costly to make; all nested ones share one emulated host."""

    def _split_scope(self, nodeid: str) -> str:
        return NESTED if nodeid.startswith(NESTED) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Sharing:
    return Sharing(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The nested tests come first: they take the longest, so the others fill what they leave."""
    items.sort(key=lambda item: not item.nodeid.startswith(NESTED))


def _rights() -> list[str]:
    """Of this process: its users, capabilities, NoNewPrivs and filters of system calls, and its descriptors' limits."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    rights = [line for line in lines if line.startswith(("Uid", "Gid", "Cap", "NoNewPrivs", "Seccomp"))]
    return [*rights, f"descriptors: {resource.getrlimit(resource.RLIMIT_NOFILE)}"]


@pytest.fixture(autouse=True)
def no_turn_ends_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Python device's queue; else what a test sees would depend on who else has the processor meanwhile."""
    monkeypatch.setattr(pump, "TURN_NS", 1 << 62)


@pytest.fixture(autouse=True)
def rights_are_kept() -> Iterator[None]:
    """A test that took some would have later ones fail, or skip as if the machine lacked something."""
    before = _rights()
    yield
    assert _rights() == before
