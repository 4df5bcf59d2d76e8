"""Who may ring by hypercall: each device's policy, which an operator may change while the daemon runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, get_args

from transports.hypercall import Policy
from virtio.errors import HostError

POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)


class Policies:
    """The policy of every device now. Whoever gives devices to guests takes each change, and at first what is."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._policies: dict[str, Policy] = dict(policies)
        self._takers: list[Callable[[str, Policy], None]] = []

    @property
    def current(self) -> Mapping[str, Policy]:
        """By device, a copy."""
        return dict(self._policies)

    def tell(self, take: Callable[[str, Policy], None]) -> None:
        """Call ``take`` with every device and its policy, now and whenever one changes."""
        self.tell_changes(take)
        for device, policy in self._policies.items():
            take(device, policy)

    def tell_changes(self, take: Callable[[str, Policy], None]) -> None:
        """Call ``take`` whenever a device's policy is set, to another one or, to try once more, to the same."""
        self._takers.append(take)

    def set(self, device: str, policy: Policy) -> bool:
        """Put ``policy`` into effect; whether it is another one. ``HostError``: there is no such device."""
        if device not in self._policies:
            raise HostError(f"there is no device {device!r}; there are: {', '.join(self._policies)}")
        changed = self._policies[device] != policy
        self._policies[device] = policy
        for take in self._takers:
            take(device, policy)
        return changed
