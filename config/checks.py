"""Checks that need more than one table: a device and its type, its workers, and the other devices."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from config.claims import claims_of, faults_in_files_of
from config.made import paths_in, texts_in
from config.origins import KeyPath
from config.problems import closest, toml_value
from config.real_paths import real_path
from config.schema import (
    DEFAULT_WORKER,
    KEYED_FEATURES,
    NOT_OVER_VHOST_USER,
    SHORTER_FOLDER,
    SOCKET_PATH_MAX,
    DeviceConfig,
    DeviceTable,
    DeviceType,
    socket_path_fault,
)


class Finding(NamedTuple):
    """Something wrong with the value at ``path``; the loader adds file and line, those of ``other`` to the message."""

    path: KeyPath
    message: str
    hint: str
    other: KeyPath = ()


@dataclass(frozen=True, slots=True)
class DeviceDraft:
    """A device table as far as it could be understood.

    ``type`` and ``options`` are ``None`` when they have errors of their own; the keys of ``common`` that do are
    named in ``faulty`` and hold stand-ins, which no check may look at.
    """

    name: str
    type: DeviceType | None
    common: DeviceConfig
    faulty: frozenset[str]
    options: BaseModel | None


def check_device(draft: DeviceDraft, workers: Collection[str], transports: Collection[str]) -> Iterator[Finding]:
    """What is wrong between one device's common keys and its type, transport and workers."""
    path, common, device_type = ("devices", draft.name), draft.common, draft.type
    if common.transport not in transports:
        message = f"there is no transport {toml_value(common.transport)}"
        yield Finding((*path, "transport"), message, closest(common.transport, transports))
    if device_type is None:
        return
    for feature in NOT_OVER_VHOST_USER:
        if common.features.get(feature):
            yield Finding((*path, "features", feature), NOT_OVER_VHOST_USER[feature], "leave it out")
    yield from check_against_type(path, common, device_type, draft.faulty)
    if common.worker_names:
        key_path = (*path, "worker" if common.worker is not None else "workers")
        yield from _check_workers(key_path, draft, device_type, workers)


def check_against_type(
    path: KeyPath, common: DeviceTable, device_type: DeviceType, faulty: Collection[str] = ()
) -> Iterator[Finding]:
    """What is wrong between a device's keys and what its type can do; ``faulty`` keys are not looked at."""
    for feature in common.features:
        if feature in device_type.features_kept:
            message = f"is always offered: {device_type.features_kept[feature]}"
            yield Finding((*path, "features", feature), message, "leave it out")
        elif feature not in device_type.features:
            message = f"a {common.type} device has no such feature that could be turned off"
            yield Finding((*path, "features", feature), message, closest(feature, device_type.features))
        elif (finding := _check_keyed_feature(path, common, feature, faulty)) is not None:
            yield finding
    queues, size = common.queues, common.queue_size
    least, most = device_type.queues_min, device_type.queues_max
    if queues is not None and not least <= queues <= most and "queues" not in faulty:
        possible = f"{least}" if least == most else f"from {least} to {most}"
        message = f"must be {possible} for a {common.type} device, not {queues}"
        yield Finding((*path, "queues"), message, f"for example: queues = {device_type.queues_default}")
    said = size != type(common).model_fields["queue_size"].default  # else it is what the device can do
    if size > device_type.queue_size_max and said and "queue_size" not in faulty:
        message = f"must be at most {device_type.queue_size_max} for a {common.type} device, not {size}"
        yield Finding((*path, "queue_size"), message, f"for example: queue_size = {device_type.queue_size_max}")


def _check_keyed_feature(path: KeyPath, common: DeviceTable, feature: str, faulty: Collection[str]) -> Finding | None:
    """A feature with a key of its own may be turned off like any other; the two must not contradict each other."""
    key, on = KEYED_FEATURES.get(feature), common.features[feature]
    if key is None or key in faulty or "features" in faulty:
        return None
    if on and not getattr(common, key):
        return Finding((*path, "features", feature), f"is offered by a key of its own: {key}", f"write {key} = true")
    if not on and getattr(common, key) and not type(common).model_fields[key].default:
        return Finding((*path, "features", feature), f"turns off what {key} = true offers", "keep one of the two")
    return None


