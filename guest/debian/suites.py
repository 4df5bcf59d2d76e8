"""Packages of a Debian suite, whatever this machine's own is: looked up, downloaded and unpacked, never installed.

``python -m guest.debian.suites SUITE version PACKAGE`` prints a version, ``SUITE unpack PACKAGE...`` the folder of an
unpacked tree, ``SUITE qemu`` a folder with a ``qemu-system-x86_64`` of that suite, for PATH.

apt gets lists and archives of its own under the cache folder. The mirror, the proxy and the keys are those with which
this machine's apt fetches its own Debian. A suite that those keys did not sign is refused.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from guest.debian.cache import PrepareError, Progress, cache_folder, scratch_folder, store_file
from guest.debian.tools import run_tool
from guest.debian.tree import Tree, unpack_archives

# Each suite after those that it builds upon: a backport takes its libraries from the release.
SUITES = {
    "bookworm": ("bookworm",),
    "trixie": ("trixie",),
    "trixie-backports": ("trixie", "trixie-backports"),
    "forky": ("forky",),
    "sid": ("sid",),
}
ARCHITECTURE = "amd64"
KEYRINGS = tuple(Path(f"/usr/share/keyrings/debian-archive-keyring.{suffix}") for suffix in ("gpg", "pgp"))
LISTS_SECONDS = 24 * 3600  # lists older than this are fetched again before something is downloaded
# Hooks, pins and default releases are for what is installed on this machine.
APT_CONF = """\
#clear APT::Update;
#clear APT::Architectures;
#clear APT::Default-Release;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Default-Release "{suite}";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Get::Assume-Yes "true";
APT::Sandbox::User "{user}";
Acquire::Languages "none";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "{folder}/sources";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{folder}/state";
Dir::State::Status "{folder}/state/status";
Dir::Cache "{folder}/cache";
"""
SOURCE = """\
Types: deb
URIs: {mirror}
Suites: {suites}
Components: main
Architectures: {architecture}
"""


@dataclass(frozen=True)
class Suite:
    """One suite. ``folder`` is its part of the cache."""

    name: str
    folder: Path
    progress: Progress

    def version(self, package: str) -> str:
        """The version of ``package`` in this suite. Raises ``PrepareError`` with advice."""
        return field_of(self._shown(package), "Version")

    def depends(self, package: str) -> list[str]:
        """The names of the packages that ``package`` depends on; of alternatives the first."""
        return first_dependencies(self._shown(package))

    def download(self, package: str, into: Path) -> Path:
        """The archive of ``package``, in the empty folder ``into``. Raises ``PrepareError`` with advice."""
        self.progress(f"fetching {package} of Debian {self.name}; it is not installed")
        with self._locked():
            self._fetch("apt-get", "download", package, cwd=into)
        archives = list(into.glob("*.deb"))
        if len(archives) != 1:
            raise PrepareError(f"apt-get download {package} left {len(archives)} archives instead of one")
        return archives[0]

    def unpack(self, packages: Sequence[str]) -> Tree:
        """The tree of ``packages`` and of all they depend on, from the cache while their versions are the same.

        No script of a package runs: alternatives, users and caches, which those make, are not in the tree.
        Raises ``PrepareError`` with advice.
        """
        with self._locked():
            self._need_lists()
            versions = [f"{package}_{version.replace(':', '%3a')}" for package, version in self._versions(packages)]
            further = hashlib.sha256(" ".join(versions).encode()).hexdigest()[:8]
            target = self.folder / "trees" / f"{versions[0]}-{further}"
            if target.exists():
                return Tree(target)
            self.progress(f"fetching {' and '.join(packages)} of Debian {self.name} with all they need; not installed")
            with scratch_folder(self.folder) as scratch:
                archives = scratch / "archives"
                (archives / "partial").mkdir(parents=True)
                where = f"Dir::Cache::Archives={archives}"
                self._fetch("apt-get", "-o", where, "--download-only", "install", *packages)
                found = sorted(archives.glob("*.deb"))
                if not found:
                    raise PrepareError(f"apt-get fetched nothing of {' and '.join(packages)} of Debian {self.name}")
                self.progress(f"unpacking {len(found)} packages")
                unpack_archives(found, scratch / "tree")
                target.parent.mkdir(exist_ok=True)
                (scratch / "tree").rename(target)
        return Tree(target)

    def _versions(self, packages: Sequence[str]) -> list[tuple[str, str]]:
        """The versions of all ``packages``, by one look into the lists, which takes a while."""
        records = self._shown(*packages).split("\n\n")
        found = {field_of(record, "Package"): field_of(record, "Version") for record in records}
        return [(package, found.get(package) or self.version(package)) for package in packages]

    def _shown(self, *packages: str) -> str:
        try:
            return self._apt("apt-cache", "show", "--no-all-versions", *packages)
        except PrepareError as error:
            missing = " or ".join(packages)
            raise PrepareError(f"Debian {self.name} has no package {missing} on this machine's mirror") from error

    def _apt(self, *words: str, cwd: Path | None = None) -> str:
        program, *further = words
        return run_tool([program, "-c", str(self.folder / "apt.conf"), *further], f"Debian {self.name}", cwd)

    def _fetch(self, *words: str, cwd: Path | None = None) -> None:
        """Let apt download. A mirror may have removed a version that old lists name: fetch new ones, try again."""
        try:
            self._apt(*words, cwd=cwd)
        except PrepareError:
            self._update()
            self._apt(*words, cwd=cwd)

    def _need_lists(self) -> None:
        made = self.folder / "updated"
        if not made.exists() or time.time() - made.stat().st_mtime > LISTS_SECONDS:
            self._update()

    def _update(self) -> None:
        self.progress(f"fetching the package lists of Debian {self.name}")
        try:
            self._apt("apt-get", "--error-on=any", "update")
        except PrepareError as error:
            raise PrepareError(f"{error}{_advice(str(error))}") from error
        (self.folder / "updated").touch()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: apt does not wait for another that uses the same lists."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def field_of(shown: str, field: str) -> str:
    """A field of what ``apt-cache show`` says of a package; "" if there is none."""
    found = re.search(rf"^{field}: (.*)$", shown, re.MULTILINE)
    return found.group(1) if found else ""


def first_dependencies(shown: str) -> list[str]:
    """The names of the packages that ``apt-cache show`` says a package depends on; of alternatives the first."""
    return [re.split(r"[\s|(:]", each.strip())[0] for each in field_of(shown, "Depends").split(",") if each.strip()]


def _advice(said: str) -> str:
    if "NO_PUBKEY" in said or "not signed" in said or "Missing key" in said:
        return (
            "; this machine's Debian keys (package debian-archive-keyring) did not sign that suite, so nothing is taken"
            " from it: upgrade that package from this machine's own Debian"
        )
    return "; see whether 'apt-get update' works on this machine, whose mirror and proxy are used"


def open_suite(name: str, progress: Progress) -> Suite:
    """The suite ``name``, with package lists. Raises ``PrepareError`` with advice."""
    if name not in SUITES:
        raise PrepareError(f"there is no suite {name!r}; known are {', '.join(SUITES)}")
    folder = cache_folder() / "suites" / name
    for part in ("sources", "state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    suite = Suite(name, folder, progress)
    with suite._locked():
        if _configure(name, folder):
            (folder / "updated").unlink(missing_ok=True)
        suite._need_lists()
    return suite


def _configure(name: str, folder: Path) -> bool:
    """Write apt's configuration; True if it is another than before."""
    # apt leaves packages of a file: mirror where they are, and copies those of a copy: mirror.
    mirror = re.sub(r"^file:", "copy:", _mirror())
    source = SOURCE.format(mirror=mirror, suites=" ".join(SUITES[name]), architecture=ARCHITECTURE)
    keyring = next((path for path in KEYRINGS if path.exists()), None)
    if keyring is not None:  # else apt looks at the keys that this machine trusts for everything
        source += f"Signed-By: {keyring}\n"
    user = "root" if os.geteuid() == 0 else ""  # apt would drop root, and then could not write here
    files = {
        "apt.conf": APT_CONF.format(architecture=ARCHITECTURE, suite=name, user=user, folder=folder.resolve()),
        "sources/suite.sources": source,
        "state/status": "",  # nothing is installed: all that a package needs is downloaded
    }
    changed = False
    for path, text in files.items():
        if not (folder / path).exists() or (folder / path).read_text() != text:
            store_file(folder / path, text.encode())
            changed = True
    return changed


def _mirror() -> str:
    """Where this machine's apt has its own Debian from."""
    lines = run_tool(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"], "apt's sources")
    for line in lines.splitlines():
        origin, label, uri = line.split("|", 2)
        if (origin, label) == ("Debian", "Debian"):
            return uri
    raise PrepareError("apt knows no Debian mirror on this machine; run 'apt-get update' as root and try again")


def main(arguments: Sequence[str] | None = None) -> int:
    from guest.debian.qemu import prepare_qemu

    parser = argparse.ArgumentParser(prog="python -m guest.debian.suites", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("action", choices=("version", "unpack", "qemu"))
    parser.add_argument("packages", nargs="*")
    options = parser.parse_args(arguments)
    if (options.action == "qemu") == bool(options.packages):
        parser.error(f"{options.action} takes {'no' if options.packages else 'one or more'} packages")
    try:
        suite = open_suite(options.suite, lambda line: print(line, file=sys.stderr))
        if options.action == "version":
            for package in options.packages:
                print(suite.version(package))
        elif options.action == "unpack":
            print(suite.unpack(options.packages).folder)
        else:
            print(prepare_qemu(suite))
    except PrepareError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
