"""Files appear whole or not at all: write to a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tstitch.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` when the block ends, and vanishes when the block raises.

    The temporary name keeps the suffix of `path`, because image and array writers choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # Some writers (safetensors) keep a file to its owner.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
        # The rename itself is durable only once the folder is on disk; Windows opens no folders.
        if os.name != "nt":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def existing_folder(path: Path) -> Path:
    """The path itself, or the nearest above it that is there.

    Raises:
        InputError: if the system does not say, for a name that is too long or a folder that may not be searched.
    """
    try:
        return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise InputError(f"cannot use {path}: {error.strerror}; choose another path") from None


def check_folder(path: Path) -> None:
    """Refuse, before any work, a folder that could not be written.

    Raises:
        InputError: if it is a file, or its nearest existing parent is one or is not writable.
    """
    existing = existing_folder(path)
    if not existing.is_dir():
        raise InputError(f"cannot write to {path}: {existing} is a file; choose another folder")
    try:  # permissions alone do not say it: the superuser has them in /sys too
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        raise InputError(f"cannot write to {path}: {existing} is not writable; choose another folder") from None


def check_file(path: Path) -> None:
    """Refuse, before any work, a file that could not be written.

    Raises:
        InputError: if it is a folder, its name is too long, or its parent is refused by `check_folder`.
    """
    check_folder(path.parent)
    if existing_folder(path) == path and path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    existing_folder(_temporary(path))  # the longer of the two names that `atomic_path` writes


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made where it is not there; the system forgets it when the process ends, however it ends.

    Raises:
        InputError: if another run has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"another run is filling {folder}; wait for it, or choose another folder") from None
    except OSError:  # some network disks lock no folders
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child of a fork would hold it on
        os.close(handle)


def write_json(path: str | Path, content: Any) -> None:  # noqa: ANN401  (whatever json takes)
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path) -> Any:  # noqa: ANN401
    """Read JSON.

    Raises:
        InputError: if the file is missing, cannot be read or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"no file {path}; check the path") from None
    except OSError as error:
        raise InputError(f"could not read {path} ({error.strerror}); check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); repair or remove it") from None
