"""How stock QEMU is started so that its guest can ring by hypercall: with the library, and what that must know."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import uuid as uuids
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from config.loader import Config
from config.schema import SOCKET_PATH_MAX, socket_path_fault
from daemon.attach.hypercall import NO_HYPERCALL_SOCKET
from transports.hypercall import check_key, derive_key
from transports.stock_qemu.library import VARIABLE_KEY, VARIABLE_NAME, VARIABLE_SOCKET, library_path
from transports.stock_qemu.vms import is_vm_name
from virtio.errors import HostError

KVM: Final = Path("/dev/kvm")
PRELOAD: Final = "LD_PRELOAD"
SECRET_MIN: Final = 16  # bytes; a guess of a shorter one would be checked against the key that the guest sees


def hypercall_socket(config: Config) -> Path:
    """Where QEMU reports to the daemon of ``config``; ``HostError`` when it says nowhere."""
    if config.daemon.hypercall_socket is None:
        raise HostError(f"{config.path}: {NO_HYPERCALL_SOCKET}")
    return config.daemon.hypercall_socket


def chosen_key(key: str | None, secret: Path | None, uuid: str | None) -> int | None:
    """The VM's key as the command line gives it; ``None``: none, and the library draws one. ``HostError``: a mistake.

    A key that is the same on every host is what a VM needs that migrates or is saved.
    """
    if key is not None and (secret is not None or uuid is not None):
        raise HostError("--key stands beside --secret or --uuid, which would say another one; keep one way")
    if (secret is None) != (uuid is None):
        raise HostError("--secret and --uuid belong together: a key is derived from both")
    if secret is not None and uuid is not None:
        return derive_key(_read_secret(secret), _parse_uuid(uuid))
    if key is None:
        return None
    try:
        if re.fullmatch(r"(?:0[xX])?[0-9a-fA-F]{1,6}", key) is None:
            raise ValueError(key)
        return check_key(int(key, 16))
    except ValueError:
        raise HostError(f"--key: {key!r} is not 1 to 6 hexadecimal digits other than 0") from None


def _read_secret(path: Path) -> bytes:
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise HostError(f"--secret: {path}: {error.strerror}", errno=error.errno or 0) from error
    if len(secret) < SECRET_MIN:
        raise HostError(
            f"--secret: {path} holds {len(secret)} bytes and should hold {SECRET_MIN} or more; make one: "
            f"openssl rand -hex 32 > {path}"
        )
    return secret


def _parse_uuid(text: str) -> uuids.UUID:
    try:
        return uuids.UUID(text)
    except ValueError:
        raise HostError(f"--uuid: {text!r} is no UUID; give the one that the VM has") from None


def check_vm_name(name: str | None) -> None:
    """``HostError``: no VM can be called so."""
    if name is not None and not is_vm_name(name):
        raise HostError(f"--name: {name!r} is not 1 to 31 letters, digits, dots, dashes and underlines")


def preload_environment(socket: Path, key: int | None, name: str | None) -> dict[str, str]:
    """The environment variables that make QEMU report to ``socket``. ``HostError``: a mistake, or no library."""
    check_vm_name(name)
    environment = {PRELOAD: str(library_path()), VARIABLE_SOCKET: _absolute(socket)}
    if key is not None:
        environment[VARIABLE_KEY] = f"{key:06x}"
    if name is not None:
        environment[VARIABLE_NAME] = name
    return environment


def _absolute(socket: Path) -> str:
    """As QEMU finds it from wherever it is (-daemonize: /). The daemon may have made it by a relative path."""
    path = socket.absolute()
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise HostError(
            f"{path} {socket_path_fault(path)}, and QEMU needs all of it; "
            "put the socket into a folder with a shorter name, such as /run/hyperbell",
            errno=errno.ENAMETOOLONG,
        )
    return str(path)


def without_kvm(command: Sequence[str], kvm: Path = KVM) -> str:
    """Why the guest of this QEMU runs without KVM, and so without the hypercall; "" where nothing says that."""
    accelerators = _accelerators(command)
    if not accelerators:
        return "without -accel kvm QEMU emulates the guest (TCG)"
    if "kvm" not in accelerators:
        return f"QEMU emulates the guest ({', '.join(accelerators)})"
    try:
        os.close(os.open(kvm, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{kvm} cannot be opened ({error.strerror})"
    return ""


def _accelerators(command: Sequence[str]) -> list[str]:
    """Those that QEMU's arguments name, in their order: -accel, -machine accel=A:B, -enable-kvm."""
    found = ["kvm"] if "kvm" in Path(command[0]).name else []  # Debian's kvm is QEMU with -enable-kvm
    for word, value in itertools.pairwise([*command[1:], ""]):
        option = re.sub(r"^--?", "", word) if word.startswith("-") else ""
        if option == "enable-kvm":
            found.append("kvm")
        elif option == "accel":
            found.append(value.split(",")[0].removeprefix("accel="))
        elif option in ("machine", "M"):
            for part in value.split(","):
                if part.startswith("accel="):
                    found += part.removeprefix("accel=").split(":")
    return found


def run_qemu(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become QEMU. What is preloaded already stays so, after ours. ``HostError``: it cannot be started."""
    program = shutil.which(command[0])
    if program is None:
        raise HostError(f"there is no program {command[0]}; install it (Debian: qemu-system-x86), or give its path")
    merged = {**os.environ, **environment}
    if os.environ.get(PRELOAD):
        merged[PRELOAD] = f"{environment[PRELOAD]}:{os.environ[PRELOAD]}"
    try:
        os.execve(program, list(command), merged)
    except OSError as error:
        raise HostError(f"{program} cannot be started: {error.strerror}", errno=error.errno or 0) from error
