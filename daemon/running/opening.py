"""A configured device is opened: in a thread with a limit, where its files may hang (``files.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from daemon.devices.catalogue import Configured, files_may_hang, make_device
from daemon.running.files import Files, path_of
from virtio.backend.device_calls import close_all
from virtio.device import Device
from virtio.errors import HostError


async def open_device(files: Files, name: str, configured: Configured) -> Device:
    """The device ``name``, opened, and knowing how many workers drive it. Raises ``HostError``."""
    if not files_may_hang(configured):
        return make_device(name, configured)

    def make() -> Device:
        device = make_device(name, configured)
        try:
            device.use_workers(len(set(configured.workers)))
        except BaseException:
            close_all([device])
            raise
        return device

    return await files.open(name, path_of(configured.options), make)


async def open_devices(
    files: Files, configured: Mapping[str, Configured], place: Callable[[str], str] = "[devices.{}]".format
) -> dict[str, Device]:
    """Every configured device, opened in turn. When some cannot be had, all are closed and every reason is given.

    ``place`` gives where a device is configured, for the reasons. Raises ``ExceptionGroup`` of ``HostError``.
    """
    devices: dict[str, Device] = {}
    errors: list[HostError] = []
    try:
        for name, device in configured.items():
            try:
                devices[name] = await open_device(files, name, device)
            except HostError as error:
                errors.append(HostError(f"{place(name)} {error}", errno=error.errno))
        if errors:
            raise ExceptionGroup("devices cannot be opened", errors)
    except BaseException:
        for opened in devices.values():
            await files.close(opened)
        raise
    return devices
