"""The numbers of the hypercall doorbell, ABI version 1: guests out there rely on every one of them."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transports import hypercall

KEYS = st.integers(1, hypercall.NUMBER_MAX)
UUID = uuid.UUID("7b9b5a6e-3f0c-4b6e-9d52-0c3a6f1f2a11")


def test_bell_is_the_port_write_in_24_bits() -> None:
    assert hypercall.bell_number(0x1090, 0) == 0x109000
    assert hypercall.bell_number(0xC040, 255) == 0xC040FF


@pytest.mark.parametrize(
    ("port", "queue", "reason"),
    [
        (0xFF, 0, "not the notify port"),
        (0x10000, 0, "not the notify port"),
        (0x1000, 256, "has no bell"),
        (0x1000, -1, "has no bell"),
        (0xFFFF, 0xFF, "reserved"),
    ],
)
def test_what_has_no_bell_is_refused_with_its_reason(port: int, queue: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hypercall.bell_number(port, queue)


@given(KEYS, st.integers(0, hypercall.RESERVED_BELL - 1), st.integers(0, hypercall.RESERVED_BELL - 1))
def test_connection_ids_are_as_distinct_as_bells_and_give_the_bell_back(key: int, one: int, other: int) -> None:
    ids = hypercall.connection_id(one, key), hypercall.connection_id(other, key)
    assert (ids[0] == ids[1]) == (one == other)
    assert ids[0] ^ key == one
    assert 0 <= ids[0] <= hypercall.NUMBER_MAX


@pytest.mark.parametrize("key", [0, -1, 1 << 24])
def test_a_key_that_no_vm_can_have_is_refused(key: int) -> None:
    with pytest.raises(ValueError, match="is not between"):
        hypercall.connection_id(0x109000, key)


def test_the_reserved_bell_has_no_id() -> None:
    with pytest.raises(ValueError, match="not a bell number"):
        hypercall.connection_id(hypercall.RESERVED_BELL, 5)


def test_key_is_the_same_on_every_host_that_has_the_secret() -> None:
    # Written down: a VM that migrates between two versions of this program must keep its key.
    assert hypercall.derive_key(b"secret", UUID) == 0x79650F
    assert hypercall.derive_key(b"secret", UUID) != hypercall.derive_key(b"Secret", UUID)
    assert hypercall.derive_key(b"secret", UUID) != hypercall.derive_key(b"secret", uuid.UUID(int=1))


@given(st.binary(max_size=40), st.uuids())
def test_derived_keys_can_be_a_vms(secret: bytes, identity: uuid.UUID) -> None:
    key = hypercall.derive_key(secret, identity)
    assert hypercall.check_key(key) == key


@pytest.mark.parametrize(
    ("policy", "nests", "offered"),
    [
        ("offer", False, True),
        ("offer", True, True),
        ("withhold", False, False),
        ("withhold", True, False),
        ("auto", False, True),
        ("auto", True, False),
    ],
)
def test_auto_withholds_from_a_guest_that_can_itself_be_a_hypervisor(
    policy: hypercall.Policy, nests: bool, offered: bool
) -> None:
    assert hypercall.offers(policy, guest_may_nest=nests) is offered


def test_platform_leaf_is_what_drivers_look_for() -> None:
    first, second = hypercall.platform_leaves(0x40000200, 0xABCDEF, offered=True)
    assert (first.function, first.eax) == (0x40000200, 0x40000201)
    assert b"".join(word.to_bytes(4, "little") for word in (first.ebx, first.ecx, first.edx)) == b"HyperBellVMM"
    assert (second.function, second.eax, second.ebx, second.ecx) == (0x40000201, 1, 0xABCDEF, 1)
    withheld = hypercall.platform_leaves(0x40000200, 0xABCDEF, offered=False)[1]
    assert withheld.ecx == 0
