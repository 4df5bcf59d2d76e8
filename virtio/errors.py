"""Whose fault an error is decides its class, and its class decides how far it reaches.

* ``GuestError``: the driver broke the virtio specification. That one queue is broken
  (DEVICE_NEEDS_RESET); everything else goes on.
* ``PeerError``: the front-end broke the vhost-user protocol. That one connection ends.
* ``HostError``: the host's own I/O or resources failed. That request gets the device's error status.
"""

from __future__ import annotations


class HyperbellError(Exception):
    """Base of every error this project raises on purpose."""


class GuestError(HyperbellError):
    """The driver broke the specification; breaks one queue.

    ``queue_index`` and ``head`` say where, ``gpa`` and ``length`` the offending address range,
    ``fault`` the numeric ``VQ_FAULT_*`` code of the data plane (0 when Python found the fault).
    """

    def __init__(
        self,
        message: str,
        *,
        queue_index: int = -1,
        head: int = -1,
        gpa: int = 0,
        length: int = 0,
        fault: int = 0,
    ) -> None:
        super().__init__(message)
        self.queue_index = queue_index
        self.head = head
        self.gpa = gpa
        self.length = length
        self.fault = fault


class PeerError(HyperbellError):
    """The front-end broke the protocol; ends one connection. ``request`` names the message.

    ``final``: the connection ends also where the front-end asked for a reply that could refuse the request, for the
    request is an attack or would cost others time if it were repeated.
    """

    def __init__(self, message: str, *, request: str = "", final: bool = False) -> None:
        super().__init__(f"{request}: {message}" if request else message)
        self.request = request
        self.final = final


class HostError(HyperbellError):
    """The host failed us (I/O, memory, permissions). ``errno`` is 0 when none applies."""

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class KeptFullError(HostError):
    """A descriptor to be signalled would hold whoever signals it, because the other side keeps it full."""
