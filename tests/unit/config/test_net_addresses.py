"""The addresses of network interfaces: unique in a file and across hosts, the same over restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.cli import main
from virtio.devices.net import address as net_address
from virtio.devices.net.address import host_identity, mac_from_name
from virtio.native.nic import PORTS_MAX

ID, OTHER_ID = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"
SWITCH = 'backend = "switch"\nswitch = "lan"\n'


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], None]:
    """From now on this is a host whose machine id is ``text``; None: one that has none."""

    def become(text: str | None) -> None:
        file = tmp_path / "machine-id"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(net_address, "MACHINE_IDS", (file, tmp_path / "missing"))
        host_identity.cache_clear()

    monkeypatch.setattr(net_address, "MACHINE_IDS", net_address.MACHINE_IDS)
    return become


@pytest.fixture(autouse=True)
def forget_the_host() -> object:
    yield
    host_identity.cache_clear()


def test_the_same_name_on_two_hosts_gives_two_addresses_and_on_one_host_always_the_same(
    on_host: Callable[[str | None], None],
) -> None:
    on_host(ID + "\n")
    here = [mac_from_name(name) for name in ("lan", "lan2")]
    on_host(OTHER_ID + "\n")
    there = [mac_from_name(name) for name in ("lan", "lan2")]
    assert len({*here, *there}) == 4
    on_host(ID)
    assert [mac_from_name(name) for name in ("lan", "lan2")] == here
    assert all(mac[0] & 3 == 2 and len(mac) == 6 for mac in (*here, *there))


@pytest.mark.parametrize("text", [None, "", "uninitialized", "\u00e9"])
def test_a_host_without_a_machine_id_goes_by_its_name(
    on_host: Callable[[str | None], None], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host(text)
    assert host_identity() != b""
    assert mac_from_name("lan") == mac_from_name("lan")


def check(folder: Path, *devices: tuple[str, str]) -> int:
    text = "".join(f'[devices.{name}]\ntype = "net"\nsocket = "{name}.sock"\n{keys}' for name, keys in devices)
    (folder / "c.toml").write_text(text)
    return main(["check", str(folder / "c.toml")])


@pytest.mark.parametrize("backend", [SWITCH, 'backend = "user"\n'], ids=["switch", "user"])
def test_the_same_address_twice_is_a_mistake_with_both_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    one, two = f'{backend}mac = "52:54:00:AA:00:01"\n', f'{backend}mac = "52:54:00:aa:00:01"\n'
    lines = 4 + backend.count("\n")
    assert check(tmp_path, ("one", one), ("two", two)) == 78
    said = capsys.readouterr().err
    assert f"c.toml:{2 * lines}: [devices.two] mac: the address 52:54:00:aa:00:01" in said
    assert f'is already device "one" (line {lines})' in said


def test_an_address_that_another_interface_has_by_default_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = mac_from_name("one").hex(":")
    assert check(tmp_path, ("one", SWITCH), ("two", SWITCH + f'mac = "{taken}"\n')) == 78
    assert f'the address {taken} on the switch "lan" is already device "one"' in capsys.readouterr().err


def test_two_switches_are_two_networks(tmp_path: Path) -> None:
    mac = 'mac = "52:54:00:aa:00:01"\n'
    assert check(tmp_path, ("one", SWITCH + mac), ("two", SWITCH.replace("lan", "wan") + mac)) == 0


def test_one_port_too_many_is_said_at_the_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, *((f"port{number}", SWITCH) for number in range(PORTS_MAX + 1))) == 78
    assert f'] switch: the switch "lan" has room for {PORTS_MAX} devices' in capsys.readouterr().err
