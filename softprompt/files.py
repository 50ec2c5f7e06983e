"""Files that are there completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_NO_LOCKS = "cannot be locked, as some network file systems have no locks: name a folder elsewhere"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a new name in the same folder; what is written there takes the place of `path` at the end.

    It is on the disk before it gets the name. An exception leaves `path` as it was, and nothing beside it.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8, completely or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone_by(file: Path, *, waits: bool = True) -> Iterator[None]:
    """One process at a time is in the block for a lock on an empty file, which is made and stays.

    The operating system lets go of the lock when the process ends, however it ends.

    Args:
        file: in a folder that is there.
        waits: for the other process to leave, however long it takes.

    Raises:
        TimeoutError: another process is in the block, and `waits` is False.
        OSError: the folder is read-only, or its file system has no locks; names the file.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if waits else 0)
    except Timeout:
        raise TimeoutError(f"another process holds {file}") from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "filename", None) is not None:
            raise
        raise OSError(errno.ENOLCK, f"{_NO_LOCKS} ({error})", str(file)) from error
    try:
        yield
    finally:
        lock.release()


def _umask() -> int:
    # The system tells it only when it is set.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
