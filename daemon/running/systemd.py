"""What the daemon tells systemd, after sd_notify(3): a datagram of ``NAME=value`` lines to NOTIFY_SOCKET.

Without NOTIFY_SOCKET in the environment all of it does nothing.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping

import structlog
import trio


class Notifier:
    """The notification socket of the service manager; ``address`` "" means there is none."""

    def __init__(self, address: str) -> None:
        self._address = _address(address)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Notifier:
        return cls(environment.get("NOTIFY_SOCKET", ""))

    @property
    def active(self) -> bool:
        return self._address != ""

    def ready(self, status: str) -> None:
        """Every socket listens; also ends what ``reloading`` began."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1", "STATUS=stopping")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        """Send without waiting: a service manager that does not read must not stop the daemon."""
        if not self.active:
            return
        message = "\n".join(line.replace("\n", " ") for line in assignments)
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            ) as sender:
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            structlog.get_logger().warning("systemd was not notified", notification=assignments[0], error=str(error))


def watchdog_interval(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds between two signs of life, half of WATCHDOG_USEC (sd_watchdog_enabled(3)).

    ``math.inf`` when no watchdog is set, or when it is set for another process.
    """
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return math.inf
    try:
        usec = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return math.inf
    return usec / 2 / 1_000_000 if usec > 0 else math.inf


async def feed_watchdog(notifier: Notifier, interval: float) -> None:
    """Tell systemd every ``interval`` seconds that the event loop still turns; runs until cancelled."""
    while True:
        notifier.alive()
        await trio.sleep(interval)


def _address(name: str) -> str:
    """A leading @ stands for the NUL byte of an abstract address; anything else but a path is no Unix socket."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else ""
