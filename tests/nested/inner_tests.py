"""The project's own tests of virtual machines, run again in H: on a mainline KVM, which has hypercalls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guest.boot.toy import prepare_toy
from guest.nested.level import Level

CACHE = "/tmp/inner-tests"
# Without what these tests do not use: imports are what takes the time in an emulated machine.
PYTEST = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 pytest -p pytest_trio.plugin --noconftest -v --color=no --no-header"
OUTCOME = re.compile(r"\S+::(\S+) (PASSED|FAILED|SKIPPED|ERROR)")


@dataclass(frozen=True)
class InnerRun:
    """Each selected test by its name (with its parameters), how it went, and all that was printed."""

    outcomes: Mapping[str, str]
    text: str

    @property
    def not_passed(self) -> Mapping[str, str]:
        return {name: outcome for name, outcome in self.outcomes.items() if outcome != "PASSED"}


async def run_tests_in(host: Level, files: Sequence[str], selection: str, timeout_seconds: float) -> InnerRun:
    """Run what ``selection`` (pytest's ``-k``) leaves of the integration tests in ``files``."""
    places = " ".join(f"tests/integration/{name}.py" for name in files)
    pytest = f"HYPERBELL_CACHE={CACHE} {PYTEST} --basetemp {CACHE}/tmp {places} -k '{selection}'"
    command = f"mkdir -p {CACHE} && cd /project && {pytest}"
    answer = await host.run(command, status=None, timeout_seconds=timeout_seconds)
    found = filter(None, map(OUTCOME.match, answer.lines))
    return InnerRun({match[1]: match[2] for match in found}, "\n".join(answer.lines))


async def bring_toy(host: Level) -> None:
    """The toy guest's programs, where the tests in ``host`` find them made: there is no compiler in it."""
    toy = prepare_toy(print)
    await host.run(f"mkdir -p {CACHE}")
    for program in (toy.bits32, toy.bits64):
        await host.write(f"{CACHE}/{program.name}", program.read_bytes())
