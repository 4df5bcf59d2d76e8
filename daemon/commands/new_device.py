"""``hyperbell new-device``: a device that works, its test, and the configuration that serves it, to begin from."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from daemon.commands.command import Command
from virtio.devices import REGISTRY
from virtio.errors import HostError

UNASSIGNED_ID: Final = 21
"""A number that virtio 1.3 (section 5) keeps for a type that it does not describe, so no driver takes the device.

QEMU 10.2 and later attach it; they abort over a number that they have no name for, such as 63."""

EPILOG: Final = """\
writes NAME.py, test_NAME.py and NAME.toml, and never over a file that is there

example:
  hyperbell new-device leds
  python -m pytest test_leds.py
  hyperbell check leds.toml
"""

_FILES: Final = {"device.py": "{}.py", "test_device.py": "test_{}.py", "device.toml": "{}.toml"}

MODULES_TAKEN: Final = frozenset({"pydantic", "pytest", "trio", "virtio"} | {"conftest", "pyproject"})
"""What the files import, whether or not it is installed here; and files that pytest and others look for."""

CLASSES_TAKEN: Final = frozenset(
    {"Chain", "ClassVar", "Device", "DeviceOptions", "Field", "Literal", "Queue", "TestDriver"}
)
"""What the files import by these names."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", type=_name, help="the device's name: a Python module's, such as leds")
    parser.add_argument(
        "--id",
        type=_virtio_id,
        default=UNASSIGNED_ID,
        help=f"its type's number, virtio 1.3 section 5 ({UNASSIGNED_ID})",
    )
    parser.add_argument("--folder", metavar="PATH", type=Path, default=Path(), help="where to (the current folder)")


def new_device(arguments: argparse.Namespace) -> int:
    """Write the files and say what to do with them. ``HostError`` if one is there already or cannot be written."""
    name: str = arguments.name
    folder: Path = arguments.folder
    values = {
        "name": name,
        "class_name": _class_name(name),
        "virtio_id": arguments.id,
        "python": sys.executable,
    }
    targets = {folder / form.format(name): template for template, form in _FILES.items()}
    for target in targets:
        if target.exists():
            raise HostError(f"{target} exists already; choose another name or folder")
    for target, template in targets.items():
        text = resources.files("daemon").joinpath("templates", f"{template}.template").read_text(encoding="utf-8")
        try:
            target.write_text(Template(text).substitute(values), encoding="utf-8")
        except OSError as error:
            raise HostError(f"{target}: {error.strerror}", errno=error.errno or 0) from error
    print(f"wrote {', '.join(map(str, targets))}")
    print(f"test it:  {sys.executable} -m pytest {folder / f'test_{name}.py'}")
    print(f"serve it: hyperbell serve {folder / f'{name}.toml'}")
    return 0


def _name(text: str) -> str:
    """``text`` if a module and its classes can be called by it, and nothing is called so that they would hide."""
    if re.fullmatch(r"[a-z][a-z0-9_]{0,30}", text) is None or keyword.iskeyword(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a Python module: small letters, digits and _")
    if text in REGISTRY or text in MODULES_TAKEN or _importable(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a name that exists already; choose another")
    for name in (_class_name(text), f"{_class_name(text)}Options"):
        if keyword.iskeyword(name) or hasattr(builtins, name) or name in CLASSES_TAKEN:
            raise argparse.ArgumentTypeError(f"{text!r} would have the class {name}, which exists already")
    return text


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _importable(name: str) -> bool:
    """Whether there is a module called so, which one in the current folder could hide."""
    if name in sys.stdlib_module_names:  # also those of other platforms
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # it is loaded, and does not say from where
        return True


def _virtio_id(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 65535")
    return int(text)


COMMAND: Final = Command("new-device", "write a device, its test and its file", new_device, add_options, EPILOG)
