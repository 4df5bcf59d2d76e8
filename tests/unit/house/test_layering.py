"""Who imports whom, as ARCHITECTURE.md has it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from kit.project import ROOT

SHARED_BY_TRANSPORTS: Final = ("transports", "transports.base", "transports.hypercall")
FILES_MAX: Final = 16
PACKAGES: Final = ("config", "daemon", "transports", "virtio")
MAY_IMPORT: Final[Mapping[str, frozenset[str]]] = {
    "config": frozenset({"config"}),
    "daemon": frozenset({"config", "daemon", "transports", "virtio"}),
    "transports": frozenset({"transports", "virtio"}),
    "virtio": frozenset({"virtio"}),
}
A_DEVICE_MAY_IMPORT: Final = frozenset(
    f"virtio.{name}"
    for name in (
        "device",
        "native.chain",
        "spec",
        "config_space",
        "errors",
        "fd",
        "native.disk",
        "native.nic",
        "native.stats",
        "claims",
        "remedies",
        "capabilities",
        "clients",
        "socket_file",
    )
)
MAY_USE_THE_MACHINE: Final = frozenset(
    f"transports.kvm.{name}"
    for name in ("host", "vm.vmm", "vm.entry", "vm.ending", "vm.doorbells", "cpu.host", "doorbell_cost.guest")
)


def module_files() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES: Final = module_files()


def is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_statements(node: ast.AST, *, types_too: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif types_too or not (isinstance(child, ast.stmt) and is_for_types_only(child)):
            yield from import_statements(child, types_too=types_too)


@cache
def imports_of(module: str, *, types_too: bool = True) -> frozenset[str]:
    """The modules of ours that ``module`` imports, wherever in it."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    names: set[str] = set()
    for statement in import_statements(tree, types_too=types_too):
        if isinstance(statement, ast.Import):
            names.update(alias.name for alias in statement.names)
            continue
        assert statement.level == 0, f"{module}: imports are absolute here"
        assert statement.module is not None
        for alias in statement.names:
            whole = f"{statement.module}.{alias.name}"
            names.add(whole if whole in FILES or whole == "virtio._dataplane" else statement.module)
    return frozenset(name for name in names if name.split(".")[0] in PACKAGES)


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 40
    assert "virtio.backend.backend" in imports_of("daemon.running.assembly")


@pytest.mark.parametrize("module", FILES)
def test_a_package_imports_only_what_lies_below_it(module: str) -> None:
    allowed = MAY_IMPORT[module.split(".")[0]]
    assert not {name for name in imports_of(module) if name.split(".")[0] not in allowed}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("virtio.devices.")])
def test_a_device_knows_the_device_interface_and_nothing_else(module: str) -> None:
    strangers = {
        name
        for name in imports_of(module)
        if name not in A_DEVICE_MAY_IMPORT and name != "virtio" and not name.startswith("virtio.devices.")
    }
    assert not strangers


@pytest.mark.parametrize("module", FILES)
def test_the_compiled_module_has_one_door_and_few_who_may_use_it(module: str) -> None:
    if module != "virtio.dataplane":
        assert "virtio._dataplane" not in imports_of(module)
    if not module.startswith(("virtio.native.", "virtio.dataplane")):
        assert not {name for name in imports_of(module) if name.startswith("virtio.dataplane")}


@pytest.mark.parametrize("module", FILES)
def test_libslirp_is_only_ever_loaded_into_a_process_of_its_own(module: str) -> None:
    if module != "virtio.usernet.__main__":
        assert not {name for name in imports_of(module) if name in ("virtio._usernet", "virtio.usernet.__main__")}


@pytest.mark.parametrize("module", FILES)
def test_the_compiled_machine_has_one_door_and_few_who_may_use_it(module: str) -> None:
    if module != "transports.kvm.native":
        assert "transports._vmm" not in imports_of(module)
    if module not in MAY_USE_THE_MACHINE:
        assert "transports.kvm.native" not in imports_of(module)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("transports.")])
def test_transports_do_not_import_each_other(module: str) -> None:
    own = ".".join(module.split(".")[:2])
    others = {name for name in imports_of(module) if name.startswith("transports")} - {"transports._vmm"}
    assert not {name for name in others if name not in SHARED_BY_TRANSPORTS and not name.startswith(own)}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("transports.")])
def test_a_transport_knows_the_waist_and_not_what_is_behind_it(module: str) -> None:
    behind = ("virtio.backend", "virtio.device", "virtio.native")
    imports = {name for name in imports_of(module) if name.startswith(behind)}
    assert not imports - {"virtio.native.interrupt"}


@dataclass(frozen=True)
class Room:
    """A row of ARCHITECTURE.md's table: its modules are those whose longest prefix it is."""

    name: str
    imports: frozenset[str]


def rooms() -> list[Room]:
    """In the order of the table: a room stands above all that it imports."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("<!-- rooms -->")[2].partition("<!-- /rooms -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if "`" in line]
    return [
        Room(row[0].strip("`"), frozenset(re.findall(r"`([\w.]+)`", row[2] if len(row) > 2 else ""))) for row in rows
    ]


ROOMS: Final = rooms()


def room_of(module: str) -> str:
    found = [room.name for room in ROOMS if module == room.name or module.startswith(f"{room.name}.")]
    assert found, f"{module} is in no room of ARCHITECTURE.md"
    return max(found, key=len)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_imports_what_the_table_says_and_all_of_that(room: Room) -> None:
    modules = [module for module in FILES if room_of(module) == room.name]
    assert modules, "there is no such room"
    imported = {name for module in modules for name in imports_of(module, types_too=False) if name in FILES}
    assert {room_of(name) for name in imported} - {room.name} == room.imports


def test_no_arrow_leads_up_the_house() -> None:
    below: set[str] = set()
    for room in ROOMS:
        assert room.imports <= below, f"{room.name} imports a room that is not below it"
        below.add(room.name)


@pytest.mark.parametrize("package", sorted({path.parent for path in FILES.values()}), ids=lambda path: path.name)
def test_a_room_says_what_belongs_there_and_can_be_taken_in(package: Path) -> None:
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert len([path for path in package.iterdir() if path.suffix in (".py", ".c", ".h")]) <= FILES_MAX


def test_no_modules_of_ours_import_each_other_in_a_circle() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        for name in sorted(imports_of(module, types_too=False)):
            if name in FILES and name != module:
                visit(name, (*path, module))
        finished.add(module)

    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_has_written_over_a_package_of_ours(package: str) -> None:
    """``daemon`` and ``config`` are names that others use, and pip lets them overwrite ours without a word."""
    owners = importlib.metadata.packages_distributions()[package]
    assert set(owners) == {"hyperbell"}


def test_only_the_given_folders_are_packages() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"guest"} == set(PACKAGES)
