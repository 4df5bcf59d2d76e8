from setuptools import setup

setup(cffi_modules=["virtio/dataplane/build.py:ffibuilder"])
