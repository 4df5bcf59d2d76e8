"""What came out of a nursery, one reason at a time."""

from __future__ import annotations

from collections.abc import Iterator

from virtio.errors import HostError


def leaves(group: BaseExceptionGroup[HostError]) -> Iterator[HostError]:
    """The errors inside ``group``, however deep, each once."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
