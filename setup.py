from glob import glob

from setuptools import Extension, setup

# No Python module: what `hyperbell qemu` preloads into QEMU. It is built, found and installed like one.
preload = Extension(
    "transports.preload._library",
    sorted(glob("transports/preload/*.c")),
    depends=glob("transports/preload/*.h"),
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-fvisibility=hidden"],
)

setup(ext_modules=[preload], cffi_modules=["virtio/dataplane/build.py:ffibuilder"])
