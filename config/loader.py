"""From TOML files to one checked configuration, or to all the reasons why not."""

from __future__ import annotations

import errno
import json
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from config.checks import (
    DeviceDraft,
    Finding,
    check_characters,
    check_device,
    check_files,
    check_paths,
    check_sharers,
    check_sockets,
    check_unique,
    resolved_workers,
)
from config.origins import KeyPath, Origins
from config.problems import ConfigError, Problem, closest, explain, misspelt, toml_value
from config.schema import (
    DEFAULT_WORKER,
    NAME,
    NAME_RULE,
    DaemonConfig,
    DeviceConfig,
    DeviceType,
    DeviceTypes,
    WorkerConfig,
)

_TABLES: Final = ("daemon", "workers", "devices")
_COMMON_KEYS: Final = frozenset(DeviceConfig.model_fields)
_NESTING_MAX: Final = 64
"""Tables and arrays inside each other: far more than any key takes, far less than Python's stack."""
_TOO_DEEP: Final = f"has more than {_NESTING_MAX} arrays and tables inside each other"

Model = TypeVar("Model", bound=BaseModel)
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Device:
    """One ``[devices.NAME]`` table: the common keys, the options of its type, its number of queues, and the names
    of the workers that drive them (none for a device written in Python). All paths are absolute."""

    name: str
    common: DeviceConfig
    options: BaseModel
    queues: int
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration that passed every check. ``files``: the file and its drop-ins, in the order read.

    ``workers`` has every worker a device names, the implied one included. ``unavailable`` says of each device whose
    class cannot be had, and which is therefore not in ``devices``, why not; only ``load(..., lenient=True)`` has any.
    """

    path: Path
    files: tuple[Path, ...]
    daemon: DaemonConfig
    workers: Mapping[str, WorkerConfig]
    devices: Mapping[str, Device]
    origins: Origins
    unavailable: Mapping[str, Problem]

    def problem(self, path: KeyPath, message: str, hint: str = "") -> Problem:
        """A problem of the value at ``path`` that only showed up later, say on this host."""
        return _problem(self.origins, Finding(path, message, hint))


def load(path: Path, device_types: DeviceTypes, transports: Collection[str], *, lenient: bool = False) -> Config:
    """Read ``path`` and its drop-ins ``path.d/*.toml`` (sorted by name; the later file wins key by key).

    Relative paths in them are relative to the folder of ``path``, also those in drop-ins. ``lenient``: a device whose
    class cannot be had (its Python file is missing or fails) is left out and named in ``Config.unavailable``.
    Raises ``ConfigError`` with every problem that was found.
    """
    loader = _Loader(path, device_types, transports, lenient=lenient)
    config = loader.load()
    if config is None:
        raise ConfigError(loader.problems)
    return config


def drop_ins(path: Path) -> tuple[Path, ...]:
    """The drop-in files of the configuration file ``path``, in the order they are merged.

    ``OSError``: their folder cannot be looked into, so whether there are any is not known.
    """
    try:
        return tuple(sorted(file for file in _drop_in_folder(path).iterdir() if file.name.endswith(".toml")))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # there cannot be any
            return ()
        raise


def _drop_in_folder(path: Path) -> Path:
    return path.with_name(path.name + ".d")


class _Loader:
    """Collects problems while it turns the tables into models, one table after the other."""

    def __init__(
        self, path: Path, device_types: DeviceTypes, transports: Collection[str], *, lenient: bool = False
    ) -> None:
        self.path = path
        self.folder = path.absolute().parent
        self.device_types = device_types
        self.transports = transports
        self.origins = Origins(path)
        self.problems: list[Problem] = []
        self.lenient = lenient
        self.unavailable: dict[str, Problem] = {}
        self.whole = True  # every file could be read, so what is missing is really missing

    def load(self) -> Config | None:
        tree: Tree = {}
        self._read(self.path, tree)
        files = (self.path, *self._drop_ins())
        for file in files[1:]:
            self._read(file, tree)
        for name, value in tree.items():
            if name not in _TABLES:
                self._add(
                    (name,), "unknown table" if isinstance(value, dict) else "unknown key", closest(name, _TABLES)
                )
        daemon = self._model(DaemonConfig, ("daemon",), self._table(("daemon",), tree.get("daemon", {})) or {})
        workers = {
            name: self._model(WorkerConfig, ("workers", name), table)
            for name, table in self._named_tables(tree, "workers").items()
        }
        drafts = [self._device(name, table) for name, table in self._named_tables(tree, "devices").items()]
        if self.whole:
            self._check_together(daemon, workers, drafts)
        if self.problems:
            return None
        return self._config(files, daemon or DaemonConfig(), workers, drafts)

    def _config(
        self,
        files: tuple[Path, ...],
        daemon: DaemonConfig,
        workers: Mapping[str, WorkerConfig | None],
        drafts: Iterable[DeviceDraft],
    ) -> Config:
        """The configuration, once nothing is wrong with it."""
        devices = {
            draft.name: Device(
                draft.name,
                _with_absolute_paths(draft.common, self.folder),
                _with_absolute_paths(draft.options, self.folder),
                draft.common.queues or draft.type.queues_default,
                resolved_workers(draft.common, draft.type),
            )
            for draft in drafts
            if draft.options is not None and draft.type is not None
        }
        all_workers = {name: worker for name, worker in workers.items() if worker is not None}
        if any(DEFAULT_WORKER in device.workers for device in devices.values()):
            all_workers.setdefault(DEFAULT_WORKER, WorkerConfig())
        daemon = _with_absolute_paths(daemon, self.folder)
        return Config(self.path, files, daemon, all_workers, devices, self.origins, self.unavailable)

    # Files

    def _drop_ins(self) -> tuple[Path, ...]:
        try:
            return drop_ins(self.path)
        except OSError as error:
            if self.whole:  # else the file itself is as far away, which is said already
                self._file_problem(_drop_in_folder(self.path), 0, f"cannot be read: {error.strerror}", "")
            return ()

    def _read(self, file: Path, tree: Tree) -> None:
        """Merge one file into ``tree``; a file that cannot be read or parsed becomes a problem."""
        try:
            text = file.read_bytes().decode().replace("\r\n", "\n")
            parsed = tomllib.loads(text)
            if _is_deep(parsed):
                raise RecursionError
        except OSError as error:
            self._file_problem(file, 0, f"cannot be read: {error.strerror}", "")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            self._file_problem(file, line, "is not UTF-8 text", "save the file as UTF-8")
        except tomllib.TOMLDecodeError as error:
            self._syntax_problem(file, text, str(error))
        except RecursionError:
            self._file_problem(file, _deep_line(text), _TOO_DEEP, "")
        else:
            self.origins.add_file(file, text)
            _merge(tree, parsed)

    def _syntax_problem(self, file: Path, text: str, error: str) -> None:
        match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", error)
        what = error[: match.start()] if match else error
        lines = text.rstrip("\n").split("\n")
        line = min(int(match[1]), len(lines)) if match and match[1] else len(lines)
        hint = 'a line reads: key = value, and strings stand in quotes: size = "64M"'
        if "Cannot" in what:  # tomllib: "Cannot declare ... twice", "Cannot overwrite a value"
            hint = "this file has the same name before: rename or remove one of the two"
        self._file_problem(file, line, f"is not valid TOML: {what}: {lines[line - 1].strip()}", hint)

    def _file_problem(self, file: Path, line: int, message: str, hint: str) -> None:
        self.whole = False
        self.problems.append(Problem(file, line, "", "", message, hint))

    # Tables

    def _add(self, path: KeyPath, message: str, hint: str = "", other: KeyPath = ()) -> None:
        self.problems.append(_problem(self.origins, Finding(path, message, hint, other)))

    def _table(self, path: KeyPath, value: object) -> Tree | None:
        """``value`` if it is a table; anything else is a problem."""
        if isinstance(value, dict):
            return value
        self._add(path, f"must be a table, not {toml_value(value)}", f"write it as [{'.'.join(path)}]")
        return None

    def _named_tables(self, tree: Tree, kind: str) -> dict[str, Tree]:
        """The tables ``[kind.NAME]``; the names become labels, file names and ids in QEMU."""
        named = {}
        for name, value in (self._table((kind,), tree.get(kind, {})) or {}).items():
            if NAME.fullmatch(name) is None:
                self._add((kind, name), "this name cannot be used", NAME_RULE)
            table = self._table((kind, name), value)
            if table is not None:
                named[name] = table
        return named

    def _model(
        self,
        model: type[Model],
        path: KeyPath,
        table: Tree,
        known_keys: Collection[str] | None = None,
        unknown: Collection[str] = (),
    ) -> Model | None:
        """``table`` as ``model``, or ``None`` after recording each of its errors.

        A missing key that is only misspelt, among the ``unknown`` ones of its table too, is not said to be missing.
        """
        for key, value in table.items():
            if _holds_nul(value):
                self._add((*path, key), "holds a NUL character", "no name, path or address may have one")
                return None
        try:
            return _parse(model, table)
        except ValidationError as error:
            details = error.errors(include_url=False)
            strange = {detail["loc"] for detail in details if detail["type"] == "extra_forbidden"}
            strange |= {(key,) for key in unknown}
            for detail in details:
                *table_of, wanted = detail["loc"] or ("",)
                beside = [str(loc[-1]) for loc in strange if list(loc[:-1]) == table_of]
                if detail["type"] != "missing" or (self.whole and not misspelt(str(wanted), beside)):
                    location = tuple(str(part) for part in detail["loc"])
                    self._add(path + location, *explain(detail, model, known_keys or model.model_fields))
            return None

    def _device(self, name: str, table: Tree) -> DeviceDraft:
        """One device table by the common keys and the options of its type, each with its own errors."""
        path = ("devices", name)
        shared = {key: table[key] for key in table if key in _COMMON_KEYS}
        device_type = self._device_type(path, shared)
        unknown = table.keys() - _COMMON_KEYS
        if device_type is not None:
            unknown -= device_type.options.model_fields.keys()
        else:  # which keys are its type's is not known, but not those that every device must have
            for meant in (misspelt(key, unknown) for key in ("type", "socket") if key not in table):
                if meant:
                    self._add((*path, meant), "unknown key", closest(meant, ("type", "socket")))
        common, faulty = self._model(DeviceConfig, path, shared, unknown=unknown), frozenset[str]()
        if common is None:
            common, faulty = _salvage(shared)
        options: BaseModel | None = None
        if device_type is not None:
            own = {key: table[key] for key in table if key not in _COMMON_KEYS}
            options = self._model(device_type.options, path, own, _COMMON_KEYS | set(device_type.options.model_fields))
        return DeviceDraft(name, device_type, common, faulty, options)

    def _device_type(self, path: KeyPath, shared: Tree) -> DeviceType | None:
        """What ``type`` names; a file's name in it becomes an absolute path in ``shared``."""
        name = shared.get("type")
        if not isinstance(name, str):
            return None
        try:
            in_file = self.device_types.from_file(name, self.folder)
            if in_file is not None:
                shared["type"], found = in_file
                return found
            device_type = self.device_types.get(name)
        except ValueError as error:
            hint = 'a type is a name, or a class in a file: type = "./leds.py:Leds"'
            problem = _problem(self.origins, Finding((*path, "type"), str(error), hint))
            if self.lenient:
                self.unavailable[path[-1]] = problem
            else:
                self.problems.append(problem)
            return None
        if device_type is None:
            hint = closest(name, self.device_types)
            self._add((*path, "type"), f"there is no device type {toml_value(name)}", hint)
        return device_type

    def _check_together(
        self, daemon: DaemonConfig | None, workers: Collection[str], drafts: Collection[DeviceDraft]
    ) -> None:
        """What is only wrong between tables."""
        if not drafts and not self.problems:
            hint = 'add one: [devices.disk] with type = "blk", path = "disk.img", socket = "disk.sock"'
            self.problems.append(Problem(self.path, 0, "", "", "there is no device to serve", hint))
        for draft in drafts:
            for finding in check_device(draft, workers, self.transports):
                self._add(*finding)
        sharers = [
            (draft.name, draft.options, resolved_workers(draft.common, draft.type))
            for draft in drafts
            if draft.options is not None and draft.type is not None
        ]
        for name, key, message, hint in check_sharers(sharers):
            common = next(draft.common for draft in drafts if draft.name == name)
            if key == "worker" and common.workers is not None:
                key = "workers"
            self._add(("devices", name, key), message, hint)
        sockets = {key: getattr(daemon, key) for key in ("control", "hypercall_socket")} if daemon is not None else {}
        for finding in (*check_paths(drafts, sockets, self.folder), *check_sockets(drafts, sockets, self.folder)):
            self._add(*finding)
        for finding in (*check_unique(drafts), *check_files(drafts, self.folder), *check_characters(daemon, drafts)):
            self._add(*finding)


def _problem(origins: Origins, finding: Finding) -> Problem:
    """``finding`` with its place. The first one or two names of its path are the table, the rest the key."""
    path = finding.path
    origin = origins.find(path)
    message = finding.message
    if finding.other:
        other = origins.find(finding.other)
        message += f" (line {other.line})" if other.file == origin.file else f" ({other.file}:{other.line})"
    depth = {"workers": 2, "devices": 2, "daemon": 1}.get(path[0], 0)
    return Problem(origin.file, origin.line, ".".join(path[:depth]), ".".join(path[depth:]), message, finding.hint)


def _parse(model: type[Model], table: Tree) -> Model:
    """``table`` as ``model``, with what JSON's strict rules allow: a string may be a path, but 1 is not true."""
    return model.model_validate_json(json.dumps(table, default=_date), strict=True)


def _date(value: object) -> object:
    """What JSON has no form for, dates and times, becomes something that no key takes."""
    return {"date": str(value)}


def _holds_nul(value: object) -> bool:
    """Also in arrays and tables: no path the kernel is asked for may have one."""
    if isinstance(value, dict | list):
        return any(_holds_nul(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "\0" in value


def _is_deep(tree: Tree) -> bool:
    """Whether more than ``_NESTING_MAX`` tables and arrays are inside each other; what follows recurses into them."""
    level: list[object] = [tree]
    for _ in range(_NESTING_MAX + 1):
        inside: list[object] = []
        for value in level:
            inside += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        level = inside
    return bool(level)


def _deep_line(text: str) -> int:
    """The line of ``text`` that alone is too deep; 0: several together are."""
    lines = enumerate(text.split("\n"), start=1)
    return next((number for number, line in lines if len(re.findall(r"[\[{]", line)) >= _NESTING_MAX), 0)


def _salvage(table: Tree) -> tuple[DeviceConfig, frozenset[str]]:
    """The keys of a device table that are right, with stand-ins for the ``faulty`` ones, which are named.

    So one wrong key does not hide what is wrong between this table and others.
    """
    stand_ins: Tree = {"type": "unknown", "socket": "unknown"}
    good = {key: value for key, value in table.items() if not _holds_nul(value)}
    faulty = table.keys() - good.keys()
    while True:
        try:
            return _parse(DeviceConfig, stand_ins | good), frozenset(faulty | (stand_ins.keys() - good.keys()))
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                key, *inner = detail["loc"]
                if inner and isinstance(good.get(str(key)), dict):
                    good[str(key)] = {name: value for name, value in good[str(key)].items() if name != inner[0]}
                else:
                    faulty.add(str(key))
                    good.pop(str(key), None)


def _merge(tree: Tree, later: Tree) -> None:
    """Merge ``later`` into ``tree``, table by table; for every other value the later one wins."""
    for key, value in later.items():
        earlier = tree.get(key)
        if isinstance(value, dict) and isinstance(earlier, dict):
            _merge(earlier, value)
        else:
            tree[key] = value


def _with_absolute_paths(model: Model, folder: Path) -> Model:
    """A copy of ``model`` in which every relative path, also of inner tables, is taken from ``folder``.

    What nobody said stays unsaid (``model_fields_set``).
    """
    values = {name: getattr(model, name) for name in type(model).model_fields}
    changed = {name: new for name, old in values.items() if (new := _absolute(old, folder)) != old}
    return model.model_copy(update=changed)


def _absolute(value: object, folder: Path) -> object:
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, BaseModel):
        return _with_absolute_paths(value, folder)
    if isinstance(value, tuple | list):
        return type(value)(_absolute(item, folder) for item in value)
    return value
