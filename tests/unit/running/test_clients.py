"""Who has a place at a listening socket, and what a shortage of descriptors costs."""

from __future__ import annotations

import errno
import os
import socket

import pytest
import trio
from structlog.testing import capture_logs

from virtio.clients import DELAY_MAX, FAILURES_MAX, Door, Place, Places, shortages


def taken(places: Places) -> Place:
    place = places.take()
    assert place is not None
    return place


async def test_the_client_that_has_been_idle_for_longest_gives_way() -> None:
    places = Places(3)
    first, second, third = (taken(places) for _ in range(3))
    places.active(first)
    taken(places)
    assert [place.scope.cancel_called for place in (first, second, third)] == [False, True, False]
    assert len(places) == 3


async def test_rank_comes_before_idleness_and_a_place_without_rank_is_kept() -> None:
    places = Places(3)
    kept, ranked, idle = (taken(places) for _ in range(3))
    kept.rank, ranked.rank = None, 1
    latest = taken(places)
    assert idle.scope.cancel_called
    latest.rank = None
    taken(places).rank = None
    assert ranked.scope.cancel_called
    assert places.take() is None
    assert not kept.scope.cancel_called


async def test_one_who_waits_comes_in_when_a_kept_place_is_left() -> None:
    places = Places(1)
    place = taken(places)
    place.rank = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(places.wait_for)
        await trio.testing.wait_all_tasks_blocked()
        places.leave(place)
    assert len(places) == 1


async def test_who_was_sent_away_and_leaves_later_takes_nobodys_place() -> None:
    places = Places(1)
    gone = taken(places)
    taken(places)
    places.leave(gone)
    places.active(gone)
    assert len(places) == 1


class Failing:
    """A listening socket whose accept(2) fails so often, then gives a client."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times = number, times

    async def accept(self) -> tuple[trio.socket.SocketType, object]:
        await trio.lowlevel.checkpoint()
        if self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return trio.socket.from_stdlib_socket(socket.socket()), None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_a_shortage_is_one_line_and_one_count_however_long_it_lasts(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    before = shortages["a client"]
    door = Door(Failing(number, 100), "a client")  # type: ignore[arg-type]
    begin = trio.current_time()
    with capture_logs() as logs:
        (await door.accept()).close()
    assert [entry["log_level"] for entry in logs] == ["error", "info"]
    assert logs[0]["event"] == "out of descriptors: a client waits"
    assert "LimitNOFILE=" in logs[0]["remedy"]
    assert shortages["a client"] == before + 1
    assert trio.current_time() - begin > 90 * DELAY_MAX  # virtual: it asks less and less often


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EPERM])
async def test_a_client_that_gave_up_costs_neither_a_line_nor_a_wait(number: int) -> None:
    with capture_logs() as logs:
        (await Door(Failing(number, 100), "a client").accept()).close()  # type: ignore[arg-type]
    assert logs == []


async def test_a_host_that_refuses_every_client_is_asked_once_a_second_and_said_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = Failing(errno.EPERM, 10**9)
    with capture_logs() as logs, trio.move_on_after(100 * DELAY_MAX):
        await Door(listener, "a client").accept()  # type: ignore[arg-type]
    assert 10**9 - listener.times <= FAILURES_MAX + 100
    assert [(entry["log_level"], entry["error"]) for entry in logs] == [("error", os.strerror(errno.EPERM))]


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL])
async def test_a_listening_socket_that_is_lost_is_said(number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        await Door(Failing(number, 1), "a client").accept()  # type: ignore[arg-type]
