"""Fixtures of the integration tests."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from kit.front_end.scene import ProcessScene, Scene, ThreadScene


@pytest.fixture(scope="module", params=[ThreadScene, ProcessScene], ids=["thread", "process"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A daemon, and an honest guest that is busy from the first test of a file to the last."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # the busy guest shares our interpreter; it is not to hold each test up for 5 ms a wait
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as folder:
        place = request.param(Path(folder))
        try:
            place.neighbour.start()
            trio.run(place.aftermath)  # of nothing: what it holds now is what it is to hold after each test
            yield place
            place.neighbour.stop()
        finally:
            place.close()
            sys.setswitchinterval(interval)
