"""Names of input events, as Linux calls them (linux/input-event-codes.h); any other code is given by its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EV_SYN: Final = 0
EV_KEY: Final = 1
EV_REL: Final = 2
EV_ABS: Final = 3
EV_MSC: Final = 4
EV_SW: Final = 5
EV_LED: Final = 0x11
EV_SND: Final = 0x12
SYN_REPORT: Final = 0
SYN_DROPPED: Final = 3

CODE_COUNTS: Final[Mapping[int, int]] = {
    EV_KEY: 0x300,
    EV_REL: 16,
    EV_ABS: 64,
    EV_MSC: 8,
    EV_SW: 17,
    EV_LED: 16,
    EV_SND: 8,
}
"""The event types that are passed on, and how many codes each can have."""

_KEYS: Final = (
    (1, "ESC 1 2 3 4 5 6 7 8 9 0 MINUS EQUAL BACKSPACE TAB Q W E R T Y U I O P LEFTBRACE RIGHTBRACE ENTER LEFTCTRL"),
    (30, "A S D F G H J K L SEMICOLON APOSTROPHE GRAVE LEFTSHIFT BACKSLASH Z X C V B N M COMMA DOT SLASH RIGHTSHIFT"),
    (55, "KPASTERISK LEFTALT SPACE CAPSLOCK F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 NUMLOCK SCROLLLOCK KP7 KP8 KP9 KPMINUS"),
    (75, "KP4 KP5 KP6 KPPLUS KP1 KP2 KP3 KP0 KPDOT"),
    (86, "102ND F11 F12"),
    (96, "KPENTER RIGHTCTRL KPSLASH SYSRQ RIGHTALT LINEFEED HOME UP PAGEUP LEFT RIGHT END DOWN PAGEDOWN INSERT DELETE"),
    (113, "MUTE VOLUMEDOWN VOLUMEUP POWER KPEQUAL"),
    (119, "PAUSE"),
    (125, "LEFTMETA RIGHTMETA COMPOSE"),
)
_BUTTONS: Final = ((0x110, "LEFT RIGHT MIDDLE SIDE EXTRA FORWARD BACK TASK"), (0x14A, "TOUCH"))
_AXES: Final = ((0, "X Y Z RX RY RZ"),)
_WHEELS: Final = ((0, "X Y Z RX RY RZ HWHEEL DIAL WHEEL MISC"),)
_LEDS: Final = ((0, "NUML CAPSL SCROLLL COMPOSE KANA SLEEP SUSPEND MUTE MISC MAIL CHARGING"),)


def _named(prefix: str, kind: int, runs: tuple[tuple[int, str], ...]) -> dict[str, tuple[int, int]]:
    return {
        f"{prefix}_{name}": (kind, first + offset) for first, names in runs for offset, name in enumerate(names.split())
    }


CODES: Final[Mapping[str, tuple[int, int]]] = {
    **_named("KEY", EV_KEY, _KEYS),
    **_named("BTN", EV_KEY, _BUTTONS),
    **_named("REL", EV_REL, _WHEELS),
    **_named("ABS", EV_ABS, _AXES),
    **_named("LED", EV_LED, _LEDS),
}
"""Name to event type and code."""

_PREFIXES: Final = {
    EV_KEY: "KEY",
    EV_REL: "REL",
    EV_ABS: "ABS",
    EV_MSC: "MSC",
    EV_SW: "SW",
    EV_LED: "LED",
    EV_SND: "SND",
}
_NAMES: Final = {code: name for name, code in CODES.items()}

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "keyboard": (*(name for name in CODES if name.startswith("KEY_")), "LED_NUML", "LED_CAPSL", "LED_SCROLLL"),
    "mouse": ("BTN_LEFT", "BTN_RIGHT", "BTN_MIDDLE", "REL_X", "REL_Y", "REL_WHEEL"),
    "tablet": ("BTN_LEFT", "BTN_RIGHT", "BTN_MIDDLE", "BTN_TOUCH", "ABS_X", "ABS_Y", "REL_WHEEL"),
}


def parse_code(text: str) -> tuple[int, int]:
    """Event type and code of a name, or of ``KEY_`` and so on with a number: ``KEY_240``. ``ValueError``."""
    if text in CODES:
        return CODES[text]
    prefix, _, number = text.partition("_")
    for kind, known in _PREFIXES.items():
        if prefix == known and number.isascii() and number.isdecimal() and int(number[:5]) < CODE_COUNTS[kind]:
            return kind, int(number)
    raise ValueError(f"there is no event {text!r} (names as KEY_A, REL_X; other codes by number, as KEY_240)")


def code_name(kind: int, code: int) -> str:
    """As ``parse_code`` reads it."""
    return _NAMES.get((kind, code), f"{_PREFIXES[kind]}_{code}")
