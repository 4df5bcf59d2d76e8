"""Fixtures of the tests that boot a real Linux guest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests.testbed import Testbed

from guest.boot.uml import prepare_uml
from guest.debian.kernel import Kernel


@pytest.fixture(scope="session")
def testbed() -> Testbed:
    """Kernel, initramfs and QEMU. On a machine that cannot have them these tests fail, saying what is missing."""
    return Testbed()


@pytest.fixture(scope="module")
def module_folder() -> Iterator[Path]:
    """A folder with a name short enough for Unix sockets, kept for one module."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        yield Path(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def uml() -> Kernel:
    """Debian's User-mode Linux. On a machine that cannot have it these tests fail, saying what is missing."""
    return prepare_uml(print)
