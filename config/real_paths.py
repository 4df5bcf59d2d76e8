"""Where a path really leads, of a file system that may hang."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

PATIENCE_SECONDS: Final = 2.0

_asked: dict[str, threading.Thread] = {}
"""Questions without an answer yet: a file system that hangs keeps one thread for each path, however often asked."""


def real_path(path: Path) -> str:
    """``path`` without links; as it is written where its file system has not answered for ``PATIENCE_SECONDS``.

    Takes loops and closed folders.
    """
    written = os.path.normpath(path)
    answers: list[str] = []
    asking = _asked.get(written)
    if asking is not None and asking.is_alive():
        return written
    asking = _asked[written] = threading.Thread(target=lambda: answers.append(os.path.realpath(path)), daemon=True)
    asking.start()
    asking.join(PATIENCE_SECONDS)
    if not answers:
        return written
    del _asked[written]
    return answers[0]
