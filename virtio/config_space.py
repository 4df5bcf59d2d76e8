"""Config space layouts (section 2.5): little-endian structs, built by construct, never on a request's way."""

from __future__ import annotations

from construct import Bytes, GreedyBytes, Int8ul, Int16ul, Int32sl, Int32ul, Int64ul, Padded, Padding, Struct

VIRTIO_BLK_CONFIG = Struct(
    "capacity" / Int64ul,  # in 512-byte sectors
    "size_max" / Int32ul,
    "seg_max" / Int32ul,
    "cylinders" / Int16ul,
    "heads" / Int8ul,
    "sectors" / Int8ul,
    "blk_size" / Int32ul,
    "physical_block_exp" / Int8ul,
    "alignment_offset" / Int8ul,
    "min_io_size" / Int16ul,  # in logical blocks
    "opt_io_size" / Int32ul,
    "writeback" / Int8ul,
    Padding(1),
    "num_queues" / Int16ul,
    "max_discard_sectors" / Int32ul,
    "max_discard_seg" / Int32ul,
    "discard_sector_alignment" / Int32ul,
    "max_write_zeroes_sectors" / Int32ul,
    "max_write_zeroes_seg" / Int32ul,
    "write_zeroes_may_unmap" / Int8ul,
    Padding(3),
)
"""Section 5.2.4, struct virtio_blk_config up to write zeroes: 60 bytes."""

VIRTIO_BLK_CONFIG_WRITEBACK = 32
"""Offset of ``writeback``, the one byte of it that the driver may write (with VIRTIO_BLK_F_CONFIG_WCE)."""

VIRTIO_CONSOLE_CONFIG = Struct(
    "cols" / Int16ul,
    "rows" / Int16ul,
    "max_nr_ports" / Int32ul,
    "emerg_wr" / Int32ul,
)
"""Section 5.3.4, struct virtio_console_config."""

VIRTIO_NET_CONFIG = Struct(
    "mac" / Bytes(6),
    "status" / Int16ul,
    "max_virtqueue_pairs" / Int16ul,
    "mtu" / Int16ul,
)
"""Section 5.1.4, struct virtio_net_config up to mtu: what comes after belongs to features that are not offered."""

VIRTIO_GPIO_CONFIG = Struct("ngpio" / Int16ul, Padding(2), "gpio_names_size" / Int32ul)
"""Section 5.18.4, struct virtio_gpio_config."""

VIRTIO_INPUT_ABSINFO = Struct("min" / Int32sl, "max" / Int32sl, "fuzz" / Int32sl, "flat" / Int32sl, "res" / Int32sl)
VIRTIO_INPUT_DEVIDS = Struct("bustype" / Int16ul, "vendor" / Int16ul, "product" / Int16ul, "version" / Int16ul)
VIRTIO_INPUT_CONFIG = Struct(
    "select" / Int8ul,
    "subsel" / Int8ul,
    "size" / Int8ul,
    Padding(5),
    "u" / Padded(128, GreedyBytes),
)
"""Section 5.8.4, struct virtio_input_config; ``u`` is a string, a bitmap, or one of the two structs before."""
VIRTIO_VSOCK_CONFIG = Struct("guest_cid" / Int64ul)
"""Section 5.10.4, struct virtio_vsock_config."""
