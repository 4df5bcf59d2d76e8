"""A guest with connections reboots under a front-end that tells of no reset (QEMU 7.2), or is merely paused."""

from __future__ import annotations

from pathlib import Path

from kit.front_end.frontend import Guest, Setting, every_python_setting, plugged
from kit.guest.vsock import EVENT_QUEUE, RW, VsockGuest, pair, vsock, works


async def stop(guest: Guest) -> list[int]:
    """GET_VRING_BASE of every queue: all that there is to see of a reboot, and of a pause, until the queues start."""
    return [await guest.link.stop(index) for index in range(3)]


@every_python_setting
async def test_programs_of_the_host_see_that_a_guest_has_rebooted_and_their_places_are_free(
    setting: Setting, tmp_path: Path
) -> None:
    async with plugged(vsock(tmp_path, connections=1), setting) as p:
        for _ in range(3):
            guest = VsockGuest(p.guest)
            _, outside = await pair(guest, tmp_path)
            (tmp_path / "vsock_1024").unlink()
            await stop(p.guest)
            p.guest.forget_queues()
            await p.guest.start()
            p.guest.queues[EVENT_QUEUE].driver.add([], [4])
            p.guest.queues[EVENT_QUEUE].kick()
            await outside.at_end()
            outside.close()
        guest = VsockGuest(p.guest)
        await works(guest, tmp_path)
        await guest.silence()
        assert p.guest.queues[EVENT_QUEUE].driver.used() == []  # a new driver has no connections to be told about


@every_python_setting
async def test_connections_outlive_a_pause_of_their_guest(setting: Setting, tmp_path: Path) -> None:
    async with plugged(vsock(tmp_path), setting) as p:
        inside, outside = await pair(VsockGuest(p.guest), tmp_path)
        for turn in range(5):
            bases = await stop(p.guest)
            await outside.send(b"%d" % turn)
            await p.guest.negotiate()
            await p.guest.link.share(p.guest.memory)
            for index, base in enumerate(bases):
                await p.guest.start_queue(index, base)
            heard = await inside.hear()
            assert (heard.op, heard.data) == (RW, b"%d" % turn)
            await inside.say(RW, b"yes")
            assert await outside.receive(3) == b"yes"
        outside.close()
