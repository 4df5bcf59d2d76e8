"""What the guest's module decides, without a guest: its own sources on a kernel that the test makes up.

``guest_module/own_kernel.h`` is that kernel, ``world.h`` its devices and hypervisor, ``rules.c`` has the scenarios:
refusals, delays, a resume under another key. Ringing itself needs KVM beneath a guest: that is ``tests/nested``.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "guest_module"
MODULE = HERE.parents[2] / "guest" / "linux"
SCENARIOS = re.findall(r"^SCENARIO\((\w+)\)$", (HERE / "rules.c").read_text(), re.MULTILINE)
FLAGS = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=all", "-Wno-unused-parameter"]


# The oldest and the newest kernel that guest/linux/compat.h makes one of.
KERNELS = {"6.1": "KERNEL_VERSION(6,1,0)", "7.3": "KERNEL_VERSION(7,3,0)"}


@pytest.fixture(scope="module", params=KERNELS)
def rules(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program. Whatever header of a kernel the module's sources want, they get ``own_kernel.h``."""
    version = f"-DLINUX_VERSION_CODE={KERNELS[request.param]}"
    build = tmp_path_factory.mktemp("rules")
    wanted = {name for source in MODULE.glob("*.[ch]") for name in re.findall(r"#include <(.+)>", source.read_text())}
    for name in wanted:
        header = build / "include" / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text('#include "own_kernel.h"\n')
    (build / "include" / "scenarios.h").write_text("".join(f'{{ "{name}", {name} }},\n' for name in SCENARIOS))
    folders = [f"-I{folder}" for folder in (build / "include", HERE, MODULE)]
    made = subprocess.run(
        ["gcc", *FLAGS, version, *folders, HERE / "rules.c", "-o", build / "rules"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return build / "rules"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_module_decides_as_the_doorbells_rules_say(rules: Path, scenario: str) -> None:
    options = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    ran = subprocess.run([rules, scenario], env=os.environ | options, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
