"""The whole configuration as one JSON Schema (2020-12), for editors and other programs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from pydantic import BaseModel

from config.schema import DaemonConfig, DeviceConfig, DeviceType, WorkerConfig

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_NAMES: Final = {"pattern": "^[A-Za-z][A-Za-z0-9_.-]{0,62}$"}

Schema = dict[str, Any]


def json_schema(device_types: Mapping[str, DeviceType], transports: Collection[str]) -> Schema:
    """One schema of a configuration file; a device is one of ``device_types``, told apart by its ``type``."""
    definitions: Schema = {}
    devices = [
        {"$ref": f"#/$defs/{_define(definitions, f'device-{name}', _device(name, device_type, transports))}"}
        for name, device_type in sorted(device_types.items())
    ]
    daemon = _define(definitions, "daemon", _table(DaemonConfig))
    worker = _define(definitions, "worker", _table(WorkerConfig))
    return {
        "$schema": DIALECT,
        "title": "hyperbell configuration",
        "type": "object",
        "additionalProperties": False,
        "required": ["devices"],
        "properties": {
            "daemon": {"$ref": f"#/$defs/{daemon}"},
            "workers": {
                "type": "object",
                "description": "Native threads, by name.",
                "propertyNames": _NAMES,
                "additionalProperties": {"$ref": f"#/$defs/{worker}"},
            },
            "devices": {
                "type": "object",
                "description": "Devices, by name.",
                "minProperties": 1,
                "propertyNames": _NAMES,
                "additionalProperties": {"oneOf": devices},
            },
        },
        "$defs": definitions,
    }


def _table(model: type[BaseModel]) -> Schema:
    """The schema of one table as TOML can have it: a key that may be ``None`` in the model is one to leave out."""
    schema = model.model_json_schema(mode="validation")
    for part in (schema, *schema.get("$defs", {}).values()):
        part["properties"] = {key: _without_null(value) for key, value in part.get("properties", {}).items()}
    return schema


def _without_null(schema: Schema) -> Schema:
    plain = {key: value for key, value in schema.items() if key not in ("title", "anyOf")}
    if plain.get("default", ...) is None:
        del plain["default"]
    kinds: list[Schema] = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        return kinds[0] | plain
    return plain | {"anyOf": kinds} if kinds else plain


def _define(definitions: Schema, name: str, schema: Schema) -> str:
    """Put ``schema`` into ``definitions``, and its own nested definitions beside it under names of their own."""
    nested = schema.pop("$defs", {})
    renamed = {inner: f"{name}-{inner}" for inner in nested}
    for inner, part in nested.items():
        definitions[renamed[inner]] = _renamed(part, renamed)
    definitions[name] = _renamed(schema, renamed)
    return name


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """``node`` with every reference to a definition in ``names`` turned to its new name."""
    if isinstance(node, dict):
        reference = str(node.get("$ref", "")).removeprefix("#/$defs/")
        if reference in names:
            return node | {"$ref": f"#/$defs/{names[reference]}"}
        return {key: _renamed(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    return node


def _device(name: str, device_type: DeviceType, transports: Collection[str]) -> Schema:
    """A device table: the common keys, narrowed to what this type takes, and the options of the type."""
    common, own = _table(DeviceConfig), _table(device_type.options)
    properties = common["properties"] | own.get("properties", {})
    properties["type"] = {"const": name, "description": properties["type"]["description"]}
    properties["transport"] |= {"enum": sorted(transports)}
    properties["queues"] |= {
        "minimum": device_type.queues_min,
        "maximum": device_type.queues_max,
        "default": device_type.queues_default,
    }
    sizes = [1 << bit for bit in range(1, 16)]
    properties["queue_size"] |= {
        "enum": [size for size in sizes if size <= device_type.queue_size_max],
        "default": device_type.queue_size_max,
    }
    properties["features"] |= {
        "propertyNames": {"enum": sorted(device_type.features)},
        "additionalProperties": {"type": "boolean"},
    }
    if not device_type.native:  # driven by the daemon's event loop
        del properties["worker"], properties["workers"]
    return {
        "title": f"{name} device",
        "description": (device_type.options.__doc__ or "").strip(),
        "type": "object",
        "additionalProperties": False,
        "required": sorted({*common["required"], *own.get("required", [])}),
        "properties": properties,
        "$defs": common.get("$defs", {}) | own.get("$defs", {}),
    }
