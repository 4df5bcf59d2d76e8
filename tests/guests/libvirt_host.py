"""A real libvirtd of a Debian suite: its packages unpacked, not installed, in a root folder and namespaces of its own.

What it starts and mounts ends with the namespaces, which end with their first process, whatever becomes of ours.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from guest.boot.console import Console
from guest.debian.cache import PrepareError
from guest.debian.qemu import PACKAGES as QEMU_PACKAGES
from guest.debian.suites import Suite
from guest.debian.tree import Tree

LIBVIRT_PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-daemon-log", "libvirt-clients")
PACKAGES = (*LIBVIRT_PACKAGES, "libvirt-common", *QEMU_PACKAGES)
LIFETIME_SECONDS = 600  # not longer, even when the process that started it is killed
START_SECONDS = 120
CONNECT_SECONDS = 120
END_SECONDS = 5
END = "VIRSH exit "
# The first process: the tree is below, what is written goes to memory, and of this machine's files only one folder is
# there. Then it runs virsh for each line, until its input ends. libvirt looks up its own user, though it starts QEMU as
# root; the packages' scripts, which make that user, have not run.
SCRIPT = f"""
set -eu
tree=$1 folder=$2 place=$2/room
export LC_ALL=C
mount -t tmpfs tmpfs "$place"
mkdir "$place/upper" "$place/work" "$place/root"
mount -t overlay -o "lowerdir=$tree,upperdir=$place/upper,workdir=$place/work" overlay "$place/root"
cd "$place/root"
rm -rf var/run
mkdir -p proc sys dev run etc/libvirt var/log "./$folder"
ln -s /run var/run
[ -e usr/bin/sh ] || ln -s bash usr/bin/sh
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs tmpfs dev
for each in null zero full random urandom; do
    touch "dev/$each"
    mount --bind "/dev/$each" "dev/$each"
done
mount --bind "$folder" "./$folder"
printf '%s:x:%s:%s::/:/bin/sh\\n' root 0 0 libvirt-qemu 64055 64055 >etc/passwd
printf '%s:x:%s:\\n' root 0 kvm 104 libvirt-qemu 64055 >etc/group
cat >etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
END
chroot . /usr/sbin/virtlogd --daemon
chroot . /usr/sbin/libvirtd --daemon
echo "{END}0"
while read -r words; do
    status=0
    eval "chroot . /usr/bin/virsh --connect qemu:///system $words" </dev/null 2>&1 || status=$?
    [ $status = 0 ] || tail -n 20 var/log/libvirt/*.log var/log/libvirt/qemu/*.log 2>/dev/null || true
    echo "{END}$status"
done
"""


class LibvirtError(Exception):
    """libvirt did not do what it was asked; the text is what it said."""


class Libvirt:
    """A libvirtd that runs: ``virsh`` asks it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""

    async def virsh(self, *words: str, timeout_seconds: float = 60) -> str:
        """What ``virsh`` with these words prints. ``LibvirtError`` where it fails, with its logs."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(f"{shlex.join(words)}\n".encode())
        return await self.answer(f"virsh {shlex.join(words)}", timeout_seconds)

    async def answer(self, what: str, timeout_seconds: float) -> str:
        assert self._process.stdout is not None
        said: list[str] = []
        with trio.move_on_after(timeout_seconds):
            while True:
                *lines, self._said = self._said.split(b"\n")
                for number, line in enumerate(each.decode(errors="replace") for each in lines):
                    if not line.startswith(END):
                        said.append(line)
                        continue
                    self._said = b"\n".join([*lines[number + 1 :], self._said])
                    if line != f"{END}0":
                        raise LibvirtError(f"{what} failed:\n" + "\n".join(said))
                    return "\n".join(said)
                more = await self._process.stdout.receive_some(65536)
                if not more:
                    raise LibvirtError(f"libvirt's host ended at '{what}':\n" + "\n".join(said))
                self._said += more
        raise LibvirtError(f"{what} did not end within {timeout_seconds:.0f} s:\n" + "\n".join(said))


def libvirt_tree(suite: Suite) -> Tree:
    """libvirt and QEMU with all they need. Raises ``PrepareError`` with advice."""
    return suite.unpack([*PACKAGES, "base-files", "bash", "coreutils"])


@asynccontextmanager
async def libvirt_host(tree: Tree, folder: Path) -> AsyncIterator[Libvirt]:
    """A libvirtd that sees ``folder`` under its name here; it and all its domains end with the block.

    Raises ``PrepareError`` where we are not root: libvirt takes on groups for QEMU, which a user namespace refuses.
    """
    if os.geteuid() != 0:
        raise PrepareError("libvirtd needs root to start a domain: run 'make test-ground' as root")
    (folder / "room").mkdir()
    command = ["timeout", "--signal=KILL", str(LIFETIME_SECONDS)]
    command += ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    command += ["sh", "-c", SCRIPT, "libvirt-host", str(tree.folder.resolve()), str(folder)]
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        libvirt = Libvirt(process)
        await libvirt.answer("starting libvirtd", START_SECONDS)
        yield libvirt
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.aclose()  # ends the first process, unless it is at a command that hangs
            with trio.move_on_after(END_SECONDS):
                await process.wait()
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            await process.stdout.aclose()


class DomainConsole(Console):
    """A domain's serial port, which connects to a socket of ours."""

    kind = "libvirt"

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(lambda line: None)
        self._stream = stream

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(65536))
        except trio.BrokenResourceError:
            return b""

    async def _transmit(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def _why_ended(self) -> str:
        return "the domain's QEMU ended"

    async def until_off(self, timeout_seconds: float = 60) -> None:
        """Power off, and wait for the end of its console."""
        await self._transmit(b"0 poweroff -f\n")
        with trio.fail_after(timeout_seconds):
            while await self._read():
                pass
