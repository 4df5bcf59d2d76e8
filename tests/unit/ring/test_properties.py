"""Random lives of a ring: every buffer comes back once, with the right content, wherever the ring stands."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kit.ring.device import FORMATS, Popped, RingDevice, make_driver, region_of

from virtio.native.memory import MemoryTable
from virtio.testing.driver import GuestMemory, RingFullError, VirtqueueDriver

SIZES = st.lists(st.integers(1, 40), max_size=4)


class RingLife(RuleBasedStateMachine):
    """A driver and a device on one ring, and a model: what was added, what the device has, what is to come back."""

    ring = ""

    @initialize(
        size=st.sampled_from([1, 2, 4, 8, 16, 3, 5, 11]),
        start=st.integers(0, 65535),
        wrap=st.booleans(),
        event_idx=st.booleans(),
    )
    def begin(self, size: int, start: int, wrap: bool, event_idx: bool) -> None:
        if self.ring == "split":
            size = 1 << size.bit_length() - 1
        else:
            start %= size
        self.stack = ExitStack()
        self.memory = self.stack.enter_context(GuestMemory(1 << 17))
        self.driver: VirtqueueDriver = make_driver(
            self.ring, self.memory, size, event_idx=event_idx, start=start, wrap=wrap
        )
        self.device = RingDevice(self.driver)
        self.stack.callback(lambda: self.device.close())
        self.added: dict[int, tuple[bytes, list[int]]] = {}  # by token: readable content, writable sizes
        self.waiting: list[int] = []  # tokens in the order the device must find them
        self.popped: list[int] = []  # every one, ever
        self.held: list[tuple[int, Popped]] = []
        self.returned: list[tuple[int, bytes]] = []  # tokens and what was written, in the order of their return
        self.serial = 0

    @rule(readable=SIZES, writable=SIZES, indirect=st.booleans(), publish=st.booleans())
    def add(self, readable: list[int], writable: list[int], indirect: bool, publish: bool) -> None:
        if not readable and not writable:
            return
        self.serial += 1
        pieces = [bytes((self.serial + i + k) % 256 for k in range(n)) for i, n in enumerate(readable)]
        try:
            token = self.driver.add(pieces, writable, indirect=indirect, publish=publish)
        except RingFullError:
            return
        self.added[token] = (b"".join(pieces), writable)
        self.waiting.append(token)

    @rule(limit=st.integers(1, 5))
    def pop(self, limit: int) -> None:
        self.driver.publish()
        popped = self.device.pop(limit)
        assert len(popped) == min(limit, len(self.waiting))
        for chain in popped:
            token = self.waiting.pop(0)
            content, writable = self.added[token]
            assert (chain.data, chain.room) == (content, sum(writable))
            self.popped.append(token)
            self.held.append((token, chain))

    @precondition(lambda self: self.held)
    @rule(order=st.permutations(range(5)), count=st.integers(1, 5), length=st.integers(0, 200))
    def push(self, order: Sequence[int], count: int, length: int) -> None:
        picked = [self.held[i] for i in order if i < len(self.held)][:count]
        done = []
        for token, chain in picked:
            self.held.remove((token, chain))
            answer = bytes((token + k) % 256 for k in range(min(length, chain.room)))
            done.append((chain, answer))
            self.returned.append((token, answer))
        self.device.push(*done)

    @precondition(lambda self: self.held)
    @rule(count=st.integers(1, 3))
    def rewind(self, count: int) -> None:
        """Un-pop the youngest, as long as nothing that is younger went back already."""
        last = self.held[-count:]
        tokens = [token for token, _ in last]
        if tokens != self.popped[-len(last) :]:
            return
        del self.popped[-len(last) :]
        self.device.vq.rewind([chain.pointer for _, chain in last])
        self.held = self.held[: -len(last)]
        self.waiting = tokens + self.waiting

    @rule()
    def collect(self) -> None:
        for (token, answer), used in zip(self.returned, self.driver.used(), strict=True):
            _, writable = self.added.pop(token)
            assert (used.token, used.written) == (token, len(answer))
            assert b"".join(used.buffers) == answer + bytes(sum(writable) - len(answer))
        self.returned.clear()

    @precondition(lambda self: not self.held)
    @rule(how=st.sampled_from(["same", "another device"]))
    def stop_and_start(self, how: str) -> None:
        base = self.device.vq.base
        if how == "another device":
            self.device.close()
            self.device = RingDevice(self.driver, base=base)
        else:
            self.device.start(base)
        assert self.device.vq.base == base

    @rule()
    def change_memory(self) -> None:
        half = self.memory.size // 2
        if self.driver.used_area + 4096 > self.memory.gpa + half:
            return
        regions = [region_of(self.memory, size=half), region_of(self.memory, offset=half)]
        before, self.device.table = self.device.table, MemoryTable(regions)
        self.device.vq.set_memory(self.device.table)
        for region in before.mappings:
            region.fd.close()

    @rule()
    def sleep_and_wake(self) -> None:
        self.driver.publish()
        assert self.device.vq.arm() == (not self.waiting)
        self.device.vq.disarm()

    @invariant()
    def nothing_is_broken(self) -> None:
        if hasattr(self, "device"):
            assert self.device.fault == 0

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.device.drop(*(chain for _, chain in self.held))
            self.stack.close()


@pytest.mark.parametrize("ring", FORMATS)
def test_every_buffer_comes_back_once_with_the_right_content(ring: str) -> None:
    machine = type(f"RingLife_{ring}", (RingLife,), {"ring": ring})
    run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=60, deadline=None))
