"""Where device classes come from: our own registry, other distributions' entry points, and single files.

``type = "blk"`` is ours; ``type = "leds"`` may be an entry point of the group ``hyperbell.devices``;
``type = "./leds.py:Leds"`` is the class ``Leds`` of that file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

from daemon.devices.class_checks import fault_of
from virtio.device import Device
from virtio.devices import REGISTRY

ENTRY_POINTS: Final = "hyperbell.devices"


_in_use: set[str] = set()
"""Modules of files from which a class was given out; they are not run again."""


class DeviceClassError(Exception):
    """A device class that cannot be had; the text names the place and what is wrong there."""


class DeviceClasses(Mapping[str, type[Device]]):
    """Every device class that has a name of its own. A name of ours is never somebody else's.

    Looking one up raises ``DeviceClassError`` when what is behind an entry point does not work.
    """

    def __init__(self) -> None:
        points = metadata.entry_points(group=ENTRY_POINTS)
        self._points: dict[str, metadata.EntryPoint] = {p.name: p for p in points if p.name not in REGISTRY}

    def __getitem__(self, name: str) -> type[Device]:
        if name in REGISTRY:
            return REGISTRY[name]
        point = self._points[name]
        try:
            found = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() in somebody's module is no end of ours
            raise DeviceClassError(f"the entry point {point.value} cannot be loaded: {_where(error)}") from error
        return _checked(found, f"the entry point {point.value}")

    def __iter__(self) -> Iterator[str]:
        yield from REGISTRY
        yield from self._points

    def __len__(self) -> int:
        return len(REGISTRY) + len(self._points)


def device_class(type_name: str) -> type[Device]:
    """The class that a checked configuration's ``type`` names."""
    file, class_name = split_type(type_name)
    return class_from_file(file, class_name) if file is not None else DeviceClasses()[type_name]


def split_type(type_name: str) -> tuple[Path | None, str]:
    """``("./leds.py", "Leds")`` of ``./leds.py:Leds``; no path for a name."""
    file, colon, class_name = type_name.rpartition(":")
    return (Path(file), class_name) if colon and file.endswith(".py") else (None, type_name)


@cache
def class_from_file(file: Path, class_name: str) -> type[Device]:
    """The device class ``class_name`` of the Python file at the absolute path ``file``, which is run once.

    Raises ``DeviceClassError``.
    """
    name = f"hyperbell_device_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    module = sys.modules.get(name)
    if module is None:
        _check_writers(file)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None, "the file's name ends in .py"
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickles look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException as error:  # sys.exit() in somebody's file is no end of ours
            sys.modules.pop(name, None)
            if isinstance(error, KeyboardInterrupt):
                raise
            if isinstance(error, FileNotFoundError) and error.filename == str(file):
                raise DeviceClassError(f"{file} does not exist") from error
            raise DeviceClassError(f"{file} cannot be run: {_where(error, file)}") from error
    try:
        if not hasattr(module, class_name):
            raise DeviceClassError(f"{file} has no class {class_name}")
        found = _checked(getattr(module, class_name), f"{class_name} in {file}")
    except DeviceClassError:
        if name not in _in_use:
            del sys.modules[name]  # the file may be mended: it is run again at the next attempt
        raise
    _in_use.add(name)
    return found


def _check_writers(file: Path) -> None:
    """Run as root, code is only taken from where no other user may put it; compiled code lies in the folder too."""
    if os.geteuid() != 0:
        return
    for path in (file, file.parent):
        try:
            mode = path.stat().st_mode
        except OSError:
            return  # said when the file is read
        if mode & stat.S_IWOTH:
            raise DeviceClassError(
                f"{file} is not run as root, for every user may write to {path}: chmod o-w {path}, or run the daemon "
                "as a user of its own"
            )


def _checked(found: object, what: str) -> type[Device]:
    """``found`` if it is a device class with all that one must have."""
    if not isinstance(found, type) or not issubclass(found, Device):
        raise DeviceClassError(f"{what} is not a class derived from virtio.Device")
    fault = fault_of(found)
    if fault is not None:
        raise DeviceClassError(f"{what} {fault}")
    return found


def _where(error: BaseException, file: Path | None = None) -> str:
    """``error`` in one line, with the last line of ``file`` that it came by."""
    if isinstance(error, SyntaxError):
        place = f"line {error.lineno}: {error.msg}"
        return place if error.filename in (None, str(file)) else f"{error.filename} {place}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is not None and frame.filename == str(file)]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"line {lines[-1]}: {text}" if lines else text
