"""The command ``hyperbell``."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from config.json_schema import json_schema
from config.loader import Config, load
from config.problems import ConfigError
from daemon import command_options as options
from daemon.attach import commands as attaching
from daemon.attach.qemu_start import chosen_key, hypercall_socket, preload_environment, run_qemu, without_kvm
from daemon.checks.host import become
from daemon.checks.preflight import check_inherited_sockets, foreign_packages, host_faults, host_notes
from daemon.devices.catalogue import device_types
from daemon.doorbells.measure import run as run_doorbells
from daemon.log import setup as log
from daemon.microvm.options import EPILOG as MICROVM_EPILOG
from daemon.microvm.options import add_options as add_microvm_options
from daemon.new_device import EPILOG as NEW_DEVICE_EPILOG
from daemon.new_device import add_arguments as add_new_device_arguments
from daemon.new_device import new_device
from daemon.running.app import STOP_SIGNALS, App, LogChoice
from daemon.running.control import ask
from daemon.running.descriptors import raise_limit, too_few
from daemon.running.disks import REOPEN_EPILOG, REOPEN_SECONDS, RETRY_EPILOG
from daemon.running.disks import add_device as add_disk
from daemon.running.failures import leaves
from daemon.running.hardening import harden
from daemon.running.links import EPILOG as LINK_EPILOG
from daemon.running.links import add_options as add_link_options
from daemon.running.slow_steps import SlowSteps
from daemon.running.systemd import Notifier
from daemon.show import render
from daemon.state import version
from transports import TRANSPORTS
from virtio.devices import REGISTRY
from virtio.errors import HostError

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2  # argparse's own
EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell has it

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_EPILOG: Final = """\
a first disk:
  truncate -s 1G disk.img
  printf '[devices.disk]\\ntype = "blk"\\npath = "disk.img"\\nsocket = "disk.sock"\\n' > disk.toml
  hyperbell check disk.toml
  hyperbell serve disk.toml &
  eval "qemu-system-x86_64 -nographic -kernel vmlinuz -append console=ttyS0 $(hyperbell qemu-args disk.toml)"

