"""Plays a front-end's conversation (``conversation_file``) against a served device, and its guest on the rings.

Each reply is checked: what is offered, what a ring's base is, how long the config space is. A request that fails, and
a connection that ends before the file hangs up, fail the test with the line of the file.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import kit.front_end.vhost_user_wire as wire
import trio
from kit.conversation.devices import Machine, Proof
from kit.conversation.file import Conversation, EachRing, Step
from kit.front_end.frontend import PACKED_START
from kit.front_end.vhost_user_wire import u64, vring_state

from virtio.testing.driver import GuestMemory, PackedDriver, SplitDriver, VirtqueueDriver
from virtio.testing.queue import GUARD, GuestQueue

NUMBERS: Final = {
    "GET_FEATURES": 1,
    "SET_FEATURES": 2,
    "SET_OWNER": 3,
    "RESET_OWNER": 4,
    "SET_MEM_TABLE": 5,
    "SET_VRING_NUM": 8,
    "SET_VRING_ADDR": 9,
    "SET_VRING_BASE": 10,
    "GET_VRING_BASE": 11,
    "SET_VRING_KICK": 12,
    "SET_VRING_CALL": 13,
    "SET_VRING_ERR": 14,
    "GET_PROTOCOL_FEATURES": 15,
    "SET_PROTOCOL_FEATURES": 16,
    "GET_QUEUE_NUM": 17,
    "SET_VRING_ENABLE": 18,
    "SET_BACKEND_REQ_FD": 21,
    "GET_CONFIG": 24,
    "SET_CONFIG": 25,
    "RESET_DEVICE": 34,
    "GET_MAX_MEM_SLOTS": 36,
    "ADD_MEM_REG": 37,
    "REM_MEM_REG": 38,
    "SET_STATUS": 39,
    "GET_STATUS": 40,
}
PROTOCOL: Final = {
    "MQ": 0,
    "LOG_SHMFD": 1,
    "RARP": 2,
    "REPLY_ACK": 3,
    "NET_MTU": 4,
    "BACKEND_REQ": 5,
    "CROSS_ENDIAN": 6,
    "CRYPTO_SESSION": 7,
    "PAGEFAULT": 8,
    "CONFIG": 9,
    "BACKEND_SEND_FD": 10,
    "HOST_NOTIFIER": 11,
    "INFLIGHT_SHMFD": 12,
    "RESET_DEVICE": 13,
    "INBAND_NOTIFICATIONS": 14,
    "CONFIGURE_MEM_SLOTS": 15,
    "STATUS": 16,
    "XEN_MMAP": 17,
    "SHARED_OBJECT": 18,
    "DEVICE_STATE": 19,
    "GET_VRING_BASE_INFLIGHT": 20,
    "GPA_ADDRESSES": 21,
    "SHMEM": 22,
}
F_LOG_ALL, F_EVENT_IDX, F_PROTOCOL_FEATURES, F_VERSION_1 = 26, 29, 30, 32
F_ACCESS_PLATFORM, F_RING_PACKED, F_RING_RESET = 33, 34, 40
MEMORY: Final = 64 << 20


def bits_of(text: str) -> int:
    """``"0-3 9"`` as a mask; ``"all"`` is every bit."""
    mask = 0
    for word in text.split():
        first, _, last = word.partition("-")
        mask |= (1 << 64) - 1 if word == "all" else sum(1 << n for n in range(int(first), int(last or first) + 1))
    return mask


class Wires:
    """The descriptors of one ring. They are the front-end's: it may name them before a driver has laid the ring."""

    def __init__(self, stream: bool) -> None:
        self.kick, self.err = wire.eventfd(), wire.eventfd()
        if stream:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            self.call, self.given_call = ours.detach(), theirs.detach()
        else:
            self.call = wire.eventfd()
            self.given_call = os.dup(self.call)

    def close(self) -> None:
        for fd in (self.kick, self.err, self.call, self.given_call):
            os.close(fd)


