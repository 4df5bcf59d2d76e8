"""``hyperbell new-device``: a device that works, its test, and the configuration that serves it, to begin from."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from virtio.devices import REGISTRY
from virtio.errors import HostError

UNASSIGNED_ID: Final = 63
"""No type of virtio 1.3 has this number (section 5)."""

EPILOG: Final = """\
writes NAME.py, test_NAME.py and NAME.toml, and never over a file that is there

example:
  hyperbell new-device leds
  python -m pytest test_leds.py
  hyperbell check leds.toml
"""

_FILES: Final = {"device.py": "{}.py", "test_device.py": "test_{}.py", "device.toml": "{}.toml"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        "class_name": "".join(part.capitalize() for part in name.split("_")),
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
    if re.fullmatch(r"[a-z][a-z0-9_]{0,30}", text) is None or keyword.iskeyword(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a Python module: small letters, digits and _")
    if text in REGISTRY or text in sys.stdlib_module_names:
        raise argparse.ArgumentTypeError(f"{text!r} is a name that exists already; choose another")
    return text


def _virtio_id(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 65535")
    return int(text)
