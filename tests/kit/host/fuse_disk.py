"""A file system of one file whose storage fails, fills up or hangs when told to: FUSE, without a library.

Run as a process of its own (a server inside the process that uses the file would wait for itself):
``fuse_disk.py MOUNTPOINT SIZE [writeback] [direct]``. Commands are lines of JSON on stdin, each answered by a line:
``{"fail": {"write": 28}}`` (errno by operation, replaces the set before), ``{"hang": ["read"]}`` (operations that get
no answer; those that wait get theirs once they are no longer named), ``{"size": N}`` (the file's size from now on),
``{"wait": ["read", 2]}`` (answered once two reads hang), ``{"counts": true}``.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import stat
import struct
import sys
import time
from collections import Counter
from typing import Any, Final

OPS: Final = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 14: "open", 15: "read", 16: "write", 17: "statfs",
    18: "release", 20: "fsync", 25: "flush", 26: "init", 36: "interrupt", 42: "batch_forget", 43: "fallocate",
}  # fmt: skip
UNANSWERED: Final = ("forget", "interrupt", "batch_forget")
IN, OUT = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
WRITEBACK_CACHE, BIG_WRITES, ASYNC_READ = 1 << 16, 1 << 5, 1 << 0
DIRECT_IO = 1
MAX_WRITE = 1 << 16


class Disk:
    """The file ``disk.img`` of ``size`` bytes, in memory."""

    def __init__(self, device: int, size: int, *, writeback: bool, direct: bool) -> None:
        self.device = device
        self.content = bytearray(size)
        self.writeback, self.direct = writeback, direct
        self.failing: dict[str, int] = {}
        self.hanging: set[str] = set()
        self.waiting: list[tuple[str, int, int, bytes]] = []  # operation, unique, node, body
        self.counts: Counter[str] = Counter()

    def serve_one(self) -> bool:
        try:
            request = os.read(self.device, MAX_WRITE + 4096)
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.EINTR)  # else it was unmounted
        _, opcode, unique, node, *_ = IN.unpack_from(request)
        op, body = OPS.get(opcode, f"opcode {opcode}"), request[IN.size :]
        self.counts[op] += 1
        if op in self.hanging:
            self.waiting.append((op, unique, node, body))
        elif op not in UNANSWERED:
            self.answer(op, unique, node, body)
        return True

    def release(self) -> None:
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            if each[0] in self.hanging:
                self.waiting.append(each)
            else:
                self.answer(*each)

    def answer(self, op: str, unique: int, node: int, body: bytes) -> None:
        error, data = self.failing.get(op, 0), b""
        if not error:
            error, data = self.perform(op, node, body)
        try:
            os.writev(self.device, [OUT.pack(OUT.size + len(data), -error, unique), data])
        except OSError as problem:
            if problem.errno != errno.ENOENT:  # the caller was interrupted
                raise

    def perform(self, op: str, node: int, body: bytes) -> tuple[int, bytes]:
        match op:
            case "init":
                flags = ASYNC_READ | BIG_WRITES | (WRITEBACK_CACHE if self.writeback else 0)
                return 0, struct.pack("<IIIIHHIIHHIIIIIIII", 7, 31, 1 << 17, flags, 64, 48, MAX_WRITE, 1, *[0] * 10)
            case "lookup":
                if body.rstrip(b"\0") != b"disk.img":
                    return errno.ENOENT, b""
                return 0, struct.pack("<QQQQII", 2, 0, 3600, 0, 0, 0) + self.attributes(2)
            case "getattr":
                return 0, struct.pack("<QII", 0, 0, 0) + self.attributes(node)
            case "setattr":
                return 0, struct.pack("<QII", 0, 0, 0) + self.attributes(node)
            case "open":
                return 0, struct.pack("<QII", 1, DIRECT_IO if self.direct else 0, 0)
            case "read":
                _, offset, size = struct.unpack_from("<QQI", body)
                return 0, bytes(self.content[offset : offset + size])
            case "write":
                _, offset, size = struct.unpack_from("<QQI", body)
                self.content[offset : offset + size] = body[40 : 40 + size]
                return 0, struct.pack("<II", size, 0)
            case "statfs":
                return 0, struct.pack("<QQQQQIIII24x", 1000, 500, 500, 10, 5, 4096, 255, 4096, 0)
            case "fsync" | "flush" | "release" | "fallocate":
                return 0, b""
            case _:
                return errno.ENOSYS, b""

    def attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o666
        size = 0 if node == 1 else len(self.content)
        times = [int(time.time())] * 3
        return struct.pack("<6Q10I", node, size, size // 512, *times, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def obey(self, command: dict[str, Any]) -> object:
        if "fail" in command:
            self.failing = command["fail"]
        if "hang" in command:
            self.hanging = set(command["hang"])
            self.release()
        if "size" in command:
            size = command["size"]
            self.content = self.content[:size] + bytes(max(0, size - len(self.content)))
        if "wait" in command:
            op, count = command["wait"]
            while sum(each[0] == op for each in self.waiting) < count:
                self.serve_one()
        return dict(self.counts)


def main() -> None:
    folder, size = sys.argv[1], int(sys.argv[2])
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    if libc.mount(b"hyperbell-test", folder.encode(), b"fuse", 0, options.encode()) < 0:
        print(json.dumps({"error": os.strerror(ctypes.get_errno())}), flush=True)
        return
    print(json.dumps({}), flush=True)
    disk = Disk(device, size, writeback="writeback" in sys.argv[3:], direct="direct" in sys.argv[3:])
    commands = b""
    try:
        while True:
            ready, _, _ = select.select([device, 0], [], [])
            if device in ready and not disk.serve_one():
                return
            if 0 in ready:
                received = os.read(0, 4096)
                if not received:
                    return
                *lines, commands = (commands + received).split(b"\n")
                for line in lines:
                    print(json.dumps(disk.obey(json.loads(line))), flush=True)
    finally:
        os.close(device)  # whatever still waits gets ENOTCONN
        libc.umount2(folder.encode(), 2)  # MNT_DETACH


if __name__ == "__main__":
    main()