def _check_workers(
    path: KeyPath, draft: DeviceDraft, device_type: DeviceType, workers: Collection[str]
) -> Iterator[Finding]:
    names = draft.common.worker_names
    queues = draft.common.queues or device_type.queues_default
    if not device_type.native:
        message = f"a {draft.common.type} device has no worker: it runs in the daemon's event loop"
        yield Finding(path, message, "remove the key")
        return
    for name in names:
        if name not in workers and name != DEFAULT_WORKER:
            hint = closest(name, workers) or f"add a table [workers.{name}]"
            yield Finding(path, f"there is no worker {toml_value(name)}", hint)
    if "queues" not in draft.faulty and len(names) > queues:
        message = f"names {len(names)} workers for queues = {queues}: the last would have no work"
        yield Finding(path, message, f"name fewer workers, or set queues = {len(names)}")


def check_sharers(
    devices: Iterable[tuple[str, BaseModel, tuple[str, ...]]],
) -> Iterator[tuple[str, str, str, str]]:
    """Devices (name, options, workers) that stand on one thing without a lock, which one worker must therefore drive:
    (device, key, message, hint) of each that another worker would drive, and of one too many.
    """
    sharers: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for name, options, workers in devices:
        claims = claims_of(options, name)
        if claims is None or claims.shared is None:
            continue
        thing, limit = claims.shared.thing, claims.shared.most
        first, first_workers = sharers.setdefault(thing, [(name, workers)])[0]
        if first != name:
            sharers[thing].append((name, workers))
        if len(workers) > 1:
            message = f"names {len(workers)} workers, but all devices on {thing} must be driven by one"
            yield name, "worker", message, f"for example: worker = {toml_value(workers[0])}"
        elif len(first_workers) == 1 and workers != first_workers:
            message = (
                f'{thing} is driven by worker {toml_value(first_workers[0])}, of device "{first}", not by {workers[0]}'
            )
            yield name, "worker", message, f"for example: worker = {toml_value(first_workers[0])}"
        if len(sharers[thing]) == limit + 1:
            yield name, claims.shared.key, f"{thing} has room for {limit} devices", "put some of them on another one"


def check_unique(drafts: Iterable[DeviceDraft]) -> Iterator[Finding]:
    """Devices that claim what only one of them can be."""
    claimed: dict[str, str] = {}
    for draft in drafts:
        claims = claims_of(draft.options, draft.name)
        if claims is None or claims.unique is None:
            continue
        key, thing = claims.unique.key, claims.unique.thing
        first = claimed.setdefault(thing, draft.name)
        if first != draft.name:
            message, place = f'{thing} is already device "{first}"', ("devices", first, key)
            yield Finding(("devices", draft.name, key), message, "give each its own", place)


def check_files(drafts: Iterable[DeviceDraft], folder: Path) -> Iterator[Finding]:
    """What is wrong in files that belong to a device's options, and so to the configuration."""
    for draft in drafts:
        for key, message in faults_in_files_of(draft.options, folder):
            yield Finding(("devices", draft.name, key), message, "")


class _Claim(NamedTuple):
    """A file that something uses; ``shared`` when it only reads it, ``read_only`` when a key says which it does."""

    path: KeyPath
    file: Path
    owner: str
    shared: bool
    read_only: bool = False
    is_socket: bool = False


def check_paths(drafts: Collection[DeviceDraft], sockets: Mapping[str, Path | None], folder: Path) -> Iterator[Finding]:
    """Sockets, images and other files that two things would use, unless all of them only read.

    ``sockets`` are the daemon's own, by their keys.
    """
    users: dict[str, _Claim] = {}
    inherited: dict[int, str] = {}
    for draft in drafts:
        number = draft.common.socket_fd
        if number is not None and inherited.setdefault(number, draft.name) != draft.name:
            message = f'{number} is already the socket of device "{inherited[number]}"'
            yield Finding(("devices", draft.name, "socket_fd"), message, "give each a socket of its own")
    claims = [*_claims(drafts, sockets)]
    yield from _check_reached_by_guests(drafts, claims, folder)
    for claim in claims:
        first = users.setdefault(real_path(folder / claim.file), claim)
        if first is not claim and not (first.shared and claim.shared):
            hint = "give each a file of its own"
            if claim.read_only and first.read_only:
                hint += ", or set read_only = true on all of them"
            yield Finding(claim.path, f"{claim.file} is already {first.owner}", hint)


