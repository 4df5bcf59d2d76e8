"""Fixtures of the tests that run guests in guests.

H is an emulated machine with SVM (``guest/nested/host.py``), in which Debian's kernel is a real KVM host; G1 is a guest
of H, G2 one of G1. One H serves all tests of a session, so a test leaves nothing behind: what it starts it starts in a
block.

When a test fails, look at the consoles: the error names the file, and the session ends with the folder that holds all
of them (HYPERBELL_NESTED_LOGS=FOLDER chooses it): H.log is H's own, line1.log G1's, line2.log that of a G2 in it,
qemu.log what H's QEMU said. What QEMU says in H or G1 is at the end of its guest's console; logs of the daemon are
/run/NAME.log in the level that runs it (``await job.log()``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from nested.laboratory import Laboratory

from guest.nested.level import Level


@pytest.fixture(scope="session")
def laboratory(request: pytest.FixtureRequest) -> Iterator[Laboratory]:
    """H. On a machine that cannot have it these tests fail, saying what is missing."""
    made = Laboratory()
    with made.for_session(request.session):
        yield made


@pytest.fixture
async def host(laboratory: Laboratory) -> AsyncIterator[Level]:
    """H, up, for this test."""
    async with laboratory.host() as level:
        yield level
