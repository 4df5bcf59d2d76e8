"""``hyperbell serve``: the daemon, in the foreground."""

from __future__ import annotations

import argparse
import signal
from functools import partial
from typing import Final

import structlog
import trio

from daemon.checks.preflight import check_inherited_sockets
from daemon.commands.command import EXIT_FAILURE, EXIT_OK, Command, add_file, load_config
from daemon.log import setup as log
from daemon.running.app import STOP_SIGNALS, App, LogChoice
from daemon.running.descriptors import raise_limit, too_few
from daemon.running.failures import leaves
from daemon.running.hardening import harden
from daemon.running.slow_steps import SlowSteps
from daemon.running.systemd import Notifier
from virtio.errors import HostError

EPILOG: Final = """\
signals:
  SIGTERM, SIGINT  stop: in-flight requests are finished, sockets removed
  SIGHUP           reload: log level and format, each device's hypercall, and images that grew or shrank;
                   what else changed is logged as "needs a restart". Failed devices are tried again

A device that cannot be had (its image is missing, its tap is gone, its Python file fails) is logged, shown by
hyperbell show as failed, and tried again at SIGHUP and by itself, at first after a second and then ever more seldom,
up to once a minute. All other devices are served meanwhile. With --strict the daemon ends instead.

example:
  hyperbell --log-format human serve /etc/hyperbell/hyperbell.toml
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("--strict", action="store_true", help="end with status 1 when a device cannot be had")


def serve(arguments: argparse.Namespace) -> int:
    """Run the daemon in the foreground."""
    early: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, frame: early.append(number))  # it would end the process
    load = partial(load_config, arguments.file, lenient=not arguments.strict)
    config = load()
    choice = LogChoice(arguments.log_level, arguments.log_format)
    choice.apply(config)
    check_inherited_sockets(config)
    notifier = Notifier.from_environment()
    raise_limit()
    harden()
    app = App(config, load, choice, notifier, strict=arguments.strict, early_signals=early)
    logger = structlog.get_logger()
    if shortage := too_few(config):
        logger.warning(shortage)
    status = EXIT_OK
    # Nothing needs to be undone until now; from here on a signal is kept until the daemon can obey it.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: early.append(number))
    with log.in_background():
        try:
            trio.run(app.run, instruments=[SlowSteps()])
        except* HostError as group:
            status = EXIT_FAILURE
            for error in leaves(group):
                logger.error("cannot serve", reason=str(error))
        except* Exception as unforeseen:
            status = EXIT_FAILURE
            logger.error("stopped by a mistake in hyperbell", exc_info=unforeseen)
        finally:
            for number in (*STOP_SIGNALS, signal.SIGHUP):  # a second one changes nothing any more
                signal.signal(number, signal.SIG_IGN)
        logger.info("stopped", status=status)
    return status


COMMAND: Final = Command("serve", "run the daemon in the foreground", serve, add_options, EPILOG)