def check_characters(daemon: BaseModel | None, drafts: Iterable[DeviceDraft]) -> Iterator[Finding]:
    """Strings are written into logs, tables, command lines and XML, and no XML holds a control character."""
    texts = [(("daemon", *key), text) for key, text in texts_in(daemon)]
    for draft in drafts:
        path = ("devices", draft.name)
        texts += [((*path, *key), text) for key, text in texts_in(draft.common) if key[0] not in draft.faulty]
        texts += [((*path, *key), text) for key, text in texts_in(draft.options)]
    for key, text in texts:
        found = next((c for c in text if unicodedata.category(c) == "Cc" or c in "\ufffe\uffff"), None)
        if found is not None:
            yield Finding(key, f"has a character that nothing here may have: {found!r}", "leave it out")


def _check_reached_by_guests(
    drafts: Iterable[DeviceDraft], claims: Collection[_Claim], folder: Path
) -> Iterator[Finding]:
    """Sockets of ours at a path where a guest reaches the host: it would speak to a device or to another guest."""
    sockets = [claim for claim in claims if claim.is_socket]
    for draft in drafts:
        own = claims_of(draft.options, draft.name)
        prefix = None if own is None else own.numbered
        if prefix is None:
            continue
        start = os.path.realpath((folder / prefix).parent) + f"/{prefix.name}_"
        for claim in sockets:
            whole = os.path.realpath((folder / claim.file).parent) + f"/{claim.file.name}"
            number = whole.removeprefix(start)
            if number != whole and re.fullmatch(r"0|[1-9][0-9]{0,9}", number, re.ASCII) and int(number) < 1 << 32:
                message = f'{claim.file} is where the guest of device "{draft.name}" reaches port {number} of the host'
                yield Finding(claim.path, message, "choose another name for one of the two")


def check_sockets(
    drafts: Collection[DeviceDraft], sockets: Mapping[str, Path | None], folder: Path
) -> Iterator[Finding]:
    """Sockets whose whole path, from the root on, has no room in an address."""
    made: list[tuple[KeyPath, Path]] = [(("daemon", name), path) for name, path in sockets.items() if path is not None]
    for draft in drafts:
        path = ("devices", draft.name)
        if "socket" not in draft.faulty:
            made.append(((*path, "socket"), draft.common.socket))
        claims = claims_of(draft.options, draft.name)
        made += [((*path, *key), socket) for key, socket in claims.sockets.items()] if claims is not None else []
    for key, socket in made:
        whole = folder / socket
        if len(os.fsencode(whole)) > SOCKET_PATH_MAX:
            yield Finding(key, f"{whole} {socket_path_fault(whole)}", SHORTER_FOLDER)


def _claims(drafts: Collection[DeviceDraft], sockets: Mapping[str, Path | None]) -> Iterator[_Claim]:
    for name, socket in sockets.items():
        if socket is not None:
            yield _Claim(
                ("daemon", name), socket, f"the daemon's {name.removesuffix('_socket')} socket", False, is_socket=True
            )
    for draft in drafts:
        path = ("devices", draft.name)
        if "socket" not in draft.faulty:
            owner = f'the socket of device "{draft.name}"'
            yield _Claim((*path, "socket"), draft.common.socket, owner, False, is_socket=True)
        if draft.options is not None:
            own = claims_of(draft.options, draft.name)
            read_only = None if own is None else own.read_only
            sockets_made = {} if own is None else dict(own.sockets)
            for key, file in (sockets_made | dict(paths_in(draft.options))).items():
                shared = bool(read_only) or (own is not None and key[0] in own.only_read)
                owner = f'the {".".join(key)} of device "{draft.name}"'
                is_socket = own is not None and key in own.sockets
                yield _Claim((*path, *key), file, owner, shared, key == ("path",) and read_only is not None, is_socket)
            for name, file in own.derived.items() if own is not None else ():
                owner = f'made beside the {name} of device "{draft.name}"'
                yield _Claim((*path, name), file, owner, False, is_socket=True)


def resolved_workers(common: DeviceTable, device_type: DeviceType) -> tuple[str, ...]:
    """The names of the workers that drive the device; none for one that is not native."""
    if not device_type.native:
        return ()
    return common.worker_names or (DEFAULT_WORKER,)
