"""Devices from the command line, ``blk,path=disk.img,queues=2``: a file's keys, checked by the same models."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from config.checks import check_against_type, resolved_workers
from config.problems import ConfigError, Problem, closest, explain, toml_value
from config.schema import NAME, NAME_RULE, DeviceTable, DeviceTypes

FEATURE_PREFIX: Final = "VIRTIO_"
NO_KEYS_HERE: Final = frozenset({"worker", "workers", "features", "type"})
"""Keys of a file that have no meaning, or another form, on the command line."""
_KEYS: Final = frozenset(DeviceTable.model_fields) - NO_KEYS_HERE | {"name"}
_PIECE: Final = re.compile(",,|,|[^,]+")
_ARRAY_TOKEN: Final = re.compile(r"""'[^']*'|"(?:[^"\\]|\\.)*"|[][{}]""")

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class OptionDevice:
    """One device as the command line has it; ``option`` is the text it was made from."""

    option: str
    name: str
    common: DeviceTable
    options: BaseModel
    queues: int
    workers: tuple[str, ...]


def parse_devices(texts: Sequence[str], device_types: DeviceTypes, switch: str = "--device") -> dict[str, OptionDevice]:
    """The devices of ``texts`` by name: ``TYPE[,KEY=VALUE]...``, a comma in a value written twice, an array as in TOML.

    A device is called by its key ``name``, or by its type, with a number from the second one on. A feature's name with
    ``=off`` turns it off. Raises ``ConfigError`` with every mistake.
    """
    devices: dict[str, OptionDevice] = {}
    problems: list[Problem] = []
    for text in texts:
        parser = _Parser(f"{switch} {text}", device_types)
        device = parser.parse(text, devices)
        problems += parser.problems
        if device is not None:
            devices[device.name] = device
    if problems:
        raise ConfigError(problems)
    return devices


class _Parser:
    def __init__(self, option: str, device_types: DeviceTypes) -> None:
        self._option = option
        self._types = device_types
        self.problems: list[Problem] = []

    def _add(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(Path(self._option), 0, "", key, _as_option(message), _as_option(hint)))

    def parse(self, text: str, others: Mapping[str, OptionDevice]) -> OptionDevice | None:
        """The device, or ``None`` after recording what is wrong with it."""
        type_name = _split(text)[0]
        try:
            in_file = self._types.from_file(type_name, Path.cwd())
            device_type = in_file[1] if in_file is not None else self._types.get(type_name)
        except ValueError as error:
            self._add("", str(error))
            return None
        if device_type is None:
            self._add("", f"there is no device type {toml_value(type_name)}", closest(type_name, self._types))
            return None
        default_name = type_name
        if in_file is not None:
            type_name, default_name = in_file[0], in_file[0].rpartition(":")[2].lower()
        arrays = _arrays(device_type.options)
        table = self._table(_split(text, arrays)[1:], arrays)
        if self.problems:
            return None
        name = str(table.pop("name", "")) or _free_name(default_name, others)
        if NAME.fullmatch(name) is None:
            self._add("name", "this name cannot be used", NAME_RULE)
        elif name in others:
            self._add("name", f"there is another device {toml_value(name)}", "give each a name of its own")
        own = {key: value for key, value in table.items() if key not in _KEYS and not key.startswith(FEATURE_PREFIX)}
        shared = {key: value for key, value in table.items() if key in _KEYS}
        features = {key: value for key, value in table.items() if key.startswith(FEATURE_PREFIX)}
        common = self._model(DeviceTable, {"type": type_name, "features": features} | shared)
        options = self._model(device_type.options, own)
        if common is not None:
            for finding in check_against_type((), common, device_type):
                self._add(finding.path[-1], finding.message, finding.hint)
        if self.problems or common is None or options is None:
            return None
        return OptionDevice(
            self._option,
            name,
            common,
            options,
            common.queues or device_type.queues_default,
            resolved_workers(common, device_type),
        )

    def _table(self, parts: Sequence[str], arrays: Collection[str]) -> dict[str, object]:
        table: dict[str, object] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals:
                self._add(key, "has no value", f"write {key or 'KEY'}=VALUE")
            elif key in table:
                self._add(key, "stands there twice", "keep one of the two")
            elif "\0" in value:
                self._add(key, "holds a NUL character", "no name, path or address may have one")
            elif key in arrays and value.startswith("["):
                try:
                    table[key] = tomllib.loads(f"array = {value}")["array"]
                except tomllib.TOMLDecodeError as error:
                    self._add(key, f"is not an array as in TOML: {error}", "texts in it stand in double quotes")
                except RecursionError:
                    self._add(key, "has too many arrays inside each other")
            else:
                table[key] = value
        return table

    def _model(self, model: type[Model], table: Mapping[str, object]) -> Model | None:
        known = _KEYS | set(model.model_fields) - NO_KEYS_HERE
        # Pydantic's way with strings takes nothing else; its lax way with Python's values takes these strings too.
        plain = not any(isinstance(value, list) for value in table.values())
        try:
            return model.model_validate_strings(table) if plain else model.model_validate(table)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                key = str(detail["loc"][-1]) if detail["loc"] else ""
                self._add(key, *explain(detail, model, known))
            return None


def _arrays(model: type[BaseModel]) -> frozenset[str]:
    """The keys whose values are arrays."""
    return frozenset(key for key, field in model.model_fields.items() if _is_array(field.annotation))


def _is_array(kind: object) -> bool:
    return get_origin(kind) is tuple or any(get_origin(each) is tuple for each in get_args(kind))


def _split(text: str, arrays: Collection[str] = ()) -> list[str]:
    """At commas; two of them are one that is meant. An array of one of the keys ``arrays`` is left as it is."""
    parts = [""]
    place = 0
    while found := _PIECE.match(text, place):
        piece, place = found[0], found.end()
        key, _, value = piece.partition("=")
        if piece == ",":
            parts.append("")
        elif parts[-1] == "" and key in arrays and value.startswith("["):
            begin = found.start() + len(key) + 1
            place = _array_end(text, begin)
            parts[-1] = f"{key}={text[begin:place]}"
        else:
            parts[-1] += "," if piece == ",," else piece
    return parts


def _array_end(text: str, begin: int) -> int:
    """Where the array that begins there ends; the end of ``text`` if it does not."""
    depth = 0
    for token in _ARRAY_TOKEN.finditer(text, begin):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)


def _free_name(type_name: str, others: Mapping[str, OptionDevice]) -> str:
    name, number = type_name, 1
    while name in others:
        number += 1
        name = f"{type_name}{number}"
    return name


def _as_option(text: str) -> str:
    """``key = "value"``, as a file has it, in the form of the command line."""
    return re.sub(r'(\w+) = (?:"([^"]*)"|(?=[\w[]))', r"\1=\2", text)
