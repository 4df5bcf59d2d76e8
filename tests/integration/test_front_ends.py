"""Every front-end attaches every device type that it can, with default keys, in the order in which it speaks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.conversation.devices import PROOFS, Network, Proof, write_configuration
from kit.conversation.file import CONVERSATIONS, TYPES, Conversation, load
from kit.conversation.player import Player
from kit.front_end.scene import DaemonProcess, LogBook

from virtio.devices import REGISTRY

FILES = sorted(CONVERSATIONS.glob("*.txt"))
LOADED = [load(file) for file in FILES]
CASES = [
    pytest.param(each, device_type, id=f"{each.name}-{device_type}") for each in LOADED for device_type in each.attaches
]
MENDED = "the front-end's base is not where the ring stands"


class House:
    """One daemon with a device of every type. Front-ends come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = LogBook()
        self.proofs: dict[str, Proof] = {name: kind(folder) for name, kind in PROOFS.items()}
        for name in ("net-config", "net-connects"):
            self.proofs[name] = Network(folder, name)
        self.daemon = DaemonProcess(write_configuration(folder), self.log)
        self.log.wait_for(0, "serving")


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as folder:
        place = House(Path(folder))
        yield place
        for proof in place.proofs.values():
            proof.close()
        assert place.daemon.stop() == 0


def test_conversations_have_a_proof_for_every_type_of_the_registry() -> None:
    assert set(TYPES) == set(PROOFS) == {*REGISTRY, "own"}


@pytest.mark.parametrize(("conversation", "device_type"), CASES)
async def test_a_front_end_uses_a_device_and_leaves_and_comes_again(
    house: House, conversation: Conversation, device_type: str
) -> None:
    mark = house.log.mark
    device = conversation.key("device", device_type, device_type)

    def complaints() -> list[str]:
        """What the daemon had against the front-end, less what it takes notice of and mends."""
        entries = [entry for entry in house.log.since(mark) if entry.get("device") == device]
        return [str(entry) for entry in entries if entry["level"] != "info" and not entry["event"].startswith(MENDED)]

    player = Player(conversation, device_type, house.folder / f"{device}.sock", house.proofs[device])
    try:
        await player.live()
    except AssertionError as error:
        raise AssertionError(f"{error}; the daemon's log: {complaints()}") from error
    finally:
        player.close()
    assert complaints() == []
