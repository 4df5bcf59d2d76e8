"""Fixtures of the integration tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from scene import ProcessScene, Scene, ThreadScene


@pytest.fixture(scope="module", params=[ThreadScene, ProcessScene], ids=["thread", "process"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A daemon, and an honest guest that is busy from the first test of a file to the last."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as folder:
        place = request.param(Path(folder))
        try:
            place.neighbour.start()
            trio.run(place.aftermath)  # of nothing: what it holds now is what it is to hold after each test
            yield place
            place.neighbour.stop()
        finally:
            place.close()
