"""Which C file uses which other, in every folder with C of ours: one way, without circles.

A file uses another when it names a function that the other defines. That is read from the text, without comments,
strings and preprocessor lines, so a function that a file gets as an address counts like one that it calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

import pytest
from kit.project import ROOT

FOLDERS: Final = (
    "guest/linux",
    "guest/toy",
    "transports/kvm/native",
    "transports/stock_qemu/library",
    "virtio/dataplane",
    "virtio/usernet",
)
# The hot code of a ring is compiled twice, the second time for guest memory in pieces.
TEMPLATES: Final = frozenset({("ring/packed_scattered.c", "ring/packed.c"), ("ring/split_scattered.c", "ring/split.c")})

COMMENT_OR_LITERAL: Final = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'""", re.DOTALL | re.VERBOSE
)
DIRECTIVE: Final = re.compile(r"^[ \t]*#(?:.*\\\n)*.*$", re.MULTILINE)
INCLUDE: Final = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
NAME: Final = re.compile(r"[A-Za-z_]\w*")

Graph: TypeAlias = Mapping[str, Set[str]]


def code_of(text: str) -> str:
    """C without comments, strings and preprocessor lines."""
    return DIRECTIVE.sub("", COMMENT_OR_LITERAL.sub(" ", text))


def functions_of(code: str) -> dict[str, bool]:
    """The functions that are defined, and whether each can be seen from other files."""
    found = {}
    depth = begin = 0
    for brace in re.finditer(r"[{}]", code):
        if brace[0] == "}":
            depth -= 1
            begin = brace.end()
        else:
            depth += 1
            head = code[begin : brace.start()].split(";")[-1]
            name = re.search(r"([A-Za-z_]\w*)\s*\(", re.sub(r"__attribute__\s*\(\(.*?\)\)", "", head, flags=re.DOTALL))
            if depth == 1 and name and "=" not in head:
                found[name[1]] = "static" not in NAME.findall(head[: name.start()])
    return found


def uses(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Of each file the others whose functions it names."""
    codes = {name: code_of(text) for name, text in sources.items()}
    own = {name: functions_of(code) for name, code in codes.items()}
    homes: dict[str, set[str]] = {}
    for name, functions in own.items():
        for function, visible in functions.items():
            if visible:
                homes.setdefault(function, set()).add(name)
    return {
        name: {home for word in set(NAME.findall(code)) - own[name].keys() for home in homes.get(word, ())}
        for name, code in codes.items()
    }


def reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    ahead = set(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead |= graph.get(name, set())
    return found


def circles(graph: Graph) -> frozenset[frozenset[str]]:
    """The groups in which every member leads to every other."""
    reach = {name: reachable(graph, name) for name in graph}
    return frozenset(
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    )


@cache
def sources_of(folder: str, pattern: str) -> Mapping[str, str]:
    home = ROOT / folder
    return {str(path.relative_to(home)): path.read_text(encoding="utf-8") for path in sorted(home.rglob(pattern))}


def includes_of(folder: str) -> dict[str, set[str]]:
    """What each file includes of its folder: by a path from the folder, or from the file's own."""
    sources = sources_of(folder, "*.[ch]")
    return {
        name: {
            found
            for path in INCLUDE.findall(text)
            for found in (path, str(Path(name).parent / path))
            if found in sources
        }
        for name, text in sources.items()
    }


def is_template(name: str) -> bool:
    return name in {user for user, _ in TEMPLATES}


def test_the_reader_of_c_knows_definitions_uses_and_circles() -> None:
    one = """
    /* two_call() in a comment */
    #define MACRO(x) two_hidden(x)
    static struct row table[] = { { .run = two_listed } };
    static int helper(void) { return 0; }
    __attribute__((visibility("default"))) int one_call(int (*then)(int), ...)
    {
        if (helper()) { return say("two_said()"); }
        return '"' == 34 ? two_used(1) : 0; // two_call()
    }
    """
    two = """
    int two_used(int x) { return x; }
    int two_listed(void)
    {
        return 0;
    }
    int two_call(void);
    int helper(void);
    """
    assert functions_of(code_of(one)) == {"helper": False, "one_call": True}
    assert functions_of(code_of(two)) == {"two_used": True, "two_listed": True}
    assert uses({"one.c": one, "two.c": two}) == {"one.c": {"two.c"}, "two.c": set()}
    assert circles(uses({"one.c": one, "two.c": two})) == frozenset()
    back = two + "int three(void) { return one_call(0); }"
    assert circles(uses({"one.c": one, "two.c": back})) == {frozenset({"one.c", "two.c"})}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"e"}}) == {
        frozenset({"a", "b", "c"}),
        frozenset({"e"}),
    }


def test_every_folder_with_c_is_looked_at() -> None:
    tops = ("guest/linux", "guest/toy", "transports", "virtio")
    files = {path for top in tops for path in (ROOT / top).rglob("*.c") if not path.name.startswith("_")}
    looked_at = {ROOT / folder / name for folder in FOLDERS for name in sources_of(folder, "*.c")}
    assert files == looked_at
    for folder in FOLDERS:
        assert all(
            functions_of(code_of(text)) for name, text in sources_of(folder, "*.c").items() if not is_template(name)
        )
    assert "vcpu.c" in uses(sources_of("transports/kvm/native", "*.c"))["vm.c"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_includes_form_no_circle(folder: str) -> None:
    includes = includes_of(folder)
    assert any(includes.values())
    assert circles(includes) == frozenset()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_c_file_includes_another_only_as_a_template(folder: str) -> None:
    pairs = {(name, path) for name, paths in includes_of(folder).items() for path in paths if path.endswith(".c")}
    assert pairs == (TEMPLATES if folder == "virtio/dataplane" else frozenset())


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_c_files_call_each_other_in_a_circle(folder: str) -> None:
    assert circles(uses(sources_of(folder, "*.c"))) == frozenset()


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_c_file_begins_with_what_belongs_there(folder: str) -> None:
    for name, text in sources_of(folder, "*.c").items():
        first = re.sub(r"\A// SPDX-License-Identifier: .*\n", "", text)
        assert re.match(r"/\*[\s*]*\w.*?\w.*?\*/", first, re.DOTALL), f"{folder}/{name} does not say what it is for"
