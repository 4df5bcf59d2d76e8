"""The commands of the pages are run as they stand there, in the order of the page, in a folder of their own.

What the pages write under /run, /etc and /var lies in that folder.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from kit.front_end.scene import DaemonProcess, LogBook
from kit.pages import PAGES, Block, blocks
from kit.project import ROOT

from daemon.cli import _parser

RUN: Final = ("check", "qemu-args", "attach", "schema", "new-device", "show", "link", "reopen", "retry", "hypercall")
PARSED: Final = {
    "microvm": "tests/integration/test_microvm.py, tests/nested/test_microvm.py",
    "uml": "tests/guests/test_uml.py",
    "qemu": "tests/nested/test_stock_qemu.py",
    "doorbells": "tests/integration/test_doorbells_command.py",
}
"""Commands whose words are only parsed here, and where they are run."""

ELSEWHERE: Final = {
    "sudo": "changes this machine; the unit is checked in tests/unit/running/test_systemd_unit.py",
    "sudoedit": "an editor",
    "ip": "tests/integration/test_hosts_joined.py",
    "ovs-vsctl": "Open vSwitch is not installed for tests",
    "printf": "socat is a client of sockets that tests/devices drive by themselves",
    "python": "tests/guests/test_tutorial.py",
    "head": "runs in the guest: tests/guests/test_tutorial.py",
    "-m": "what qemu-args prints: tests/guests/test_tutorial.py",
}
"""First words of lines that are not run here, and why."""

WITH_COMMANDS: Final = [page for page in PAGES if any(block.language == "sh" for block in blocks(page))]


class Reader:
    """Somebody who follows a page, line by line, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[DaemonProcess] = []
        self.seen: list[str] = []
        for name in ("run", "etc", "lib"):
            (folder / name).mkdir()

    def here(self, text: str) -> str:
        for there, name in (("/run/hyperbell", "run"), ("/etc/hyperbell", "etc"), ("/var/lib/hyperbell", "lib")):
            text = text.replace(there, str(self.folder / name))
        return text

    def write(self, block: Block) -> None:
        text = re.sub(r'metrics = "127[^"]*"', 'metrics = "off"', self.here(block.text))
        if block.file.endswith(".toml") and "metrics" not in text:
            text = f'{text}\n[daemon]\nmetrics = "off"\n' if "[daemon]" not in text else text
        (self.folder / block.file).write_text(text)

    def follow(self, block: Block) -> None:
        for line in block.commands:
            words = shlex.split(self.here(line))
            where = f"{block}: {line}"
            if words[0] == "hyperbell":
                self.hyperbell([word for word in words[1:] if word != "&"], where, service="/etc/" in line)
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), where
            elif words[0] in ("truncate", "python3"):
                subprocess.run(words, cwd=self.folder, check=True)
            else:
                assert words[0] in ELSEWHERE, f"{where}: nothing runs this"
            self.seen.append(words[0])

    def hyperbell(self, words: list[str], where: str, *, service: bool) -> None:
        if words[0] in PARSED or service:
            _parser().parse_args(words)
            return
        if words[0] == "serve":
            log = LogBook()
            self.daemons.append(DaemonProcess(self.folder / words[1], log))
            log.wait_for(0, "serving")
            return
        assert words[0] in RUN, f"{where}: nothing runs this"
        done = subprocess.run(
            [sys.executable, "-m", "daemon.cli", *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{where}: {done.stderr}"
        assert done.stdout, f"{where}: it printed nothing"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    assert [daemon.stop() for daemon in reader.daemons] == [0] * len(reader.daemons)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_who_follows_a_page_gets_what_it_promises(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        if block.file:
            reader.write(block)
        elif block.language == "sh":
            reader.follow(block)
    assert reader.seen


def test_nothing_is_excused_that_no_page_has() -> None:
    commands = [line for page in PAGES for block in blocks(page) if block.language == "sh" for line in block.commands]
    first = {shlex.split(line)[0] for line in commands}
    assert set(ELSEWHERE) <= first
    for reason in ELSEWHERE.values():
        for path in re.findall(r"tests/[\w/]+\.py", reason):
            assert (ROOT / path).exists(), path
