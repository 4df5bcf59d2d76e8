"""Decide between KVM and TCG by what /dev/kvm really does.

A /dev/kvm may be there and still interpret every instruction of a guest's kernel (some nested hypervisors
do): Linux would boot in hours. A toy guest's counting loop tells: milliseconds on hardware, seconds when emulated.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_HLT = 5
KVM_API_VERSION = 12
REGS = struct.Struct("<16Q2Q")  # rax ... r15, rip, rflags
SREGS_SIZE = 312
EXIT_REASON_OFFSET = 8  # of struct kvm_run

CODE_GPA = 0x1000
TSS_GPA = 0x100000  # three pages outside of the guest's memory
LOOPS = 2_000_000
EMULATED_SECONDS = 0.3  # of CPU time: about 2 s when emulated, 1 or 2 ms on hardware
GIVE_UP_SECONDS = 5  # of the clock, should the loop not even use the processor


@dataclass(frozen=True)
class Acceleration:
    """``name`` is QEMU's ("kvm" or "tcg"); ``why`` completes the sentence "guests run with ... because ..."."""

    name: str
    why: str

    @property
    def qemu_arguments(self) -> list[str]:
        if self.name == "kvm":
            return ["-accel", "kvm", "-cpu", "host"]
        # All CPUs take turns in one thread. With a thread each, QEMU 7.2 may keep what it has translated of code that
        # another CPU patches meanwhile (Linux does with every static key, and with ftrace at every insmod): both CPUs
        # of a guest were seen going round for ever in a breakpoint that was long gone.
        return ["-accel", "tcg,thread=single", "-cpu", "max"]


def choose_acceleration(kvm: Path = Path("/dev/kvm")) -> Acceleration:
    """KVM if a toy guest runs on it at a processor's speed, else TCG, with the reason. Never raises, at most 5 s."""
    if platform.machine() != "x86_64":
        return Acceleration("tcg", f"this host is {platform.machine()} and the guest is x86_64")
    try:
        os.close(os.open(kvm, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = f"; add this user to the group of {kvm}" if error.errno == errno.EACCES else ""
        return Acceleration("tcg", f"{kvm}: {error.strerror}{advice}")
    # In a process of its own: a KVM_RUN that never ends is ended with the process.
    command = [sys.executable, "-m", "guest.boot.accel", str(kvm)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=GIVE_UP_SECONDS,
            cwd=Path(__file__).resolve().parents[2],
        )
    except subprocess.TimeoutExpired:
        return Acceleration("tcg", f"a toy guest on {kvm} did not end")
    if done.returncode == -signal.SIGPROF:
        return Acceleration(
            "tcg",
            f"{kvm} emulates every instruction (a loop of milliseconds took over {EMULATED_SECONDS} s of CPU time)",
        )
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return Acceleration("tcg", f"a toy guest does not run on {kvm}: {reason}")
    return Acceleration(
        "kvm", f"a toy guest's loop took {float(done.stdout) * 1000:.1f} ms on {kvm}, a processor's speed"
    )


def time_toy_guest(kvm_path: str) -> float:
    """CPU seconds of this thread for ``LOOPS`` turns of ``dec ecx; jnz`` in a real-mode guest. Raises ``OSError``."""
    code = b"\x66\xb9" + struct.pack("<I", LOOPS)  # mov ecx, LOOPS
    code += b"\x66\x49\x75\xfc\xf4"  # dec ecx; jnz to the dec; hlt
    kvm = os.open(kvm_path, os.O_RDWR | os.O_CLOEXEC)
    if fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION:
        raise OSError("not KVM's API version 12")
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    fcntl.ioctl(vm, KVM_SET_TSS_ADDR, TSS_GPA)  # Intel needs a place for real mode's task state; others ignore it
    memory = mmap.mmap(-1, 0x2000)
    memory[CODE_GPA : CODE_GPA + len(code)] = code
    hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, len(memory), hva))
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
    sregs = bytearray(SREGS_SIZE)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
    struct.pack_into("<QIH", sregs, 0, 0, 0xFFFF, 0)  # cs, the first: base, limit, selector
    fcntl.ioctl(vcpu, KVM_SET_SREGS, sregs)
    fcntl.ioctl(vcpu, KVM_SET_REGS, REGS.pack(*[0] * 16, CODE_GPA, 2))  # flags: bit 1 is always set
    begin = time.thread_time()
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    seconds = time.thread_time() - begin
    (reason,) = struct.unpack_from("<I", run, EXIT_REASON_OFFSET)
    if reason != KVM_EXIT_HLT:
        raise OSError(f"the guest left with exit reason {reason} instead of hlt")
    return seconds


if __name__ == "__main__":
    signal.setitimer(signal.ITIMER_PROF, EMULATED_SECONDS)  # SIGPROF's default action ends this process
    try:
        print(time_toy_guest(sys.argv[1]))
    except OSError as failure:
        sys.exit(str(failure))
