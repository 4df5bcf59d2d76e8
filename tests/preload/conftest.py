"""The library under test, and what it is tested on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


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
