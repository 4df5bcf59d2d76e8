"""What only some devices have, each as one thing that ``virtio.device.Device`` shows or does not.

Called by the backend and by the daemon on the event loop, one call at a time, unless a method says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from virtio.native.stats import Lost, Storage


class NetworkPort(ABC):
    """Of a network interface."""

    @property
    @abstractmethod
    def link_up(self) -> bool:
        """Whether its cable is plugged in. Any thread."""

    @abstractmethod
    def set_link(self, up: bool) -> bool:
        """An operator plugs the cable in or out, and the driver is told; False: it was so already. ``HostError``."""

    @abstractmethod
    def set_mtu(self, mtu: int) -> None:
        """The front-end says which MTU the guest is told. ``PeerError``: it is not possible."""

    @abstractmethod
    def prepare_announcement(self, address: bytes) -> None:
        """The guest has moved here: the port's worker, which is nudged next, is to tell the network of ``address``."""

    @abstractmethod
    def mute(self, queue_index: int, on: bool) -> bool:
        """A queue that runs is disabled (or no more): what the driver makes available is used without any effect.

        False: it is not, and the queue stops. Its worker is nudged afterwards.
        """

    @abstractmethod
    def lost(self) -> tuple[Lost, ...]:
        """Frames that did not arrive, by reason. Any thread."""


class DiskStorage(ABC):
    """Of a disk."""

    @abstractmethod
    def storage(self) -> Storage | None:
        """What the storage answered; None: there is nothing that could fail. Any thread."""

    @abstractmethod
    def inherit_storage(self, before: Storage) -> None:
        """What the storage answered to the device that had its name before; called before the first queue runs."""

    @abstractmethod
    def reopening(self) -> Callable[[], None]:
        """What opens the image again, to be called in a thread beside requests. ``HostError``, also when called."""

    @abstractmethod
    def retry_storage(self) -> bool:
        """Try again the requests that the disk keeps; False: it keeps none. ``HostError``: there is no storage."""
