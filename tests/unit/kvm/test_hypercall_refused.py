"""A kernel that says it has KVM_HYPERV_EVENTFD and then does not: our own VM says so once and rings plainly."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
from kit.kvm.scene import KEY, Scene, scene
from structlog.testing import capture_logs

from transports.hypercall import connection_id
from transports.kvm.machine.hypercalls import HypervEventfds
from transports.kvm.vm import doorbells
from virtio.backend.backend import Backend
from virtio.device import DeviceOptions
from virtio.devices.rng import Rng

ID = connection_id(0x100, KEY)


async def request(s: Scene) -> None:
    s.rings[0].add([], [32])
    s.ring_mmio(0)
    (used,) = await s.used(0)
    assert used.written == 32


@pytest.mark.parametrize("error", [errno.ENOTTY, errno.EINVAL, errno.EPERM])
async def test_a_capability_that_is_there_only_in_name_costs_one_line_and_the_plain_doorbells_go_on(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    asked: list[int] = []

    def refuse(vm: object, number: int, fd: int, remove: int) -> int:
        asked.append(number)
        return -error

    monkeypatch.setattr(doorbells, "lib", SimpleNamespace(vm_hypercall_id=refuse))
    vm: Any = SimpleNamespace(why_no_hypercall=None, hypercall_id=doorbells.Doorbells(None, None).hypercall_id)
    kind = HypervEventfds(vm)
    async with (
        Backend(Rng("entropy", DeviceOptions(), 1, 64)) as backend,
        scene(backend, policy="withhold") as s,
    ):
        monkeypatch.setattr(s.hypercalls, "register", kind.register)
        monkeypatch.setattr(s.hypercalls, "withdraw", kind.withdraw)
        await s.start()
        with capture_logs() as logs:
            await s.device.set_policy("offer")
        assert asked == [ID]
        (line,) = [line for line in logs if line["log_level"] == "warning"]
        assert line["event"] == "no hypercall doorbell, the plain ones go on"
        assert line["error"] == f"registering connection id {ID:#x}: {os.strerror(error)}"
        assert await s.ids() == [0]  # the driver sees that there is none
        assert s.device.rung_by_hypercall == ()
        for _ in range(3):
            await request(s)
        await s.device.set_policy("withhold")  # nothing is there to be withdrawn
        assert asked == [ID]
        await request(s)
        await s.rung(kick=4)
