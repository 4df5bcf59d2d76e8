"""Transports: each turns its wire into the verbs of the waist (``transports.base.BackendLike``).

``TRANSPORTS`` names, for each value of a device's ``transport`` option, the module whose ``serve`` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

TRANSPORTS: Final[Mapping[str, str]] = MappingProxyType({"vhost-user": "transports.vhost_user.serving.server"})
