"""What the specification says of features together: which one requires which, and which is always offered.

By their names in the specification, which no two types of devices share.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

ALWAYS_OFFERED: Final = {
    "VIRTIO_F_VERSION_1": "without it this would be a legacy device (virtio 1.3, 6.1)",
    "VIRTIO_I2C_F_ZERO_LENGTH_REQUEST": "an I2C device must offer it (virtio 1.3, 5.21.6.4)",
}
"""Features that are not to be turned off, and why."""

_CSUM: Final = ("VIRTIO_NET_F_CSUM",)
_GUEST_CSUM: Final = ("VIRTIO_NET_F_GUEST_CSUM",)
_CTRL_VQ: Final = ("VIRTIO_NET_F_CTRL_VQ",)

REQUIREMENTS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    # 5.1.3.1
    ("VIRTIO_NET_F_GUEST_TSO4", _GUEST_CSUM),
    ("VIRTIO_NET_F_GUEST_TSO6", _GUEST_CSUM),
    ("VIRTIO_NET_F_GUEST_ECN", ("VIRTIO_NET_F_GUEST_TSO4", "VIRTIO_NET_F_GUEST_TSO6")),
    ("VIRTIO_NET_F_GUEST_USO4", _GUEST_CSUM),
    ("VIRTIO_NET_F_GUEST_USO6", _GUEST_CSUM),
    ("VIRTIO_NET_F_HOST_TSO4", _CSUM),
    ("VIRTIO_NET_F_HOST_TSO6", _CSUM),
    ("VIRTIO_NET_F_HOST_ECN", ("VIRTIO_NET_F_HOST_TSO4", "VIRTIO_NET_F_HOST_TSO6")),
    ("VIRTIO_NET_F_HOST_USO", _CSUM),
    ("VIRTIO_NET_F_CTRL_RX", _CTRL_VQ),
    ("VIRTIO_NET_F_GUEST_ANNOUNCE", _CTRL_VQ),
    ("VIRTIO_NET_F_MQ", _CTRL_VQ),
    ("VIRTIO_NET_F_CTRL_MAC_ADDR", _CTRL_VQ),
    # 5.1.4: the field in which an announcement is asked for is only there with this.
    ("VIRTIO_NET_F_GUEST_ANNOUNCE", ("VIRTIO_NET_F_STATUS",)),
    # 5.2.5.2
    ("VIRTIO_BLK_F_CONFIG_WCE", ("VIRTIO_BLK_F_FLUSH",)),
)
"""A feature, and those of which it requires one. No other type that we have says such a thing: of vsock, SEQPACKET is
offered without STREAM as well as with it (5.10.3)."""


def left_out(off: Collection[str], offered: Collection[str]) -> frozenset[str]:
    """What else of ``offered`` cannot be offered when ``off`` is not: a device must not offer a feature without the
    one that it requires (2.2.2)."""
    gone = set(off)
    before = -1
    while len(gone) != before:
        before = len(gone)
        gone |= {name for name, one_of in REQUIREMENTS if gone.issuperset(one_of)}
    return frozenset((gone & set(offered)) - set(off))
