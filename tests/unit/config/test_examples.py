"""The examples that come with hyperbell load, and together they know every key there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import config
from config.json_schema import DIALECT, json_schema
from config.loader import drop_ins
from daemon.commands.command import load_config
from daemon.devices.catalogue import device_types
from transports import TRANSPORTS

EXAMPLES = Path(config.__file__).parent / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_every_example_is_a_correct_configuration(name: str) -> None:
    loaded = load_config(EXAMPLES / name)
    assert loaded.devices
    assert drop_ins(EXAMPLES / name) == ()


def properties(schema: dict[str, Any]) -> set[str]:
    """Every key that some table of the configuration may have."""
    definitions = schema["$defs"].values()
    return {key for definition in definitions for key in definition.get("properties", {})}


def test_the_full_example_explains_every_key() -> None:
    text = (EXAMPLES / "full.toml").read_text()
    unexplained = {
        key
        for key in properties(json_schema(device_types(), TRANSPORTS))
        if f"\n{key} = " not in text.replace("\n# ", "\n")
    }
    tables = {key for key in unexplained if f".{key}]" in text}
    assert unexplained - tables == set()


def test_the_schema_tells_device_types_apart_and_allows_no_other_key() -> None:
    schema = json_schema(device_types(), TRANSPORTS)
    assert schema["$schema"] == DIALECT
    references = [choice["$ref"] for choice in schema["properties"]["devices"]["additionalProperties"]["oneOf"]]
    assert references == [f"#/$defs/device-{name}" for name in sorted(device_types())]
    for name in device_types():
        device = schema["$defs"][f"device-{name}"]
        assert device["properties"]["type"]["const"] == name
        assert device["additionalProperties"] is False
        assert {"type", "socket"} <= set(device["required"])


def test_the_schema_refers_only_to_what_it_defines_and_knows_no_null() -> None:
    schema = json_schema(device_types(), TRANSPORTS)
    references: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            assert node.get("type") != "null", node
            if "$ref" in node:
                references.append(node["$ref"].removeprefix("#/$defs/"))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for item in node:
                walk(item)

    walk(schema)
    assert set(references) <= set(schema["$defs"])
    assert len(references) > len(device_types())


def test_every_key_of_the_schema_says_what_it_means() -> None:
    schema = json_schema(device_types(), TRANSPORTS)
    silent = [
        (name, key)
        for name, definition in schema["$defs"].items()
        for key, value in definition.get("properties", {}).items()
        if not value.get("description")
    ]
    assert silent == []


def test_only_native_devices_have_workers_in_the_schema() -> None:
    schema = json_schema(device_types(), TRANSPORTS)
    for name, device_type in device_types().items():
        keys = schema["$defs"][f"device-{name}"]["properties"].keys()
        assert ("workers" in keys, "worker" in keys) == (device_type.native, device_type.native)
