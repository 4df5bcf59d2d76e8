"""What one connection knows of each ring: its parameters and its states.

"Ring states": a ring is stopped or started, and disabled or enabled. A stopped ring is not
processed at all, whether enabled or not; its enabled state is tracked all the same.
Checks of what lies in guest memory are the back-end's; here are the front-end's own mistakes.

Size, addresses, base and kick come in any order. The back-end gets a ring (it is *configured*) once it is kicked and
whole. A ring that the back-end has is never moved while requests are under way: what changes it also *suspends* it, so
the back-end drains it and lets go of it, but for its descriptors. Then the ring is *held* until the front-end says go:
by a kick, by enabling it, or, while it is enabled, when it has said size, addresses and base, all of them. A ring whose
kick came first is held for the same.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from virtio.errors import PeerError
from virtio.waist import PACKED_BASE_INITIAL, AddressSpace, QueueSetup


class Parameter(enum.Flag):
    """What a front-end says of a ring before the ring can be read."""

    SIZE = enum.auto()
    ADDRESSES = enum.auto()
    BASE = enum.auto()


_NOTHING = Parameter(0)
_EVERYTHING = Parameter.SIZE | Parameter.ADDRESSES | Parameter.BASE


@dataclass(slots=True)
class Vring:
    """One ring as the front-end set it up. ``addresses`` is (desc, avail, used).

    ``said``: since its last go. ``refused``: the back-end could not have it as it is.
    """

    index: int
    size: int | None = None
    addresses: tuple[int, int, int] | None = None
    base: int | None = None
    started: bool = False
    enabled: bool = False
    configured: bool = False
    held: bool = False
    refused: bool = False
    said: Parameter = _NOTHING
    has_call: bool = False
    has_err: bool = False

    # --- what the front-end says ---

    def say(self, what: Parameter, *, suspended: bool) -> None:
        """``what`` was said. ``suspended``: the back-end has let go of the ring for it."""
        if suspended:
            # A base alone is a whole ring; a size or an address may be the first of several changes.
            self.suspend(held=not (what is Parameter.BASE and self.enabled))
        if self.configured:
            return
        self.refused = False
        self.said |= what
        self._go_if_all_is_said()

    def kick(self) -> None:
        self.started = True
        self.refused = False
        self._go()

    def enable(self, on: bool) -> None:
        self.enabled = on
        if on:
            self._go()

    def start_enabled(self) -> None:
        """Enabled by the features, which say nothing of this ring."""
        self.enabled = True
        self._go_if_all_is_said()

    def _go_if_all_is_said(self) -> None:
        if self.enabled and self.said == _EVERYTHING:
            self._go()

    def _go(self) -> None:
        self.held = self.refused or (self.started and (self.size is None or self.addresses is None))
        if self.started and not self.held:
            self.said = _NOTHING

    # --- what the back-end does ---

    def suspend(self, *, held: bool) -> None:
        """The back-end has let go of the ring: it starts again, at the latest when the front-end says go."""
        self.configured = False
        self.held = self.held or held

    def refuse(self) -> None:
        """The back-end cannot have it: it is held until the front-end says something else of it, or kicks."""
        self.held = self.refused = True

    def stop(self, base: int | None) -> None:
        """``base``: where it stood; None if the back-end did not have it."""
        self.started = self.configured = self.held = self.refused = False
        self.said = _NOTHING
        if base is not None:
            self.base = base

    def reset(self) -> None:
        """Stopped, disabled, without parameters. Call and err fds are the front-end's and stay."""
        self.stop(None)
        self.size = self.addresses = self.base = None
        self.enabled = False

    # --- what it is ---

    @property
    def wants_back_end(self) -> bool:
        """Kicked and whole, as far as the ring itself goes, and not yet (or no more) at the back-end."""
        complete = self.size is not None and self.addresses is not None
        return self.started and complete and not self.configured and not self.held

    def setup(self, *, packed: bool, space: AddressSpace) -> QueueSetup:
        """Everything the ring needs to start; ``PeerError`` if there is no such ring."""
        assert self.size is not None
        assert self.addresses is not None
        if not packed and self.size & (self.size - 1):
            raise PeerError(f"queue {self.index}: size {self.size} is not a power of two (virtio 1.3, section 2.7)")
        base = self.current_base(packed=packed)
        if packed and max(base & 0x7FFF, base >> 16 & 0x7FFF) >= self.size:
            raise PeerError(f"queue {self.index}: base {base:#x} points outside a ring of {self.size} entries")
        if not packed and base > 0xFFFF:
            raise PeerError(f"queue {self.index}: base {base:#x} is no split ring's base")
        desc, avail, used = self.addresses
        return QueueSetup(self.size, desc, avail, used, base, space)

    def current_base(self, *, packed: bool) -> int:
        if self.base is None:
            return PACKED_BASE_INITIAL if packed else 0
        return self.base
