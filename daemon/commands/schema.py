"""``hyperbell schema``: the JSON schema of the configuration."""

from __future__ import annotations

import argparse
import json
from typing import Final

from config.json_schema import json_schema
from daemon.commands.command import EXIT_OK, Command
from daemon.devices.catalogue import device_types
from transports import TRANSPORTS


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON schema of the configuration."""
    print(json.dumps(json_schema(device_types(), TRANSPORTS), indent=2))
    return EXIT_OK


COMMAND: Final = Command("schema", "print the JSON schema (2020-12) of the configuration", schema)
