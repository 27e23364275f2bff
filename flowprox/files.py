"""Files that appear whole or not at all, and one writer per folder."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that replaces ``path`` only when the block ends without an error.

    The data go to a hidden file in the same folder, are forced to disk and renamed. On any error ``path`` is as it was
    and the hidden file is gone. A symbolic link is replaced, not followed.

    Arguments:
        path: file to write; its folder must exist.
        mode: "wb" for bytes or "w" for text (UTF-8, line ends as given).

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the path is a folder or a device, or the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(path, "w") as f:
        ...     _ = f.write("whole")
        >>> path.read_text()
        'whole'
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {os.fspath(path)}: the folder {target.parent} does not exist; create it")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {os.fspath(path)}: it exists and is not a regular file; choose another path")
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")  # short, however long the name is
    # "x" and not mkstemp, which ignores the umask
    file: IO[Any] = open(temporary, "xb") if mode == "wb" else open(temporary, "x", encoding="utf-8", newline="")
    try:
        with file:
            yield file
            force_to_disk(file)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename is to last; on Windows folders cannot be opened, and it need not
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_foreign(folder: Path, own: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Raise ``FileExistsError`` for the first of ``names`` in a folder that holds none of ``own``: it is no earlier run's."""
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is not None and not any((folder / name).exists() for name in own):
        raise FileExistsError(f"{found} is of no earlier run and would be overwritten; choose another out")


def check_place(out: Path) -> None:
    """Refuse what is no folder, or one with files but no ``records.jsonl``, which is no earlier run's."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out {str(out)!r} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "records.jsonl").exists():
        raise FileExistsError(f"out {str(out)!r} is not empty; choose another folder")


def remove_temporaries(folder: Path) -> None:
    """Delete the hidden files that killed runs left in a folder; while no other process writes to it."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes of this machine and user from writing to a folder of results within the block.

    The lock is the system's, on a file in the folder of temporary files: the results stay as they are, and it ends with the
    process, however that ends.

    Arguments:
        folder: need not exist yet.

    Raises:
        ValueError: another process (or thread) is writing to the folder.
        OSError: no temporary file can be made.
    """
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    digest = hashlib.sha256(f"{user} {Path(folder).resolve()}".encode()).hexdigest()
    lock = FileLock(Path(tempfile.gettempdir()) / f"flowprox-{digest[:32]}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        remedy = "wait for it, stop it, or choose another out"
        raise ValueError(f"another process is writing to {os.fspath(folder)}; {remedy}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def handled_signals(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Within the block the handler takes these signals; in another thread than the main one nothing is done."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if is_main}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def force_to_disk(file: IO[Any]) -> None:
    """Do not return before the file's content would survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
