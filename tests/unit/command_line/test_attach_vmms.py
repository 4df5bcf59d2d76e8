"""``hyperbell attach``: what each virtual machine monitor is told, and which devices it cannot have."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from daemon.attach.vmms import VMMS
from daemon.cli import main
from virtio.devices import REGISTRY
from virtio.devices.net.device import NetOptions

TYPES = {
    "disk": 'type = "blk"\nbackend = "null"\nsize = "1M"\nqueues = 2\nqueue_size = 512',
    "lan": 'type = "net"\nqueues = 2\nmtu = 1400',
    "entropy": 'type = "rng"',
    "vs": 'type = "vsock"\ncid = 3\npath = "/run/h/vs.path"',
    "pins": 'type = "gpio"\nlines = ["a"]',
    "bus": 'type = "i2c"\n[[devices.bus.chips]]\nkind = "eeprom"\naddress = 80',
    "keys": 'type = "input"',
    "con": 'type = "console"\nports = [{name = "a"}]',
}
NUMBERS = {"disk": 2, "lan": 1, "entropy": 4, "vs": 19, "pins": 41, "bus": 34, "keys": 18, "con": 3}
QUEUES = {"disk": 2, "lan": 5, "entropy": 1, "vs": 3, "pins": 2, "bus": 1, "keys": 2, "con": 6}
KINDS = {"con": "KRUN_VIRTIO_DEVICE_CONSOLE", "entropy": "KRUN_VIRTIO_DEVICE_RNG"}
KINDS |= {"vs": "KRUN_VIRTIO_DEVICE_VSOCK", "keys": "KRUN_VIRTIO_DEVICE_INPUT"}
OTHERS = [vmm for vmm in VMMS if vmm not in ("qemu", "libvirt")]


def sizes(name: str) -> str:
    return ",".join(["256"] * QUEUES[name])


def table(name: str, keys: str, socket: str = "") -> str:
    return f"[devices.{json.dumps(name)}]\nsocket = {json.dumps(socket or f'/run/h/{name}.sock')}\n{keys}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "all.toml"
    path.write_text("\n".join(table(name, keys) for name, keys in TYPES.items()))
    return path


class Told:
    """What ``hyperbell attach`` printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], vmm: str, *arguments: object, status: int = 0) -> None:
        assert main(["attach", *map(str, arguments), "--vmm", vmm]) == status
        said = capsys.readouterr()
        self.text, self.said = said.out, said.err
        self.words = shlex.split(said.out.replace("\\\n", "")) if vmm != "libkrun" else []
        self.refused = {
            name for line in self.said.splitlines() for name in re.findall(r'^hyperbell: device "(\S+)":', line)
        }

    def values(self, option: str) -> list[str]:
        return [self.words[at + 1] for at, word in enumerate(self.words) if word == option]


def test_this_file_has_a_device_of_every_type() -> None:
    assert {keys.split('"')[1] for keys in TYPES.values()} == set(REGISTRY)


