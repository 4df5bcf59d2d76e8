"""What is wrong with a configuration, said so that an operator can mend it."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails, PydanticCustomError


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it is, what is wrong, and what would be right.

    ``line`` is 0 when it is not known; ``table`` is the dotted table name ("" for the file as a whole);
    ``key`` is "" when the table as a whole is wrong; ``hint`` may be "".
    """

    file: Path
    line: int
    table: str
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else str(self.file)
        subject = f"[{self.table}] {self.key}".strip() if self.table else self.key
        text = f"{place}: {subject}: {self.message}" if subject else f"{place}: {self.message}"
        return f"{text}\n    {self.hint}" if self.hint else text


class ConfigError(Exception):
    """The configuration cannot be used; ``problems`` holds every reason that was found, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (str(p.file), p.line, p.table, p.key)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def wrong(message: str, hint: str = "") -> PydanticCustomError:
    """What a validator raises: ``message`` says what is wrong, ``hint`` what would be right."""
    return PydanticCustomError("hyperbell", "{message}", {"message": message, "hint": hint})


def closest(name: str, known: Collection[str]) -> str:
    """A hint for a name that is not among ``known``: the nearest one, else all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
        candidate for candidate in sorted(known) if candidate.casefold() == name.casefold()
    ]
    if near:
        return f'did you mean "{near[0]}"?'
    if not known:
        return ""
    return "known here: " + ", ".join(sorted(known))


def misspelt(name: str, unknown: Collection[str]) -> str:
    """The key among the ``unknown`` ones that was meant to be ``name``, or ""."""
    return next(iter(difflib.get_close_matches(name, sorted(unknown), n=1, cutoff=0.7)), "")


def toml_value(value: object) -> str:
    """``value`` as one would write it in TOML, shortened."""
    if isinstance(value, dict):
        text = "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    else:
        text = json.dumps(value, default=str, ensure_ascii=False)
        text = "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) == "Cc" else c for c in text)
    return text if len(text) <= 60 else text[:57] + "..."


_KINDS: Final = {
    "int": "an integer",
    "bool": "true or false",
    "string": "a string in quotes",
    "float": "a number",
    "path": "a path in quotes",
    "list": "an array",
    "tuple": "an array",
    "dict": "a table",
    "model": "a table",
}
"""Names of TOML's kinds by the first word of pydantic's error type (``int_type``, ``bool_parsing``, ...)."""

_BOUNDS: Final = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def explain(error: ErrorDetails, model: type[BaseModel], known_keys: Collection[str]) -> tuple[str, str]:
    """Message and hint for one of pydantic's errors about a table that ``model`` describes.

    ``known_keys`` are the keys that may stand in that table, for the nearest name of an unknown one.
    """
    kind, context = error["type"], error.get("ctx", {})
    names = [part for part in error["loc"] if isinstance(part, str)]
    key = names[0] if names else ""
    for name in names[1:]:
        inner = _inner_model(model, key)
        if inner is None:  # a table of free names, such as features
            break
        model, known_keys, key = inner, inner.model_fields, name
    example = _example(model, key)
    if kind == "missing":
        return "is missing", f"add {example}" if example else _description(model, key)
    if kind == "extra_forbidden":
        return "unknown key", closest(key, known_keys)
    right = _what_is_right(kind, context, error, example) or _description(model, key)
    return _what_is_wrong(kind, context, error), right


def _inner_model(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of the table, or of the tables in the array, that ``key`` holds."""
    info = model.model_fields.get(key)
    kinds = [info.annotation if info is not None else None]
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        kinds.extend(get_args(kind))
    return None


def _what_is_wrong(kind: str, context: dict[str, Any], error: ErrorDetails) -> str:
    value = toml_value(error["input"])
    if "message" in context:
        return str(context["message"])
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]}, not {value}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, not {value}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}, not {value}"
    first = kind.split("_", 1)[0]
    if first in _KINDS and kind.endswith(("_type", "_parsing")):
        return f"must be {_KINDS[first]}, not {value}"
    return f"{error['msg']} ({value})"


def _what_is_right(kind: str, context: dict[str, Any], error: ErrorDetails, example: str) -> str:
    if context.get("hint"):
        return str(context["hint"])
    if kind in ("literal_error", "enum") and isinstance(error["input"], str):
        near = difflib.get_close_matches(error["input"], str(context["expected"]).split("'"), n=1)
        if near:
            return f'did you mean "{near[0]}"?'
    return f"for example: {example}" if example else ""


def _example(model: type[BaseModel], key: str) -> str:
    info = model.model_fields.get(key)
    if info is None:
        return ""
    if info.examples:
        return f"{key} = {toml_value(info.examples[0])}"
    default = info.get_default()
    usable = isinstance(default, str | int | bool) and default != ""
    return f"{key} = {toml_value(default)}" if usable else ""


def _description(model: type[BaseModel], key: str) -> str:
    info = model.model_fields.get(key)
    return (info.description or "") if info is not None else ""
