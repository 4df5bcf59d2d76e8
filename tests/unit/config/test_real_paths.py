"""Real paths: links are followed, and a file system that hangs is not waited for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from config import real_paths
from config.real_paths import real_path


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert real_path(tmp_path / "link") == os.path.realpath(tmp_path / "file")
    assert real_path(tmp_path / "missing" / ".." / "file") == os.path.realpath(tmp_path / "file")


def test_a_file_system_that_hangs_is_asked_by_one_thread_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path] = []
    answers = threading.Event()

    def hang(path: Path) -> str:
        asked.append(path)
        answers.wait(30)
        return "answer"

    monkeypatch.setattr(real_paths, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(os.path, "realpath", hang)
    path = tmp_path / "a" / ".." / "file"
    assert [real_path(path) for _ in range(3)] == [str(tmp_path / "file")] * 3
    assert asked == [path]
    answers.set()
