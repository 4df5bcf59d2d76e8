"""QEMUs in a level, spoken with over QMP."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from guest.nested.level import Level

CLIENT_PATH = "/tmp/qmp.py"
# Speaks QMP: what is on standard input, one command a line; the last answer goes to standard output.
CLIENT = """
import json, socket, sys
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]); lines = sock.makefile("rw")
lines.readline()
for command in ({"execute": "qmp_capabilities"}, *map(json.loads, sys.argv[2:])):
    lines.write(json.dumps(command) + "\\n"); lines.flush()
    while True:
        answer = json.loads(lines.readline())
        if "return" in answer or "error" in answer: break
    assert "return" in answer, answer
print("RESULT qmp=" + json.dumps(answer["return"]))
"""


async def prepare_qmp(level: Level) -> None:
    """What ``qmp`` needs in ``level``."""
    await level.write(CLIENT_PATH, CLIENT)


async def qmp(level: Level, socket: str, *commands: Mapping[str, Any]) -> Any:
    """Have the QEMU whose monitor is at ``socket`` carry out ``commands``; what the last one gives back."""
    words = [shlex.quote(json.dumps(command)) for command in commands]
    answer = await level.run(f"python3 {CLIENT_PATH} {socket} {' '.join(words)}")
    return json.loads(answer.results["qmp"])
