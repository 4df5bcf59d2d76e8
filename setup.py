from pathlib import Path

from setuptools import Extension, setup

LIBRARY = Path("transports/stock_qemu/library")

# No Python module: what `hyperbell qemu` preloads into QEMU. It is built, found and installed like one.
preload = Extension(
    "transports.stock_qemu.library._library",
    sorted(map(str, LIBRARY.glob("*.c"))),
    depends=[str(path) for path in LIBRARY.glob("*.h")],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-fvisibility=hidden"],
)

setup(
    ext_modules=[preload],
    cffi_modules=[
        "virtio/dataplane/build.py:ffibuilder",
        "virtio/usernet/build.py:ffibuilder",
        "transports/kvm/native/build.py:ffibuilder",
    ],
)
