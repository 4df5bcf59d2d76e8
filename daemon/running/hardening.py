"""What the process gives up by itself, whoever starts it: systemd's unit does the same and more.

To be called in the main thread before any other is started, for threads and programs that are started later inherit
what the thread that starts them has.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

import structlog

from virtio.errors import HostError

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x2008_0522  # linux/capability.h

KEPT: Final = {
    0: "chown: a socket is given to the group that may connect",
    1: "dac_override: root's images and sockets lie in folders of others; devices are opened again after a failure",
    2: "dac_read_search: likewise",
    3: "fowner: a socket's permissions",
    5: "kill: programs that we started",
    6: "setgid: the process of a user network becomes nobody",
    7: "setuid: likewise",
    8: "setpcap: that process gives up what it inherits",
    10: "net_bind_service: forwards of ports below 1024",
    12: "net_admin: taps are made and opened again",
    14: "ipc_lock: buffers that io_uring registers",
    23: "sys_nice: a worker's processors and priority",
    24: "sys_resource: locked memory of older kernels",
}
"""The capabilities that stay, by their numbers, where the daemon is started with them; all others are dropped."""


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def harden() -> None:
    """No core dump and no debugger of the same user sees guests' memory; no program that we start gains privileges;
    capabilities that nothing here needs are gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0) < 0:
            _tell("prctl")
    try:
        _drop_capabilities(libc)
    except HostError as error:  # such as in a container that forbids even this
        structlog.get_logger().warning("capabilities cannot be dropped", error=str(error))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header, sets = _Header(_CAPABILITY_VERSION_3, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets) < 0:
        raise HostError(f"capget: {os.strerror(ctypes.get_errno())}")
    number = 0
    # The bounding set first, which takes CAP_SETPCAP: what is not in it is not gained by starting a program as root.
    while sets[0].effective & 1 << 8 and libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in KEPT and libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            raise HostError(f"capability {number}: {os.strerror(ctypes.get_errno())}")
        number += 1
    kept = sum(1 << number for number in KEPT)
    for index, each in enumerate(sets):
        mask = kept >> 32 * index & 0xFFFF_FFFF
        each.effective &= mask
        each.permitted &= mask
        each.inheritable &= mask
    if libc.capset(ctypes.byref(header), sets) < 0:
        raise HostError(f"capset: {os.strerror(ctypes.get_errno())}")


def _tell(what: str) -> None:
    structlog.get_logger().warning("cannot be hardened", call=what, error=os.strerror(ctypes.get_errno()))
