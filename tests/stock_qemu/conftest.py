"""The library under test, and what it is tested on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kit.kvm.process import KvmProcess, Listener
from stock_qemu.guests import KEY, Start

from transports.stock_qemu.library import VARIABLE_KEY, VARIABLE_NAME, VARIABLE_SOCKET


@pytest.fixture(scope="session")
def kvm() -> None:
    """A KVM that makes virtual machines, of whatever kind."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm here that this user may open: nothing to make a virtual machine with")


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory, kvm: None) -> Path:
    """KVM_HYPERV_EVENTFD for a KVM that lacks it: see fake_hyperv.c."""
    path = tmp_path_factory.mktemp("preload") / "fake_hyperv.so"
    source = Path(__file__).with_name("fake_hyperv.c")
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-shared", "-fPIC"]
    made = subprocess.run(["gcc", *flags, source, "-o", path], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hypercall.sock"


@pytest.fixture
def listener(path: Path) -> Iterator[Listener]:
    with Listener(path) as listener:
        yield listener


@pytest.fixture
def start(path: Path, fake: Path) -> Iterator[Start]:
    """Start a program with the library on a KVM that can; ended with the test."""
    with ExitStack() as stack:

        def run(*arguments: str, key: str | None = f"{KEY:06x}", capable: bool = True, **variables: str) -> KvmProcess:
            given = {VARIABLE_SOCKET: str(path), VARIABLE_NAME: "web1", **variables}
            if key is not None:
                given[VARIABLE_KEY] = key
            return stack.enter_context(KvmProcess(given, fake if capable else None, arguments))

        yield run
