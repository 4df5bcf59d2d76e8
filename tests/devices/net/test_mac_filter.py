"""The address of a port that has one in the configuration is that port's alone, whoever sends with it."""

from __future__ import annotations

import pytest
from kit.front_end.frontend import REACTORS
from kit.net.lan import BROADCAST, lan

from virtio.devices.net.device import NetOptions

every_reactor = pytest.mark.parametrize("reactor", REACTORS)
SERVER = {"mac": "52:54:00:00:00:01"}
NO_FILTER = SERVER | {"mac_filter": False}
DEFAULT: dict[str, object] = {}


@every_reactor
async def test_a_frame_with_a_configured_ports_address_moves_none_of_its_traffic(reactor: str) -> None:
    async with lan(reactor, "split", 0, 0, 0, more=(SERVER, DEFAULT, DEFAULT)) as (server, thief, client):
        for station in (server, thief, client):
            station.listen()
        await thief.send(BROADCAST, b"I am the server", source=server.mac)
        await thief.send(client.mac, b"I am the server", source=server.mac)
        await client.send(server.mac, b"secret")
        assert (await server.frames())[0][1] == server.mac + client.mac + b"secret"
        assert thief.heard_nothing()
        assert client.heard_nothing(), "a frame that lies about its sender arrives nowhere"
        assert thief.device.native_device.counters().spoofed == 2
        assert ("transmit", "another_ports_address", 2) in [
            (lost.direction, lost.reason, lost.frames) for lost in thief.device.lost()
        ]


@every_reactor
async def test_a_configured_address_is_kept_for_its_port_while_that_is_unplugged(reactor: str) -> None:
    async with lan(reactor, "split", 0, 0, 0, more=(SERVER, DEFAULT, DEFAULT)) as (server, thief, client):
        await server.guest.link.reset()
        for station in (thief, client):
            station.listen()
        await thief.send(BROADCAST, b"I am the server", source=server.mac)
        await client.send(server.mac, b"secret")
        await client.send(thief.mac, b"hello")
        assert [frame for _, frame in await thief.frames()] == [thief.mac + client.mac + b"hello"]
        assert client.heard_nothing()
        counters = client.device.native_device.counters()
        assert (counters.dropped, counters.flooded) == (1, 1)  # nobody there; the hello, for the thief had said nothing


@every_reactor
async def test_a_port_sends_with_its_own_and_with_addresses_behind_it(reactor: str) -> None:
    behind = bytes.fromhex("02aabbccddee")  # a guest's bridge
    async with lan(reactor, "split", 0, 0, more=(SERVER, DEFAULT)) as (server, client):
        server.listen()
        client.listen()
        for source in (server.mac, behind):
            await server.send(BROADCAST, b"here", source=source)
            assert (await client.frames())[0][1] == BROADCAST + source + b"here"
            await client.send(source, b"there")
            if source == server.mac:
                assert (await server.frames())[0][1] == source + client.mac + b"there"
        assert client.device.native_device.counters().flooded == 0
        assert server.device.native_device.counters().spoofed == 0


@every_reactor
@pytest.mark.parametrize("options", [NO_FILTER, DEFAULT], ids=["mac_filter = false", "no mac"])
async def test_without_the_filter_an_address_is_where_it_was_last_heard(
    reactor: str, options: dict[str, object]
) -> None:
    async with lan(reactor, "split", 0, 0, 0, more=(options, DEFAULT, DEFAULT)) as (server, other, client):
        for station in (server, other, client):
            station.listen()
        await other.send(BROADCAST, b"I have moved", source=server.mac)
        await client.send(server.mac, b"there")
        assert [frame[12:] for _, frame in await other.frames()] == [b"there"]


@every_reactor
async def test_the_filter_can_be_had_for_an_address_that_is_made(reactor: str) -> None:
    async with lan(reactor, "split", 0, 0, more=({"mac_filter": True}, DEFAULT)) as (server, thief):
        server.listen()
        await thief.send(BROADCAST, b"as it", source=server.mac)
        await thief.send(BROADCAST, b"as myself")
        assert (await server.frames())[0][1] == BROADCAST + thief.mac + b"as myself"


@pytest.mark.parametrize("backend", ["null", "user"])
def test_there_is_no_filter_without_a_switch(backend: str) -> None:
    with pytest.raises(ValueError, match=f'mac_filter has no meaning with backend = "{backend}"'):
        NetOptions.model_validate({"backend": backend, "mac_filter": True})


async def test_more_ports_than_a_word_has_bits_hear_each_other() -> None:
    macs = [{"mac": f"52:54:00:00:01:{number:02x}"} for number in range(70)]
    async with lan("epoll", "split", *[0] * 70, more=macs) as stations:
        first, *_, last = stations
        for station in stations:
            station.listen(2)
        await first.send(last.mac, b"to the last")
        assert (await last.frames())[0][1] == last.mac + first.mac + b"to the last"
        await last.send(BROADCAST, b"to all")
        for station in stations[:-1]:
            assert (await station.frames())[0][1] == BROADCAST + last.mac + b"to all"