Each command has its own --help. Exit status: 0 success, 1 failure, 2 wrong usage, 78 wrong configuration.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Wrong usage raises ``SystemExit(2)``, as argparse does."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = command(arguments)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(error, file=sys.stderr)
        count = len(error.problems)
        print(f"hyperbell: {count} mistake{'s' if count > 1 else ''} in the configuration", file=sys.stderr)
        return EXIT_CONFIG
    except HostError as error:
        print(f"hyperbell: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except BrokenPipeError:  # `hyperbell schema | head`
        _forget_output()
        return EXIT_FAILURE
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:  # a file's has its name
            raise
        _forget_output()
        print(f"hyperbell: the output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseExceptionGroup as group:  # what trio makes of one, and of whatever else went wrong meanwhile
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return EXIT_INTERRUPTED


def _forget_output() -> None:
    """What is still buffered goes nowhere, without a complaint at the end."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def load_config(path: Path, *, lenient: bool = False) -> Config:
    """The configuration at ``path``, checked against what this daemon has to offer."""
    return load(path, device_types(), TRANSPORTS, lenient=lenient)


# Commands


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


def check(arguments: argparse.Namespace) -> int:
    """Say everything that is wrong with a configuration."""
    if arguments.user is not None:
        become(arguments.user)
    config = load_config(arguments.file)
    faults = host_faults(config, as_daemon=arguments.user is not None)
    if faults:
        raise ConfigError(faults)
    for package, owners in foreign_packages().items():
        raise HostError(
            f'the package "{package}" here belongs to {", ".join(owners)} too, which may have overwritten ours; '
            "install hyperbell into a virtual environment of its own"
        )
    for note in host_notes(config):
        print(f"note: {note}", file=sys.stderr)
    if shortage := too_few(config):
        print(f"note: {shortage}", file=sys.stderr)
    devices = ", ".join(f"{device.name} ({device.common.type})" for device in config.devices.values())
    print(f"{config.path}: correct. Devices: {devices}")
    return EXIT_OK


def qemu(arguments: argparse.Namespace) -> int:
    """Become QEMU, with the preload library."""
    socket = arguments.socket
    if socket is None:
        socket = hypercall_socket(load_config(arguments.config))
    key = chosen_key(arguments.key, arguments.secret, arguments.uuid)
    environment = preload_environment(socket, key, arguments.name)
    reason = without_kvm(arguments.command)
    if reason:
        print(f"note: {reason}: the guest has no hypercall doorbell and rings by plain ones", file=sys.stderr)
    run_qemu(arguments.command, environment)


def hypercall(arguments: argparse.Namespace) -> int:
    """Change who may ring by hypercall, in the running daemon."""
    answer = ask(_control_of(arguments), "hypercall", device=arguments.device, policy=arguments.policy)
    print(f"{arguments.device}: {arguments.policy}{'' if answer['changed'] else ' (as before)'}")
    if not answer.get("reaches_vms", True):  # a daemon of an earlier version says nothing of it
        print(
            f"note: {arguments.device}: no VM reports its doorbells now, so none could ring by hypercall; it would "
            "take [daemon] hypercall_socket, and a QEMU that hyperbell qemu has started",
            file=sys.stderr,
        )
    return EXIT_OK


def link(arguments: argparse.Namespace) -> int:
    """Plug a network interface's cable in or out, in the running daemon."""
    answer = ask(_control_of(arguments), "link", device=arguments.device, state=arguments.state)
    print(f"{arguments.device}: {arguments.state}{'' if answer['changed'] else ' (as before)'}")
    if not answer["guest_is_told"]:
        print(
            f"note: {arguments.device}: no guest is told of it: none is connected, or its front-end (QEMU's is such) "
            "takes no notice",
            file=sys.stderr,
        )
    return EXIT_OK


def reopen(arguments: argparse.Namespace) -> int:
    """Open a disk's image again, in the running daemon."""
    ask(_control_of(arguments), "reopen", device=arguments.device, wait_seconds=REOPEN_SECONDS + 5)
    print(f"{arguments.device}: opened again; check the file systems of its guest")
    return EXIT_OK


def retry(arguments: argparse.Namespace) -> int:
    """Try again what a stopped disk keeps, in the running daemon."""
    answer = ask(_control_of(arguments), "retry", device=arguments.device)
    print(f"{arguments.device}: {'tried again' if answer['stopped'] else 'not stopped'}")
    return EXIT_OK


def microvm(arguments: argparse.Namespace) -> int:
    """Run a Linux guest of our own."""
    from daemon.microvm.run import run  # only here: nothing else needs a KVM that can be talked to

    return run(arguments)


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON schema of the configuration."""
    print(json.dumps(json_schema(device_types(), TRANSPORTS), indent=2))
    return EXIT_OK


def show(arguments: argparse.Namespace) -> int:
    """Print what a running daemon does."""
    stats = ask(_control_of(arguments), "stats")
    print(json.dumps(stats, indent=2) if arguments.json else render(stats))
    return EXIT_OK


def _control_of(arguments: argparse.Namespace) -> Path:
    """The control socket that the command line gives, or the configuration that it names."""
    if arguments.control is not None:
        path: Path = arguments.control
        return path
    config = load_config(arguments.file, lenient=True)
    if config.daemon.control is None:
        raise HostError(
            f'{config.path} has no control socket; add to [daemon]: control = "/run/hyperbell/control.sock"'
        )
    return config.daemon.control


def doorbells(arguments: argparse.Namespace) -> int:
    """Measure the doorbells of this host."""
    return EXIT_OK if run_doorbells(as_json=arguments.json, save_to=arguments.save) else EXIT_FAILURE


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperbell",
        description=f"Serves virtio devices ({', '.join(sorted(REGISTRY))}, and any written in Python)\n"
        "to QEMU/KVM guests over vhost-user, and to guests of its own.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hyperbell {version()}")
    options.add_log_options(parser, default=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        # Also after the command; SUPPRESS keeps what stands before it.
        options.add_log_options(command, default=argparse.SUPPRESS)
        return command

    options.add_serve_options(add("serve", serve, "run the daemon in the foreground", options.SERVE_EPILOG))
    options.add_check_options(add("check", check, "print every mistake in a configuration", options.CHECK_EPILOG))
    _add_attaching(add)
    options.add_qemu_options(
        add("qemu", qemu, "start QEMU so that its guest can ring by hypercall", options.QEMU_EPILOG)
    )
    options.add_hypercall_options(
        add("hypercall", hypercall, "change who may ring by hypercall", options.HYPERCALL_EPILOG)
    )
    link_parser = add("link", link, "plug a network interface's cable in or out", LINK_EPILOG)
    add_link_options(link_parser)
    options.add_control(link_parser)
    reopen_parser = add("reopen", reopen, "open a disk's image again after a flush failed", REOPEN_EPILOG)
    add_disk(reopen_parser)
    options.add_control(reopen_parser)
    retry_parser = add("retry", retry, "try again the requests that a stopped disk keeps", RETRY_EPILOG)
    add_disk(retry_parser)
    options.add_control(retry_parser)
    text = "run a Linux guest on virtio-mmio devices of ours, without QEMU"
    add_microvm_options(add("microvm", microvm, text, MICROVM_EPILOG), options.memory_size)
    add_new_device_arguments(add("new-device", new_device, "write a device, its test and its file", NEW_DEVICE_EPILOG))
    add("schema", schema, "print the JSON schema (2020-12) of the configuration")
    options.add_show_options(add("show", show, "print what a running daemon serves and counts", options.SHOW_EPILOG))
    options.add_doorbell_options(
        add("doorbells", doorbells, "measure what each kind of doorbell costs", options.DOORBELLS_EPILOG)
    )
    return parser


def _add_attaching(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that are about front-ends."""

    def with_config(
        command: Callable[[argparse.Namespace, attaching.LoadConfig], int],
    ) -> Callable[[argparse.Namespace], int]:
        return lambda arguments: command(arguments, load_config)

    text = "print the QEMU options that attach the devices"
    attaching.add_qemu_args_options(
        add("qemu-args", with_config(attaching.qemu_args), text, attaching.QEMU_ARGS_EPILOG)
    )
    text = "print what another virtual machine monitor is told"
    attaching.add_attach_options(add("attach", with_config(attaching.attach), text, attaching.ATTACH_EPILOG))
    text = "start User-mode Linux with the devices"
    attaching.add_uml_options(add("uml", with_config(attaching.user_mode_linux), text, attaching.UML_EPILOG))


if __name__ == "__main__":
    sys.exit(main())