class WiredQueue(GuestQueue):
    """A driver's ring on descriptors that outlive it."""

    def __init__(self, index: int, driver: VirtqueueDriver, wires: Wires) -> None:
        self.index, self.driver = index, driver
        self.kick_fd, self.call_fd, self.err_fd = wires.kick, wires.call, wires.err

    def close(self) -> None:
        """The descriptors are not the ring's."""

    async def interrupt(self) -> None:
        with trio.fail_after(GUARD):
            await trio.lowlevel.wait_readable(self.call_fd)
        with contextlib.suppress(BlockingIOError):
            assert len(os.read(self.call_fd, 4096)) % 8 == 0


class Player:
    """One front-end with its guest, before one device."""

    def __init__(self, conversation: Conversation, device_type: str, path: Path, proof: Proof) -> None:
        self.conversation = conversation
        self.device_type = device_type
        self.path = path
        self.proof = proof
        self.memory = GuestMemory(MEMORY, uva=int(self._key("uva", "0x7f0000000000"), 0))
        self.machine = Machine(self.memory)
        self.offered = self.protocol_offered = self.protocol = 0
        self.queue_count = 0
        self.bases: dict[int, int] = {}
        self._wires: dict[int, Wires] = {}
        self._front_end: wire.FrontEnd | None = None
        self._channel: socket.socket | None = None
        self._listening: trio.socket.SocketType | None = None

    def _key(self, name: str, default: str = "") -> str:
        return self.conversation.key(name, self.device_type, default)

    def close(self) -> None:
        self._hang_up()
        for each in self._wires.values():
            each.close()
        if self._listening is not None:
            self._listening.close()
            self.path.unlink()
        self.machine.forget()
        self.memory.close()

    def _hang_up(self) -> None:
        if self._front_end is not None:
            self._front_end.close()
        if self._channel is not None:
            self._channel.close()
        self._front_end = self._channel = None
        self.protocol = 0

    async def live(self) -> None:
        """The whole life of the file."""
        for part in self.conversation.life(self.device_type):
            if part == "hangup":
                self._hang_up()
            elif part == "probe":
                await self._settled()
                self._probe()
            elif part == "use":
                await self._settled()
                await self._use()
            else:
                await self._play(part)

    async def _settled(self) -> None:
        """What was said is done. Not every front-end waits for answers, but their guests are slower than this one."""
        front_end = await self._connected()
        with trio.fail_after(GUARD):
            await front_end.ask(NUMBERS["GET_FEATURES"])

    # --- the guest ---

    @property
    def features(self) -> int:
        """What the guest's driver accepts: all that it is shown."""
        return self.offered & bits_of(self._key("passes", "all")) & ~(1 << F_PROTOCOL_FEATURES)

    def _probe(self) -> None:
        """A driver begins: it lays its rings."""
        self.machine.forget()
        self.bases.clear()
        self.machine.features = self.features
        packed = self.features >> F_RING_PACKED & 1
        make = PackedDriver if packed else SplitDriver
        for index in range(self._ring_count()):
            size = int(self._key("ring-size", "256"))
            driver = make(self.memory, size, event_idx=bool(self.features >> F_EVENT_IDX & 1))
            self.machine.queues.append(WiredQueue(index, driver, self._wires_of(index)))

    def _wires_of(self, ring: int | None) -> Wires:
        assert ring is not None, "stands outside of each ring"
        if ring not in self._wires:
            self._wires[ring] = Wires(stream=self._key("calls") == "stream")
        return self._wires[ring]

    def _ring_count(self) -> int:
        wanted = self._key("rings", "all")
        return self.queue_count if wanted == "all" else int(wanted)

    async def _use(self) -> None:
        try:
            await self.proof.use(self.machine)
        except trio.TooSlowError:
            raise AssertionError(f"{self.conversation.name}: the {self.device_type} device does not serve") from None

    # --- the front-end ---

    async def _play(self, section: str) -> None:
        facts = {self.device_type}
        for entry in self.conversation.sections[section]:
            facts |= {name for name, bit in PROTOCOL.items() if self.protocol >> bit & 1}
            if isinstance(entry, EachRing):
                for ring in entry.order(self._ring_count()):
                    for step in entry.steps:
                        if step.applies(facts):
                            await self._step(section, step, ring)
            elif entry.applies(facts):
                await self._step(section, entry, None)

    async def _step(self, section: str, step: Step, ring: int | None) -> None:
        place = f"{self.conversation.name}, line {step.line}: {step.name} of [{section}] for {self.device_type}"
        if ring is not None:
            place += f", ring {ring}"
        try:
            with trio.fail_after(GUARD):
                await _STEPS.get(step.name, Player._plain)(self, step, ring)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{place}: {error}") from error
        except trio.TooSlowError:
            raise AssertionError(f"{place}: no answer") from None

    async def _connected(self) -> wire.FrontEnd:
        if self._front_end is None:
            self._front_end = await (self._accept() if self._key("listens") else wire.FrontEnd.connect(self.path))
        return self._front_end

    async def _accept(self) -> wire.FrontEnd:
        """The back-end's connection, which it tries to make again and again."""
        if self._listening is None:
            self._listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            await self._listening.bind(str(self.path))
            self._listening.listen(1)
        with trio.fail_after(GUARD):
            sock, _ = await self._listening.accept()
        return wire.FrontEnd(sock)

    async def _send(self, step: Step, payload: bytes = b"", fds: tuple[int, ...] = (), agreed: int = 0) -> None:
        """The message, and its status where the front-end asks for one. Descriptors stay ours."""
        mode = self._key("need-reply", "marked")
        can = bool((self.protocol | agreed) >> PROTOCOL["REPLY_ACK"] & 1)
        need_reply = mode == "always" or (can and (mode == "agreed" or step.need_reply))
        front_end = await self._connected()
        duplicates = [os.dup(fd) for fd in fds]
        await front_end.send(wire.message(NUMBERS[step.name], payload, need_reply=need_reply), duplicates)
        if need_reply and can and not step.name.startswith("GET_"):
            status = self._reply(step, await front_end.receive())
            assert status == u64(0), f"was refused with {status.hex()}"

    @staticmethod
    def _reply(step: Step, answer: tuple[int, bytes]) -> bytes:
        assert answer[0] == NUMBERS[step.name], f"was answered by request {answer[0]}"
        return answer[1]

    async def _ask(self, step: Step, payload: bytes = b"") -> bytes:
        await self._send(step, payload)
        return self._reply(step, await (await self._connected()).receive())

    async def _ask_u64(self, step: Step) -> int:
        answer = await self._ask(step)
        assert len(answer) == 8, f"was answered with {len(answer)} bytes"
        return int.from_bytes(answer, "little")

    # --- messages, by name ---

    async def _plain(self, step: Step, ring: int | None) -> None:
        assert not step.words, "takes no words"
        await self._send(step)

    async def _get_features(self, step: Step, ring: int | None) -> None:
        self.offered = await self._ask_u64(step)
        for bit in (F_VERSION_1, F_PROTOCOL_FEATURES):
            assert self.offered >> bit & 1, f"feature bit {bit} is not offered"
        for bit in (F_LOG_ALL, F_ACCESS_PLATFORM, F_RING_RESET):
            assert not self.offered >> bit & 1, f"feature bit {bit} is offered, which this front-end cannot honour"

    async def _set_features(self, step: Step, ring: int | None) -> None:
        await self._send(step, u64(self.features | 1 << F_PROTOCOL_FEATURES))

    async def _get_protocol_features(self, step: Step, ring: int | None) -> None:
        """Words: what the front-end cannot do without."""
        self.protocol_offered = await self._ask_u64(step)
        for name in step.words:
            assert self.protocol_offered >> PROTOCOL[name] & 1, f"{name} is not offered"

    async def _set_protocol_features(self, step: Step, ring: int | None) -> None:
        """The words of the key ``protocol`` that are offered."""
        wanted = sum(1 << PROTOCOL[name] for name in self._key("protocol").split())
        await self._send(step, u64(agreed := wanted & self.protocol_offered), agreed=agreed)
        self.protocol = agreed

    async def _get_queue_num(self, step: Step, ring: int | None) -> None:
        self.queue_count = await self._ask_u64(step)
        assert self.queue_count == self.proof.queues

    async def _set_mem_table(self, step: Step, ring: int | None) -> None:
        """``room N``: the payload has room for N regions, though only one is announced."""
        here = wire.region(self.memory.gpa, self.memory.size, self.memory.uva)
        room = int(step.words[1]) if step.words else 1
        await self._send(step, wire.mem_table(here, *[bytes(32)] * (room - 1), count=1), (self.memory.fd,))

    async def _add_mem_reg(self, step: Step, ring: int | None) -> None:
        here = wire.single_region(self.memory.gpa, self.memory.size, self.memory.uva)
        await self._send(step, here, (self.memory.fd,) if step.name == "ADD_MEM_REG" else ())

    async def _get_max_mem_slots(self, step: Step, ring: int | None) -> None:
        assert await self._ask_u64(step) >= 8

    async def _get_config(self, step: Step, ring: int | None) -> None:
        """OFFSET SIZE FLAGS."""
        offset, size, flags = map(int, step.words)
        answer = await self._ask(step, wire.config(offset, bytes(size), flags=flags))
        assert len(answer) == 12 + size, f"was answered with {len(answer)} bytes instead of {12 + size}"
        assert struct.unpack_from("=II", answer) == (offset, size)
        self.proof.check_config(offset, answer[12:])

    async def _set_config(self, step: Step, ring: int | None) -> None:
        """OFFSET FLAGS BYTES in hexadecimal."""
        await self._send(step, wire.config(int(step.words[0]), bytes.fromhex(step.words[2]), flags=int(step.words[1])))

    async def _set_backend_req_fd(self, step: Step, ring: int | None) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel, theirs = socket.socketpair()
        with theirs:
            await self._send(step, b"", (theirs.fileno(),))

    async def _set_status(self, step: Step, ring: int | None) -> None:
        await self._send(step, u64(int(step.words[0])))

    async def _get_status(self, step: Step, ring: int | None) -> None:
        await self._ask_u64(step)

    # --- messages about one ring ---

    def _queue(self, ring: int | None) -> GuestQueue:
        assert ring is not None, "stands outside of each ring"
        return self.machine.queues[ring]

    async def _set_vring_num(self, step: Step, ring: int | None) -> None:
        queue = self._queue(ring)
        await self._send(step, vring_state(queue.index, queue.driver.size))

    async def _set_vring_addr(self, step: Step, ring: int | None) -> None:
        queue = self._queue(ring)
        await self._send(step, wire.vring_addr(queue.index, *queue.areas))

    async def _set_vring_base(self, step: Step, ring: int | None) -> None:
        """The words as the README of the conversations has them."""
        queue = self._queue(ring)
        new = 0 if isinstance(queue.driver, SplitDriver) else PACKED_START
        kinds = {"0": 0, "new": new, "kept": self.bases.get(queue.index, new), "avail": queue.driver.base}
        if isinstance(queue.driver, SplitDriver):
            kinds["used"] = queue.driver.used_idx
        base = kinds[step.words[0]]
        await self._send(step, vring_state(queue.index, base))

    async def _get_vring_base(self, step: Step, ring: int | None) -> None:
        queue = self._queue(ring)
        answer = await self._ask(step, vring_state(queue.index, 0))
        index, base = struct.unpack("=II", answer)
        assert index == queue.index
        if step.words == ("unset",):
            return
        if isinstance(queue.driver, SplitDriver):
            assert base == queue.driver.used_idx, f"the base is {base}, the used index is {queue.driver.used_idx}"
        self.bases[index] = base

    async def _set_vring_kick(self, step: Step, ring: int | None) -> None:
        await self._send(step, u64(ring or 0), (self._wires_of(ring).kick,))

    async def _set_vring_call(self, step: Step, ring: int | None) -> None:
        await self._send(step, u64(ring or 0), (self._wires_of(ring).given_call,))

    async def _set_vring_err(self, step: Step, ring: int | None) -> None:
        await self._send(step, u64(ring or 0), (self._wires_of(ring).err,))

    async def _set_vring_enable(self, step: Step, ring: int | None) -> None:
        assert ring is not None, "stands outside of each ring"
        await self._send(step, vring_state(ring, int(step.words[0])))


_STEPS: Final[dict[str, Callable[[Player, Step, int | None], Awaitable[None]]]] = {
    name: getattr(Player, f"_{name.lower()}") for name in NUMBERS if hasattr(Player, f"_{name.lower()}")
} | {"REM_MEM_REG": Player._add_mem_reg}
