"""How the tests are shared out when several processes run them, as ``make test`` has it (pytest-xdist)."""

from __future__ import annotations

import pytest
from kit.guest.count import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown  # noqa: F401 (hooks)
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

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
