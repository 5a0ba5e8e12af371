"""The directory through which weights go to the servers, on shared memory or a shared file system.

    v000012/         a version: model.safetensors and config.json; whole, or the tensors alone that differ from `whole`
    whole            a link to the newest whole version: what a server starts from
    .start-*         the files of a whole version, linked, from which a server is starting
    .writing-*       a version that is being written, or was when its writer was killed

A version appears whole or not at all: files are flushed to disk before the directory gets its name. One trainer writes.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable

WHOLE = "whole"
NUM_PIN_ATTEMPTS = 100
_WRITING = ".writing-"
_OLD = ".old-"


def version_path(root: pathlib.Path, version: int) -> pathlib.Path:
    return root / f"v{version:06d}"


def version_of(path: pathlib.Path) -> int:
    """ValueError for a path that is no version's."""
    match = re.fullmatch(r"v(\d{6,})", path.name)
    if not match:
        raise ValueError(f"{path} is no directory of weights: their names are v and the version, such as v000012")
    return int(match[1])


def write_version(root: pathlib.Path, version: int, write: Callable[[pathlib.Path], bool]) -> tuple[pathlib.Path, bool]:
    """Has `write` fill a directory and gives it its name. Returns the path and whether the version is whole.

    `write(directory)` says whether what it wrote is all weights. What stood under the name before is replaced.
    ValueError if `root` cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{_WRITING}*"):  # of a writer that was killed
            shutil.rmtree(left)
        temporary = root / f"{_WRITING}{os.getpid()}"
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write weights to {root}: {error.strerror}; choose another directory") from error
    try:
        is_whole = write(temporary)
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        path = version_path(root, version)
        if path.exists():
            old = root / f"{_OLD}{path.name}"
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if is_whole:
        link = root / f"{_WRITING}link"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, root / WHOLE)
    _flush(root)
    return path, is_whole


def whole_version(root: pathlib.Path) -> pathlib.Path | None:
    """The directory that a server can start from, or None if nothing has been written yet."""
    link = root / WHOLE
    return link.resolve() if link.is_symlink() and link.exists() else None


def pin_whole_version(root: pathlib.Path, name: str) -> tuple[pathlib.Path, int] | None:
    """Links the files of the newest whole version into a directory of their own: (path, version), or None without one.

    There they stay while newer versions come and that one goes: a server takes longer to start than a step may last.
    """
    pinned = root / f".start-{name}"
    for _ in range(NUM_PIN_ATTEMPTS):
        unpin(pinned)
        whole = whole_version(root)
        if whole is None:
            return None
        try:
            pinned.mkdir()
            for file in whole.iterdir():
                os.link(file, pinned / file.name)
            return pinned, version_of(whole)
        except FileNotFoundError:  # a newer one has just taken its place
            continue
    return None


def unpin(pinned: pathlib.Path) -> None:
    shutil.rmtree(pinned, ignore_errors=True)


def remove_others(root: pathlib.Path, kept: Iterable[pathlib.Path]) -> None:
    """Removes every version but those of `kept`."""
    names = {path.name for path in kept}
    for path in root.glob("v*"):
        if path.name not in names and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # a server that just starts from it is started again


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