def test_cloud_hypervisor_has_every_device_and_shares_its_memory(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(capsys, "cloud-hypervisor", file, "--memory", "2G")
    assert told.refused == set()
    assert told.values("--memory") == ["size=2G,shared=on"]
    assert told.values("--cpus") == ["boot=2"]  # it refuses a disk with more queues than CPUs
    assert told.values("--disk") == ["vhost_user=on,socket=/run/h/disk.sock,num_queues=2,queue_size=512,id=disk"]
    mac = NetOptions().address("lan").hex(":")
    assert told.values("--net") == [
        f"vhost_user=on,socket=/run/h/lan.sock,vhost_mode=client,mac={mac},num_queues=4,queue_size=256,id=lan,mtu=1400"
    ]
    generic = [name for name in TYPES if name not in ("disk", "lan")]
    assert told.values("--generic-vhost-user") == [
        f"socket=/run/h/{name}.sock,device_type={NUMBERS[name]},queue_sizes=[{sizes(name)}],id={name}"
        for name in generic
    ]


def test_cloud_hypervisor_listens_for_a_network_interface_and_for_nothing_else(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(file.read_text().replace("queues = 2", 'queues = 2\nmode = "connect"'))
    told = Told(capsys, "cloud-hypervisor", file)
    assert told.refused == {"disk"}
    assert "vhost_mode=server" in told.values("--net")[0]


@pytest.mark.parametrize(
    ("socket", "written"),
    [("/run/my disks/a.sock", '"/run/my disks/a.sock"'), ('/run/a,[b]"c".sock', '"/run/a,[b]""c"".sock"')],
)
def test_cloud_hypervisor_reads_odd_paths_as_they_are(
    file: Path, capsys: pytest.CaptureFixture[str], socket: str, written: str
) -> None:
    file.write_text(table("disk", TYPES["disk"], socket))
    assert f",socket={written},num" in Told(capsys, "cloud-hypervisor", file).values("--disk")[0]


def test_cloud_hypervisor_refuses_queues_of_a_disk_that_are_too_small(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(table("disk", TYPES["disk"].replace("512", "2")))
    assert "4 entries or more" in Told(capsys, "cloud-hypervisor", file, status=1).said


def test_firecracker_has_disks_whose_flushes_arrive_and_nothing_else(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(capsys, "firecracker", file)
    assert told.refused == set(TYPES) - {"disk"}
    assert told.words[0] == "curl"
    assert "http://localhost/drives/disk" in told.words
    # Without Writeback it does not offer FLUSH to the guest.
    assert json.loads(told.values("-d")[0]) == {
        "drive_id": "disk",
        "socket": "/run/h/disk.sock",
        "is_root_device": False,
        "cache_type": "Writeback",
    }
    assert "drives one queue of disk" in told.said


def test_firecracker_gets_names_that_it_takes_each_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("".join(table(name, TYPES["disk"]) for name in ("a-b", "a.b", "a_b")))
    told = Told(capsys, "firecracker", file)
    drives = [json.loads(body) for body in told.values("-d")]
    assert [drive["drive_id"] for drive in drives] == ["a_b", "a_b_2", "a_b_3"]
    assert [drive["socket"] for drive in drives] == ["/run/h/a-b.sock", "/run/h/a.b.sock", "/run/h/a_b.sock"]
    assert len(told.text.splitlines()) == 3


def test_crosvm_has_the_types_that_it_names(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys, "crosvm", file, "--memory", "1G")
    assert told.refused == {"pins", "bus"}
    assert told.values("--mem") == ["1024"]
    assert told.values("--vhost-user") == [
        f"type={kind},socket=/run/h/{name}.sock,max-queue-size={size}"
        for name, kind, size in (
            ("disk", "block", 512),
            ("lan", "net", 256),
            ("entropy", "rng", 256),
            ("vs", "vsock", 256),
            ("keys", "input", 256),
            ("con", "console", 256),
        )
    ]
    file.write_text(table("disk", TYPES["disk"], '/run/a,b "c".sock'))
    assert 'socket="/run/a,b \\"c\\".sock",max' in Told(capsys, "crosvm", file).values("--vhost-user")[0]


def test_libkrun_has_a_call_for_every_device(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys, "libkrun", file)
    calls = re.findall(
        r'krun_add_vhost_user_device\(ctx, (\w+), "([^"]*)",\s+"(\w+)", (\d+), \(uint16_t\[\]\)\{([\d, ]+)\}\);',
        told.text,
    )
    assert [name for _, _, name, _, _ in calls] == list(TYPES)
    for kind, socket, name, count, written in calls:
        assert socket == f"/run/h/{name}.sock"
        assert int(count) == len(written.split(", ")) == QUEUES[name]
        assert kind == KINDS.get(name, str(NUMBERS[name]))
    assert told.refused == set()


def test_a_path_is_a_string_of_c(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    socket = '/run/"é\\n??/1.sock'
    file.write_text(table("disk", TYPES["disk"], socket))
    literal = Told(capsys, "libkrun", file).text.split("ctx, 2, ")[1].split(",\n")[0]
    assert ast.literal_eval(f"b{literal}").decode() == socket  # Python's octal escapes are C's
    assert "??" not in literal  # a trigraph


def test_user_mode_linux_has_words_for_every_device(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys, "uml", file, "--memory", "512M")
    assert told.words == [
        "mem=512M",
        *(f"virtio_uml.device=/run/h/{name}.sock:{NUMBERS[name]}" for name in TYPES),
    ]
    (note,) = [line for line in told.said.splitlines() if "ARCH=um" in line]
    assert "no driver for entropy (rng), pins (gpio), bus (i2c), keys (input):" in note


@pytest.mark.parametrize("path", ["/run/a:1.sock", "/run/a b.sock", "/run/a'b.sock", '/run/a"b.sock'])
def test_user_mode_linux_refuses_a_path_that_it_would_cut(
    file: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    file.write_text(table("disk", TYPES["disk"], path) + table("lan", TYPES["lan"]))
    told = Told(capsys, "uml", file)
    assert told.refused == {"disk"}
    assert "takes no path with a colon, a space or a quote" in told.said


@pytest.mark.parametrize("vmm", OTHERS)
def test_a_device_that_connects_is_refused_by_monitors_that_do_too(
    file: Path, capsys: pytest.CaptureFixture[str], vmm: str
) -> None:
    file.write_text(table("disk", TYPES["disk"] + '\nmode = "connect"'))
    told = Told(capsys, vmm, file, status=1)
    assert told.text == ""
    assert told.refused == {"disk"}
    assert 'mode = "connect" is for a front-end that listens' in told.said


@pytest.mark.parametrize("vmm", list(VMMS))
def test_every_monitor_takes_the_devices_of_one_guest_and_of_one_name(
    file: Path, capsys: pytest.CaptureFixture[str], vmm: str
) -> None:
    file.write_text(
        "".join(table(name, f'guest = "{guest}"\n{TYPES["disk"]}') for name, guest in (("a", "x"), ("b", "y")))
    )
    assert main(["attach", str(file), "--vmm", vmm]) == 1
    assert "--guest x or --guest y" in capsys.readouterr().err
    for arguments in (("--guest", "y"), ("b",)):
        told = capsys.readouterr() if main(["attach", str(file), *arguments, "--vmm", vmm]) == 0 else None
        assert told is not None
        assert "/run/h/b.sock" in told.out
        assert "/run/h/a.sock" not in told.out


@pytest.mark.parametrize("vmm", ["qemu", "libvirt"])
def test_qemu_and_libvirt_are_told_what_qemu_args_prints(
    file: Path, capsys: pytest.CaptureFixture[str], vmm: str
) -> None:
    assert main(["attach", str(file), "--vmm", vmm, "--qemu", "11.1", "--accel", "tcg"]) == 0
    attached = capsys.readouterr()
    libvirt = ["--libvirt"] if vmm == "libvirt" else []
    assert main(["qemu-args", str(file), *libvirt, "--qemu", "11.1", "--accel", "tcg"]) == 0
    assert capsys.readouterr() == attached


def test_an_unknown_monitor_is_wrong_usage_that_names_those_there_are(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["attach", str(file), "--vmm", "bochs"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert all(vmm in said for vmm in VMMS)


# hyperbell uml


def test_uml_prints_the_whole_command_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(table("disk", TYPES["disk"]))
    assert main(["uml", str(file), "--print", "--memory", "64M", "--", "linux.uml", "root=/dev/vda", "x=a b"]) == 0
    printed = capsys.readouterr()
    expected = ["linux.uml", "root=/dev/vda", "x=a b", "mem=64M", "virtio_uml.device=/run/h/disk.sock:2"]
    assert shlex.split(printed.out) == expected
    assert "cannot reconnect" in printed.err


def test_uml_becomes_the_program_with_the_devices_behind_its_arguments(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(table("disk", TYPES["disk"]) + table("lan", TYPES["lan"] + '\nmode = "connect"'))
    become: list[tuple[str, list[str]]] = []

    def execv(program: str, words: list[str]) -> None:
        become.append((program, words))
        raise OSError(8, "Exec format error")

    monkeypatch.setattr("os.execv", execv)
    linux = tmp_path / "linux"
    linux.write_text("")
    linux.chmod(0o755)
    assert main(["uml", str(file), "--", str(linux), "quiet"]) == 1
    words = [str(linux), "quiet", "mem=256M", "virtio_uml.device=/run/h/disk.sock:2"]
    assert become == [(str(linux), words)]
    said = capfd.readouterr().err
    assert 'hyperbell: device "lan": mode = "connect"' in said
    assert f"hyperbell: {linux} cannot be started: Exec format error" in said


def test_uml_says_what_it_lacks(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(table("disk", TYPES["disk"]))
    assert main(["uml", str(file), "--", "linux-none"]) == 1
    assert "there is no program linux-none; install it (Debian: user-mode-linux" in capsys.readouterr().err
    file.write_text(table("disk", TYPES["disk"] + '\nmode = "connect"'))
    assert main(["uml", str(file), "--print", "--", "linux-none"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["uml", str(file), "--guest", "web1", "--", "linux-none"]) == 1
    assert 'no device with guest = "web1"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "word"), [("attach", "--vmm firecracker | sh"), ("uml", "-- linux.uml root=/dev/vda")]
)
def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str], command: str, word: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert word in capsys.readouterr().out


@pytest.mark.parametrize("offered", [False, True])
def test_libkrun_is_noted_to_need_the_config_space_of_a_network_interface(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], offered: bool
) -> None:
    path = tmp_path / "net.toml"
    path.write_text(f'[devices.lan]\ntype = "net"\nsocket = "lan.sock"\noffer_config = {str(offered).lower()}\n')
    main(["attach", "--vmm", "libkrun", str(path)])
    assert ("set offer_config = true" in capsys.readouterr().err) is not offered
