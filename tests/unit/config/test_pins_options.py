"""What is wrong with the options of a gpio, i2c or input device is said with the key, before anything is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.cli import main

GPIO = 'type = "gpio"\nsocket = "s.sock"\n'


def complaints(tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str) -> str:
    """What `hyperbell check` says of a device with these keys; it must say something."""
    (tmp_path / "c.toml").write_text(f"[devices.d]\n{table}")
    assert main(["check", str(tmp_path / "c.toml")]) == 78
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", "lines: is missing"),
        ("lines = []", "lines"),
        ('lines = ["a", "b", "a"]', "names the line 'a' twice"),
        ('lines = ["a", 3]', "a line has a name, not the number 3"),
        ('lines = ["7"]', "a line has a name, not the number 7"),
        ('lines = ["caf\\u00e9"]', "printable ASCII"),
        ('lines = ["tab\\tbed"]', "printable ASCII"),
        (f'lines = ["{"x" * 64}"]', "up to 63"),
        ('lines = [" a"]', "begins nor ends with a blank"),
        ("lines = [true]", "lines"),
        ('lines = ["a"]\nqueues = 1', "queues: must be 2"),
        ('lines = ["a"]\nchip = "/dev/gpiochip0"', 'backend = "simulated" has no chip'),
        ('backend = "chip"\nlines = ["a"]', 'needs chip, for example: chip = "/dev/gpiochip0"'),
        ('backend = "chip"\nchip = "c"\nlines = [0, ""]', "every line has a name or an offset"),
        ('backend = "chip"\nchip = "c"\nlines = [70000]', "there is no line 70000"),
        ('backend = "chip"\nchip = "c"\nlines = [1]\ncontrol = "x"', "has no control"),
        ('backend = "chips"\nlines = ["a"]', "backend: must be 'simulated' or 'chip'"),
        ('lines = ["a"]\ncontrl = "x"', 'did you mean "control"'),
    ],
)
def test_wrong_options_of_gpio_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str, expected: str
) -> None:
    said = complaints(tmp_path, capsys, GPIO + keys)
    assert expected in said
    assert "c.toml:" in said


def test_a_control_socket_that_something_else_uses_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaints(tmp_path, capsys, GPIO + 'lines = ["a"]\ncontrol = "s.sock"')
    assert "is already" in said


I2C = 'type = "i2c"\nsocket = "s.sock"\n'
CHIP = "[[devices.d.chips]]\naddress = 0x48\n"
REGISTERS = "registers = [{number = 0}]\n"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (CHIP, 'kind = "registers" needs registers'),
        (CHIP + "registers = [{number = 0}, {number = 0}]", "number 0 is there twice"),
        (CHIP + "registers = [{number = 0, value = 256}]", "has no room in 1 bytes"),
        (CHIP + REGISTERS + "page = 8", 'kind = "registers" has no page'),
        (CHIP + 'kind = "eeprom"\nauto_increment = true', 'kind = "eeprom" has no auto_increment'),
        (CHIP + 'kind = "eeprom"\nsize = 300', "must be a power of two, not 300"),
        (CHIP + 'kind = "eeprom"\nsize = 16\npage = 32', "larger than the memory of 16"),
        (CHIP.replace("0x48", "0x7c") + REGISTERS, "one of the addresses that I2C reserves"),
        (CHIP.replace("0x48", "0x400") + REGISTERS, "address: must be at most"),
        (CHIP + REGISTERS + CHIP + REGISTERS, "two of them have the address 0x48"),
        ("addresses = [0x50]", 'backend = "simulated" has no addresses'),
        ('backend = "adapter"\naddresses = [0x50]', "needs adapter, for example"),
        ('backend = "adapter"\nadapter = "/dev/i2c-1"', "needs addresses"),
        ('backend = "adapter"\nadapter = "a"\naddresses = [1]', "addresses.0: must be at least 3"),
        ('backend = "adapter"\nadapter = "a"\naddresses = [80]\ncontrol = "c"', "neither chips nor control"),
    ],
)
def test_wrong_options_of_i2c_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str, expected: str
) -> None:
    assert expected in complaints(tmp_path, capsys, I2C + keys)


INPUT = 'type = "input"\nsocket = "s.sock"\n'


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ('events = ["KEY_NONE"]', "there is no event 'KEY_NONE'"),
        ('events = ["KEY_768"]', "there is no event 'KEY_768'"),
        ("range = [5, 5]", "range: the first value must be less"),
        (f'label = "{"x" * 129}"', "label"),
        ("grab = false", 'backend = "script" has no grab'),
        ('evdev = "/dev/input/event0"', 'backend = "script" has no evdev'),
        ('backend = "evdev"', "needs evdev, for example"),
        ('backend = "evdev"\nevdev = "e"\ncontrol = "c"', 'backend = "evdev" has no control'),
    ],
)
def test_wrong_options_of_input_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str, expected: str
) -> None:
    assert expected in complaints(tmp_path, capsys, INPUT + keys)


@pytest.mark.parametrize(
    ("table", "missing"),
    [
        (GPIO + 'backend = "chip"\nlines = [0]\nchip = "none"', "chip"),
        (I2C + 'backend = "adapter"\naddresses = [80]\nadapter = "none"', "adapter"),
        (INPUT + 'backend = "evdev"\nevdev = "none"', "evdev"),
    ],
    ids=["gpio", "i2c", "input"],
)
def test_a_device_node_that_is_not_there_is_named_when_checked_and_when_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, missing: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[daemon]\nmetrics = "off"\n[devices.d]\n' + table)
    main(["check", str(file)])
    said = "".join(capsys.readouterr())
    assert f"{missing}: {tmp_path}/none does not exist" in said
    assert main(["serve", str(file), "--strict"]) == 1
    said = "".join(capsys.readouterr())
    assert f"[devices.d] {missing} {tmp_path}/none: No such file or directory; " in said
