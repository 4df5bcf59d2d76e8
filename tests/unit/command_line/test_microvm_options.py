"""The command line of ``hyperbell microvm``."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from config.problems import ConfigError
from daemon.cli import _parser
from daemon.microvm.options import MicrovmOptions, read_options
from transports.hypercall import derive_key
from virtio.errors import HostError


def options(*words: str) -> MicrovmOptions:
    return read_options(_parser().parse_args(["microvm", "--kernel", "vmlinux", *words]))


def test_what_is_not_said_has_a_sensible_value() -> None:
    made = options()
    assert (made.kernel, made.initrd, made.cpus, made.memory_size) == (Path("vmlinux"), None, 1, 256 << 20)
    assert (made.key, made.nested, made.early_serial, dict(made.devices)) == (None, False, False, {})
    assert (made.daemon.metrics_address, made.daemon.control) == (None, None)
    assert made.command_line == "console=hvc0 panic=-1"


def test_everything_that_is_said_arrives() -> None:
    made = options(
        *("--initrd", "i.cpio", "--memory", "3G", "--cpus", "4", "--append", "quiet root=/dev/vda"),
        *("--device", "blk,backend=null,size=1M,name=root", "--device", "rng,hypercall=withhold"),
        *("--metrics", "127.0.0.1:0", "--control", "ctl.sock", "--key", "5a5a5a", "--nested", "--early-serial"),
    )
    assert (made.initrd, made.memory_size, made.cpus, made.key) == (Path("i.cpio"), 3 << 30, 4, 0x5A5A5A)
    assert [(name, device.common.hypercall) for name, device in made.devices.items()] == [
        ("root", "offer"),
        ("rng", "withhold"),
    ]
    assert made.daemon.metrics_address == ("127.0.0.1", 0)
    assert made.daemon.control == Path("ctl.sock")
    assert made.command_line == "console=hvc0 panic=-1 earlyprintk=ttyS0,115200 quiet root=/dev/vda"
    assert made.nested


def test_a_key_is_derived_from_secret_and_uuid(tmp_path: Path) -> None:
    import uuid

    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    name = uuid.uuid4()
    made = options("--secret", str(secret), "--uuid", str(name))
    assert made.key == derive_key(b"0123456789abcdef0123456789abcdef", name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "blk,pth=x"], '--device blk,pth=x: pth: unknown key\n    did you mean "path"?'),
        (["--memory", "4G"], "--memory: 4G is more than this machine has room for"),
        (["--metrics", "nowhere"], "--metrics: must be an address and a port"),
        (["--metrics", "0.0.0.0:80"], "--metrics: 0.0.0.0 is not a loopback address"),
        (["--control", "x" * 200], "--control: is 200 bytes long"),
    ],
)
def test_a_mistake_names_its_option(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        options(*words)
    assert said in str(raised.value)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        options("--device", "nothing", "--metrics", "nowhere", "--memory", "5G")
    assert len(raised.value.problems) == 3


def test_a_key_that_can_be_none_is_refused() -> None:
    with pytest.raises(HostError, match="--key"):
        options("--key", "0")


@pytest.mark.parametrize("words", [["--cpus", "0"], ["--cpus", "two"], ["--memory", "lots"], ["disk.toml"]])
def test_wrong_usage_is_told_by_the_parser(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        options(*words)
    assert raised.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_help_shows_a_whole_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["microvm", "--help"])
    text = capsys.readouterr().out
    for word in ("--kernel", "--device blk,path=disk.img", "Ctrl-A x", "exit status", "hvc0"):
        assert word in text


# What `apt-cache depends linux-image-cloud-amd64` prints.
DEPENDS = {
    "linux-image-6.1.0-57-cloud-amd64": "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-57-cloud-amd64\n",
    "linux-image-6.12.118+deb13-cloud-amd64": (
        "linux-image-cloud-amd64\n  Depends: linux-image-6.12.118+deb13-cloud-amd64\n"
        "  Conflicts: <linux-image-generic>\n"
    ),
}


@pytest.mark.parametrize("package", DEPENDS)
def test_help_names_packages_that_hold_a_kernel_and_the_example_finds_one(
    package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["microvm", "--help"])
    text = capsys.readouterr().out
    (script,) = re.findall(r"apt-cache depends \S+ \| grep -o '(.*)'\)", text)
    found = subprocess.run(["grep", "-o", script], input=DEPENDS[package], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [package]
    named = [
        re.escape(name).replace("N", r"[\d.]+") for name in re.findall(r"^ .*?(linux-\S+amd64)", text, re.MULTILINE)
    ]
    assert any(re.fullmatch(name, package) for name in named)
