"""The process of one user network: ``python -m virtio.usernet FRAMES_FD``, started by ``virtio.devices.net.user``.

Its first line of input is the setup as JSON; it serves until the input ends, which it also does when the daemon dies.
Its one line of output is "ready", or else the reason why it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import resource
import sys
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

NOBODY: Final = 65534
MISSING: Final = "libslirp is missing ({}): install the Debian package libslirp0"


def _raw(address: str | IPv4Address) -> int:
    """Its bytes, in network order, as the number that lies in memory so."""
    return int.from_bytes(IPv4Address(address).packed, sys.byteorder)


def _give_up_what_is_not_needed(sockets_max: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (sockets_max, sockets_max))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Started by root it need not stay root; where there is nobody else (a small user namespace), it is no real root.
    with contextlib.suppress(OSError):
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _fail(reason: str) -> None:
    print(reason, flush=True)
    raise SystemExit(1)


def _enter(folder: str) -> None:
    """What is read by TFTP lies below this folder. Entered first: its parents need not be open to the later user."""
    try:
        os.chdir(folder)
    except OSError as error:
        _fail(f"tftp: {folder}: {os.strerror(error.errno or 0)}")


def _open(lib: Any, ffi: Any, setup: dict[str, Any], frames_fd: int, stop_fd: int) -> Any:
    network = IPv4Network(setup["network"])
    raw = ffi.new("struct usernet_setup *")
    raw.network, raw.netmask = _raw(network.network_address), _raw(network.netmask)
    for key in ("host", "dns", "dhcp_start"):
        setattr(raw, key, _raw(setup[key]))
    for key in ("mtu", "restricted", "host_loopback", "ipv6"):
        setattr(raw, key, int(setup[key]))
    raw.tftp = bool(setup["tftp"])
    raw.hostname, raw.bootfile = setup["hostname"].encode(), setup["bootfile"].encode()
    raw.frames_fd, raw.stop_fd = frames_fd, stop_fd
    net = lib.usernet_new(raw)
    if net == ffi.NULL:
        _fail(f"libslirp {ffi.string(lib.usernet_version()).decode()} refuses the network {network}")
    for forward in setup["forwards"]:
        udp, host, host_port, guest, guest_port = forward
        code = lib.usernet_forward(net, udp, _raw(host), host_port, _raw(guest), guest_port)
        if code < 0:
            _fail(f"forwards: {'udp' if udp else 'tcp'}:{host}:{host_port}: {os.strerror(-code)}")
    return net


def main() -> None:
    frames_fd = int(sys.argv[1])
    setup = json.loads(sys.stdin.readline())
    try:
        from virtio._usernet import ffi, lib
    except ImportError as error:
        _fail(MISSING.format(error))
    if setup["tftp"]:
        _enter(setup["tftp"])
    net = _open(lib, ffi, setup, frames_fd, sys.stdin.fileno())
    _give_up_what_is_not_needed(lib.USERNET_SOCKETS_MAX)
    if setup["tftp"] and not os.access(".", os.R_OK | os.X_OK):
        _fail(f"tftp: {setup['tftp']}: the user {_user()}, who serves it, may not read it")
    code = lib.usernet_confine()
    if code < 0:
        print(f"runs without a seccomp filter: {os.strerror(-code)}", file=sys.stderr, flush=True)
    print("ready", flush=True)
    code = lib.usernet_run(net)
    lib.usernet_free(net)
    if code < 0:
        _fail(os.strerror(-code))


if __name__ == "__main__":
    main()
