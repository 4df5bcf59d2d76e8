"""Fixtures of the unit tests."""

import resource
import signal
from collections.abc import Iterator

import pytest
from kit.ring.device import rings

__all__ = ["rings"]


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``hyperbell serve`` ignores signals at its end, takes all descriptors that it may have, and gives up
    capabilities; its process ends with it. Here it is the tests' process. (test_hardening.py has one of its own.)"""
    for command in ("daemon.commands.serve", "daemon.microvm.run"):
        monkeypatch.setattr(f"{command}.harden", lambda: None)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
