"""The pages say what is there: links lead somewhere, configurations load, names exist, nothing is left out."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from kit.metrics_page import PAGE, metrics_page
from kit.pages import PAGES, Block, anchors, blocks, links
from kit.project import ROOT

from daemon.cli import main
from daemon.commands.command import load_config
from daemon.commands.table import COMMANDS
from daemon.devices.catalogue import make_device
from virtio.backend.queue import BackendQueue
from virtio.devices import REGISTRY
from virtio.testing import attach

CONFIGURATIONS = [block for page in PAGES for block in blocks(page) if block.language == "toml"]
README_MAX = 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def is_ours(block: Block) -> bool:
    """Not a piece of a pyproject.toml."""
    return "project" not in tomllib.loads(block.text)


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=str)
def test_every_configuration_loads(block: Block, tmp_path: Path) -> None:
    text = block.text
    if not is_ours(block):
        return
    if "[devices." not in text:  # a table that is to be added to a file
        text += '\n[devices.some]\ntype = "rng"\nsocket = "some.sock"\n'
    for name in ("dice.py", "shout.py"):
        (tmp_path / name).write_text(class_of(name))
    shutil.copy(ROOT / "config" / "examples" / "keyboard.events", tmp_path)
    file = tmp_path / "page.toml"
    file.write_text(text)
    assert load_config(file).devices


def class_of(name: str) -> str:
    """The tutorial's device of that file."""
    wanted = f"class {name.removesuffix('.py').title()}(Device)"
    found = [b.text for page in PAGES for b in blocks(page) if b.language == "python" and wanted in b.text]
    return found[0] if found else ""


def test_the_readme_is_for_a_first_quarter_of_an_hour() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_MAX


async def test_the_device_of_the_readme_works_and_qemu_attaches_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shout.py").write_text(class_of("shout.py"))
    file = tmp_path / "shout.toml"
    file.write_text('[devices.shout]\ntype = "./shout.py:Shout"\nsocket = "shout.sock"\n')
    device = make_device("shout", load_config(file).devices["shout"])
    async with attach(device) as driver:
        assert await driver.request(0, b"hello", writable=8) == b"HELLO"
    assert main(["qemu-args", str(file), "--qemu", "11.1"]) == 0
    assert "vhost-user-test-device-pci" in capsys.readouterr().out


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_every_type_of_device_has_a_page_with_every_key_and_a_row_in_the_readme(kind: str) -> None:
    page = (ROOT / "docs" / "devices" / f"{kind}.md").read_text()
    missing = {key for key in REGISTRY[kind].Options.model_fields if f"`{key}" not in page and f"\n{key} =" not in page}
    assert not missing
    assert f"(docs/devices/{kind}.md)" in (ROOT / "README.md").read_text()


def test_every_page_is_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link]
    assert set(PAGES) <= reached


def test_the_page_of_metrics_is_what_make_pages_writes() -> None:
    assert PAGE.read_text() == metrics_page()


def test_the_page_of_doorbells_has_their_metrics() -> None:
    names = re.findall(r'"(hyperbell_doorbell_\w+)"', (ROOT / "daemon/metrics/doorbells.py").read_text())
    page = (ROOT / "docs" / "doorbells.md").read_text()
    assert names
    assert not [name for name in names if name not in page]


def test_no_page_names_a_metric_that_is_none() -> None:
    known = PAGE.read_text() + (ROOT / "daemon/metrics/doorbells.py").read_text()
    for page in PAGES:
        for name in re.findall(r"\bhyperbell_\w+\b", page.read_text()):
            assert name.removesuffix("_") in known, f"{page}: {name}"


def test_every_command_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [command.name for command in COMMANDS if f"hyperbell {command.name}" not in text]


def test_the_page_of_queue_states_has_every_flag() -> None:
    page = (ROOT / "docs" / "queue-states.md").read_text()
    source = (ROOT / "virtio/backend/queue.py").read_text()
    python = set(re.findall(r"self\.(\w+) = False\b(?!.*logged)", source.partition("# ---- starting")[0]))
    assert BackendQueue.__name__ in source
    assert python - {"moved_told"} <= set(re.findall(r"`(\w+)`", page))
    struct = (ROOT / "virtio/dataplane/ring/virtqueue.h").read_text()
    struct = struct[struct.index("struct virtqueue {") :]
    flags = re.findall(r"^\tbool ([\w, ]+);", struct[: struct.index("\n};")], re.MULTILINE)
    names = {name for line in flags for name in line.split(", ")} - {"event_idx", "indirect", "in_order"}
    assert len(names) > 4
    assert names <= set(re.findall(r"`(\w+)`", page))
