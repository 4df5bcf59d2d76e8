"""A Debian archive of a test's own, which the real apt reads."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

SUITE = "trixie"


class Archive:
    """A Debian archive of one suite in ``folder``, which nobody signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: list[str] = []
        self.publish()

    def add(self, name: str, version: str, files: Mapping[str, str | bytes], depends: str = "") -> None:
        """Build a package and publish it."""
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: a test\nDescription: a test\n"
        control += f"Depends: {depends}\n" if depends else ""
        root = self.folder / "build" / f"{name}_{version}"
        for path, text in {"DEBIAN/control": control, **files}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(text.encode() if isinstance(text, str) else text)
        archive = self.folder / "pool" / f"{name}_{version}_amd64.deb"
        archive.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, archive], check=True, capture_output=True)
        content = archive.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self._entries.append(f"{control}Filename: pool/{archive.name}\nSize: {len(content)}\nSHA256: {digest}\n")
        self.publish()

    def remove(self, name: str) -> None:
        """As a mirror does when a newer version comes."""
        for archive in (self.folder / "pool").glob(f"{name}_*"):
            archive.unlink()
        self._entries = [entry for entry in self._entries if not entry.startswith(f"Package: {name}\n")]

    def publish(self) -> None:
        release = self.folder / "dists" / SUITE
        index = "\n".join(self._entries).encode()
        (release / "main" / "binary-amd64").mkdir(parents=True, exist_ok=True)
        (release / "main" / "binary-amd64" / "Packages").write_bytes(index)
        listed = f" {hashlib.sha256(index).hexdigest()} {len(index)} main/binary-amd64/Packages\n"
        head = (
            f"Origin: Debian\nLabel: Debian\nSuite: stable\nCodename: {SUITE}\nArchitectures: amd64\nComponents: main\n"
        )
        (release / "Release").write_text(f"{head}Date: Sun, 29 Nov 2026 12:00:00 UTC\nSHA256:\n{listed}")
