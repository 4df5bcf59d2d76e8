"""The unit and its companions, as systemd's own tools see them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from kit.project import ROOT

FOLDER = ROOT / "systemd"
UNIT = FOLDER / "hyperbell.service"


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"this machine has no {name} (Debian: systemd)")
    return path


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def settings() -> dict[str, list[str]]:
    """The unit's settings: every value of each name."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_systemd_analyze_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    command = settings()["ExecStart"][0].split()[0]
    copy = tmp_path / "hyperbell.service"
    copy.write_text(UNIT.read_text().replace(f"ExecStart={command}", "ExecStart=/bin/true"))
    result = run(analyze, "verify", "--man=no", str(copy))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_unit_leaves_the_daemon_little_to_do_harm_with() -> None:
    analyze = tool("systemd-analyze")
    result = run(analyze, "security", "--offline=yes", "--threshold=25", str(UNIT))  # 25: exposure of at most 2.5
    assert result.returncode == 0, result.stdout


def test_the_unit_waits_for_readiness_and_does_not_retry_a_wrong_configuration() -> None:
    unit = settings()
    assert unit["Type"] == ["notify"]
    assert unit["ExecStart"][0].split()[1] == "serve"
    assert "78" in unit["RestartPreventExitStatus"][0].split()
    assert unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_the_unit_cannot_restart_for_ever() -> None:
    unit = settings()
    (interval,), (burst,), (pause,) = unit["StartLimitIntervalSec"], unit["StartLimitBurst"], unit["RestartSec"]
    # The slowest ways to end: never ready, or a hang right after that; then systemd kills it.
    never_ready = int(unit["TimeoutStartSec"][0])
    hangs = int(unit["WatchdogSec"][0])
    longest = max(never_ready, hangs) + int(unit["TimeoutStopSec"][0]) + int(pause)
    assert int(burst) * longest < int(interval)


def test_the_unit_allows_io_uring_and_no_keys_or_changes_of_user() -> None:
    allowed, forbidden = settings()["SystemCallFilter"]
    assert {"io_uring_setup", "io_uring_enter", "io_uring_register"} <= set(allowed.split())
    assert forbidden == "~@keyring @setuid"


def test_every_restriction_of_the_unit_has_a_reason_above_it() -> None:
    explained = False
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            explained = True
        elif not line or line.startswith("# ---"):
            explained = False
        elif line.startswith("#"):
            explained = True
        else:
            assert explained, line


def test_the_units_user_and_groups_are_made_by_sysusers(tmp_path: Path) -> None:
    sysusers = tool("systemd-sysusers")
    (tmp_path / "etc").mkdir()
    result = run(sysusers, f"--root={tmp_path}", str(FOLDER / "sysusers.d" / "hyperbell.conf"))
    assert result.returncode == 0, result.stderr
    users = {line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    groups = {line.split(":")[0]: line.split(":")[3] for line in (tmp_path / "etc/group").read_text().splitlines()}
    unit = settings()
    assert set(unit["User"]) <= users
    assert set(unit["Group"]) | set(unit["SupplementaryGroups"]) <= groups.keys()
    assert groups["kvm"] == "hyperbell"


def test_tmpfiles_makes_the_folders_the_unit_uses(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give folders to another user, as systemd-tmpfiles does")
    tmpfiles, sysusers = tool("systemd-tmpfiles"), tool("systemd-sysusers")
    (tmp_path / "etc").mkdir()
    run(sysusers, f"--root={tmp_path}", str(FOLDER / "sysusers.d" / "hyperbell.conf"))
    result = run(tmpfiles, f"--root={tmp_path}", "--create", str(FOLDER / "tmpfiles.d" / "hyperbell.conf"))
    assert result.returncode == 0, result.stderr
    unit = settings()
    configuration = Path(unit["ExecStart"][0].split()[-1])
    folders = [
        f"run/{unit['RuntimeDirectory'][0]}",
        f"var/lib/{unit['StateDirectory'][0]}",
        str(configuration.parent.relative_to("/")),
        f"{configuration.relative_to('/')}.d",
    ]
    for folder in folders:
        assert (tmp_path / folder).is_dir(), folder
