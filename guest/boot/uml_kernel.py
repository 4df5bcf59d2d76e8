"""User-mode Linux with a driver for every type of device, built of Debian's kernel source; nothing is installed.

Debian's own package has drivers for disks, network interfaces, consoles and sockets. Compiler and tools are those of
the suite that the source is of, unpacked: what is built does not depend on this machine's. It is linked statically, so
it runs on each.
"""

from __future__ import annotations

import hashlib
import os

from guest.boot.uml import chosen_suite
from guest.debian.cache import PrepareError, Progress, scratch_folder
from guest.debian.kernel import Kernel
from guest.debian.suites import open_suite
from guest.debian.tools import run_tool
from guest.debian.tree import stored_program

SUITES = {"6.1": "bookworm"}
TOOLS = (
    *("gcc", "libc6-dev", "make", "binutils", "flex", "bison", "bc", "perl", "bash", "dash", "coreutils", "findutils"),
    *("diffutils", "grep", "gzip", "mawk", "sed", "tar", "xz-utils"),
)
BUILD_SECONDS = 3600  # on a machine with two busy processors three quarters of an hour were seen
PROGRAM = "linux"
STARTED = "linux.uml"
# The C library registers a place in its thread's memory where the host's kernel writes at each return to user space
# (rseq). Of a static program it lies in the heap, which Linux 6.1 unmaps in the processes of its guest: they would die.
WRAPPER = """\
#!/bin/sh
GLIBC_TUNABLES=glibc.pthread.rseq=0 exec "$(dirname "$0")/%s" "$@"
"""

# All that is not named is left out. Drivers are part of the kernel: a guest loads no module.
CONFIG = {
    "what User-mode Linux is": "64BIT STATIC_LINK EXPERT PRINTK TTY UNIX98_PTYS STDERR_CONSOLE NULL_CHAN SSL",
    "what the init needs": "BLK_DEV_INITRD BINFMT_ELF BINFMT_SCRIPT MULTIUSER FUTEX EPOLL POSIX_TIMERS FILE_LOCKING"
    " SHMEM TMPFS PROC_FS SYSFS DEVTMPFS",
    "the way to vhost-user devices": "VIRTIO_MENU VIRTIO_UML UML_TIME_TRAVEL_SUPPORT",
    "disks": "BLOCK BLK_DEV VIRTIO_BLK",
    "network interfaces": "NET PACKET UNIX INET NETDEVICES NET_CORE VIRTIO_NET",
    "sockets": "VSOCKETS VIRTIO_VSOCKETS",
    "consoles": "VIRTIO_CONSOLE",
    "entropy": "HW_RANDOM HW_RANDOM_VIRTIO",
    "keys": "INPUT INPUT_EVDEV VIRTIO_INPUT",
    "lines, which tests find in sysfs": "GPIOLIB GPIO_SYSFS GPIO_CDEV GPIO_VIRTIO",
    # I2C's adapters need memory-mapped I/O, which User-mode Linux has with its emulation of PCI only.
    "buses": "UML_PCI_OVER_VIRTIO PCI PCI_MSI I2C I2C_CHARDEV I2C_VIRTIO",
    "file systems": "FUSE_FS VIRTIO_FS",
}
# Words of later versions only.
MAY_BE_MISSING = {"GPIO_SYSFS_LEGACY"}
# An id that no device has: of the kernel's own there is none yet.
VALUES = {"UML_PCI_OVER_VIRTIO_DEVICE_ID": "63"}


def prepare_uml_kernel(progress: Progress, series: str = "") -> Kernel:
    """User-mode Linux with all drivers, from the cache while Debian's source is the same.

    ``series`` as for ``prepare_uml``. Raises ``PrepareError`` with advice.
    """
    suite = open_suite(chosen_suite(SUITES, series), progress)
    (source,) = [f"linux-source-{series}" for series, name in SUITES.items() if name == suite.name]
    package = f"{source} {suite.version(source)}"
    config = configuration()
    digest = hashlib.sha256(config.encode()).hexdigest()[:8]
    target = suite.folder / "uml-kernels" / f"{package.replace(' ', '_')}-{digest}"
    if not (target / PROGRAM).exists():
        tree = suite.unpack([source, *TOOLS])
        tree.become_root()
        target.parent.mkdir(exist_ok=True)
        with scratch_folder(target.parent) as scratch:
            work = scratch / "work"
            work.mkdir()
            (work / "wanted").write_text(config)
            progress(f"building User-mode Linux of {package}; this takes some minutes, once")
            script = build_script(source)
            run_tool(tree.inside(work, "sh", "-ec", script), f"building {package}", seconds=BUILD_SECONDS)
            check_configuration(config, (work / "source" / ".config").read_text())
            made = scratch / "made"
            made.mkdir()
            (work / "source" / PROGRAM).rename(made / PROGRAM)
            (work / "source" / ".config").rename(made / "config")
            try:
                made.rename(target)
            except OSError:
                # Another process was faster; its kernel is as good as ours.
                if not (target / PROGRAM).exists():
                    raise
    image = stored_program(target / STARTED, (WRAPPER % PROGRAM).encode())
    return Kernel(package, image, target / "modules")


def configuration() -> str:
    """As Kconfig reads it."""
    words = " ".join(CONFIG.values()).split()
    lines = [f"CONFIG_{word}=y" for word in (*words, *sorted(MAY_BE_MISSING))]
    return "".join(f"{line}\n" for line in (*lines, *(f"CONFIG_{name}={value}" for name, value in VALUES.items())))


def build_script(source: str) -> str:
    """What runs in the tree."""
    make = f"make -C source ARCH=um -j{len(os.sched_getaffinity(0))}"
    return (
        f"cd /mnt; mkdir source; tar -xJf /usr/src/{source}.tar.xz -C source --strip-components=1; "
        f"{make} KCONFIG_ALLCONFIG=/mnt/wanted allnoconfig; {make} {PROGRAM}; strip source/{PROGRAM}"
    )


def check_configuration(wanted: str, got: str) -> None:
    """``PrepareError`` names what this version of the kernel did not take, for which a device would have no driver."""
    missing = set(wanted.splitlines()) - set(got.splitlines()) - {f"CONFIG_{word}=y" for word in MAY_BE_MISSING}
    if missing:
        raise PrepareError(f"this kernel's source does not take {', '.join(sorted(missing))}")
