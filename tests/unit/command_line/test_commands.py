"""The command line: exit statuses, help, and the commands that need no running daemon. By the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import structlog
from kit.project import ROOT

from daemon.checks.preflight import PACKAGES, foreign_packages
from daemon.cli import _parser, main
from daemon.running.app import App
from virtio.devices import REGISTRY
from virtio.errors import HostError

DISK = '[devices.disk]\ntype = "blk"\nbackend = "null"\nsize = "1M"\nsocket = "disk.sock"\n'


def hyperbell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon.cli", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hyperbell.toml"
    path.write_text(DISK)
    return path


def test_a_correct_configuration_is_0_and_says_what_it_has(file: Path) -> None:
    result = hyperbell("check", file)
    assert (result.returncode, result.stdout) == (0, f"{file}: correct. Devices: disk (blk)\n")


def test_a_wrong_configuration_is_78_and_every_mistake_is_on_stderr(file: Path) -> None:
    file.write_text(DISK + "queue_size = 3\nbogus = 1\n")
    result = hyperbell("check", file)
    assert (result.returncode, result.stdout) == (78, "")
    assert f"{file}:6: [devices.disk] queue_size: must be a power of two" in result.stderr
    assert f"{file}:7: [devices.disk] bogus: unknown key" in result.stderr
    assert result.stderr.endswith("hyperbell: 2 mistakes in the configuration\n")


@pytest.mark.parametrize("command", ["serve", "check", "qemu-args", "show"])
def test_every_command_that_reads_a_wrong_configuration_is_78(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "missing.toml")]) == 78
    assert "cannot be read: No such file or directory" in capsys.readouterr().err


def test_wrong_usage_is_2_and_shows_the_usage() -> None:
    result = hyperbell("bogus")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: hyperbell")


@pytest.mark.parametrize(
    "arguments",
    [[], ["check"], ["serve", "a", "b"], ["--log-level", "loud", "schema"], ["schema", "--log-format", "x"], ["show"]],
)
def test_missing_and_wrong_arguments_are_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: hyperbell")


def test_what_cannot_be_done_is_1_with_the_reason(file: Path) -> None:
    result = hyperbell("show", file)
    assert (result.returncode, result.stdout) == (1, "")
    assert "has no control socket; add to [daemon]: control = " in result.stderr


def test_version_is_that_of_the_distribution() -> None:
    result = hyperbell("--version")
    assert (result.returncode, result.stdout) == (0, f"hyperbell {metadata.version('hyperbell')}\n")


def help_text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_device_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    before, _, after = help_text(capsys).partition(", and any written in Python)")
    assert after
    assert before.rpartition("(")[2].split(", ") == sorted(REGISTRY)


def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    for word in ("serve", "check", "qemu-args", "schema", "show", "Exit status", "hyperbell serve disk.toml"):
        assert word in text


@pytest.mark.parametrize(
    ("command", "word"),
    [("serve", "SIGHUP"), ("check", "FILE.d/*.toml"), ("qemu-args", "virsh edit"), ("show", "control =")],
)
def test_every_command_has_its_own_help(capsys: pytest.CaptureFixture[str], command: str, word: str) -> None:
    text = help_text(capsys, command)
    assert f"usage: hyperbell {command}" in text
    assert "--log-level" in text
    assert word in text


def test_the_schema_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "hyperbell configuration"


def test_log_options_may_stand_before_and_after_the_command_and_the_later_one_wins() -> None:
    parser = _parser()
    options = ["--log-level", "debug", "--log-format", "json"]
    for arguments in (
        [*options, "serve", "x"],
        ["serve", "x", *options],
        ["--log-level", "error", "serve", "x", *options],
    ):
        parsed = parser.parse_args(arguments)
        assert (parsed.log_level, parsed.log_format) == ("debug", "json")
    parsed = parser.parse_args(["serve", "x"])
    assert (parsed.log_level, parsed.log_format) == (None, None)


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed_pipe:
        result = subprocess.run(
            [sys.executable, "-m", "daemon", "schema"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=closed_pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert "Traceback" not in result.stderr
    assert result.returncode == 1


def test_check_notes_what_this_host_lacks_without_failing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hyperbell.toml"
    file.write_text(
        '[daemon]\ncontrol = "none/ctl.sock"\n[workers.w]\ncpus = [9999]\n'
        '[devices.disk]\ntype = "blk"\npath = "no.img"\nsocket = "none/disk.sock"\n'
        'socket_group = "no-such-group"\nworker = "w"\n'
    )
    assert main(["check", str(file)]) == 0
    text = capsys.readouterr().err
    notes = [line.removeprefix("note: ") for line in text.splitlines() if line.startswith("note: ")]
    assert [note.split(": ")[1] for note in notes] == [
        "[workers.w] cpus",
        "[devices.disk] socket",
        "[devices.disk] socket_group",
        "[devices.disk] path",
    ]
    assert "truncate -s" in text


def test_check_notes_that_inband_notifications_are_not_for_qemu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hyperbell.toml"
    file.write_text(f'[devices.e]\ntype = "rng"\nsocket = "{tmp_path}/e.sock"\ninband_notifications = true\n')
    assert main(["check", str(file)]) == 0
    assert "note: " in (text := capsys.readouterr().err)
    assert "[devices.e] inband_notifications: QEMU accepts this and does not know its messages" in text


def test_the_packages_here_are_ours_alone() -> None:
    owners = metadata.packages_distributions()
    assert {package: set(owners[package]) for package in PACKAGES} == {package: {"hyperbell"} for package in PACKAGES}
    assert foreign_packages() == {}


def test_a_foreign_package_of_our_names_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"daemon": ["hyperbell", "python-daemon-runner"]})
    assert foreign_packages() == {"daemon": ["python-daemon-runner"]}


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (ValueError("unforeseen"), "stopped by a mistake in hyperbell"),
        (ExceptionGroup("", [ExceptionGroup("", [HostError("one")]), HostError("two")]), "cannot serve"),
    ],
)
def test_a_daemon_that_fails_says_why_in_its_log_and_is_1(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    event: str,
) -> None:
    async def fail(app: App) -> None:
        raise error

    monkeypatch.setattr(App, "run", fail)
    try:
        assert main(["serve", str(file), "--log-format", "json"]) == 1
    finally:
        structlog.reset_defaults()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    failures = [line for line in lines if line["level"] == "error"]
    assert {line["event"] for line in failures} == {event}
    if event == "cannot serve":
        assert [line["reason"] for line in failures] == ["one", "two"]
    if isinstance(error, ValueError):
        assert failures[0]["exception"].count("ValueError: unforeseen") == 1
    assert (lines[-1]["event"], lines[-1]["status"]) == ("stopped", 1)
