"""Fixtures of the unit tests."""

import signal
from collections.abc import Iterator

import pytest
from kit.ring.device import rings

__all__ = ["rings"]


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """``hyperbell serve`` leaves the signals ignored, for its process ends; here it is the tests' process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
