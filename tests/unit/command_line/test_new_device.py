"""hyperbell new-device: what it writes works and is tested as it stands, and nothing is written over."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import resources
from pathlib import Path
from string import Template

import pytest

from daemon.cli import main
from daemon.commands.command import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from daemon.commands.new_device import CLASSES_TAKEN, MODULES_TAKEN

FIELDS = ("name", "class_name", "virtio_id", "python")


def test_the_skeleton_passes_its_own_tests_and_can_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-device", "blinking_leds", "--folder", str(tmp_path), "--id", "77"]) == EXIT_OK
    said = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "blinking_leds.py",
        "test_blinking_leds.py",
        "blinking_leds.toml",
    }
    assert f"-m pytest {tmp_path}/test_blinking_leds.py" in said
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_blinking_leds.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 passed" in ran.stdout
    assert "virtio_id: ClassVar[int] = 77" in (tmp_path / "blinking_leds.py").read_text()
    assert main(["check", str(tmp_path / "blinking_leds.toml")]) == EXIT_OK
    assert "Devices: blinking_leds" in capsys.readouterr().out


def test_the_skeleton_has_nothing_that_a_linter_would_say(tmp_path: Path) -> None:
    assert main(["new-device", "leds", "--folder", str(tmp_path)]) == EXIT_OK
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,W,B", "--line-length", "120", "."]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_file_that_is_there_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_leds.py").write_text("precious")
    assert main(["new-device", "leds", "--folder", str(tmp_path)]) == EXIT_FAILURE
    assert "test_leds.py exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["test_leds.py"]
    assert (tmp_path / "test_leds.py").read_text() == "precious"


def refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["new-device", name, "--folder", str(folder)])
    assert ended.value.code == EXIT_USAGE
    assert list(folder.iterdir()) == []
    said = capsys.readouterr().err
    assert "argument NAME: " in said
    return said


@pytest.mark.parametrize("name", ["Leds", "3d", "a-b", "class", "blk", ""])
def test_a_name_that_cannot_be_a_new_module_is_wrong_usage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(name, tmp_path, capsys)


@pytest.mark.parametrize(
    "name", ["json", "virtio", "config", "daemon", "trio", "pytest", "pydantic", "structlog", "cffi", "conftest"]
)
def test_a_name_that_would_hide_a_module_is_wrong_usage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{name!r} is a name that exists already" in refused(name, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("none", "None"),
        ("true", "True"),
        ("exception", "Exception"),
        ("chain", "Chain"),
        ("device", "Device"),
        ("class_var", "ClassVar"),
        ("test_driver", "TestDriver"),
    ],
)
def test_a_name_whose_class_would_hide_another_is_wrong_usage(
    name: str, class_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{name!r} would have the class {class_name}, which exists already" in refused(name, tmp_path, capsys)


def test_whatever_the_skeleton_imports_is_taken() -> None:
    modules: set[str] = set()
    names: set[str] = set()
    for template in ("device.py", "test_device.py"):
        text = resources.files("daemon").joinpath("templates", f"{template}.template").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(Template(text).substitute(dict.fromkeys(FIELDS, "mine"), virtio_id=1))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module != "mine":
                modules.add(str(node.module).partition(".")[0])
                names |= {alias.name for alias in node.names}
    assert modules - sys.stdlib_module_names - {"__future__"} <= MODULES_TAKEN
    assert {name for name in names if name[0].isupper()} == CLASSES_TAKEN


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-device", "leds", "--folder", str(tmp_path / "none")]) == EXIT_FAILURE
    assert "No such file or directory" in capsys.readouterr().err
