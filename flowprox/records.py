"""Results as JSON lines: one record per line, appended as it comes, by any number of processes.

A line is handed to the system in one call that appends, so that lines of several processes do not mix and a kill loses at most
the last. Nothing is changed afterwards: what is done again is appended again, and of records with one ``id`` a reader takes the
last. ``read_records`` drops a last line that was cut short, and ``RecordWriter`` removes it before it goes on behind it.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from flowprox.files import atomic_write
from flowprox.naming import Values

Record: TypeAlias = Values

NOT_RUN = "not run: "
"""What the message of a failure begins with where a package or a trained network is missing."""

UNFINISHED = "unfinished"
"""Empty file in a folder of results whose run has not ended yet."""


class RecordWriter:
    """Appends records to a JSON-lines file; a context manager. Non-finite numbers become null, for JSON knows no infinity.

    Arguments:
        path: the file; its folder is created.
        resume: go on behind the records that stand there, which are in ``records``; otherwise begin anew.
        keep: with ``resume``, which of the earlier records to keep; None keeps all.

    Raises:
        OSError: the folder cannot be written.
        ValueError: with ``resume``, an earlier file that is damaged before its last line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> with RecordWriter(path) as writer:
        ...     writer.write({"method": "bm3d", "psnr": 25.5})
        >>> read_records(path)
        [{'method': 'bm3d', 'psnr': 25.5}]
    """

    def __init__(self, path: str | Path, resume: bool = False, keep: Callable[[Record], bool] | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if resume and self.path.exists() else b""
        earlier = read_records(self.path) if resume and self.path.exists() else []
        self.records = [record for record in earlier if keep is None or keep(record)]
        is_whole = not content or (content.endswith(b"\n") and _parse(content.splitlines()[-1]) is not None)
        if not resume or len(self.records) < len(earlier) or not is_whole:
            write_records(self.path, self.records)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record; it is handed to the operating system before this returns."""
        line = _line(record)
        while line:  # a disk that is full takes a part, and says why at the next call
            line = line[os.write(self._descriptor, line) :]
        self.records.append(dict(record))

    def close(self) -> None:
        """Force what was written to disk."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Put these records in the place of those of a file, whole or not at all; while no other process writes to it."""
    with atomic_write(path, "wb") as file:
        file.writelines(_line(record) for record in records)


def read_records(path: str | Path) -> list[Record]:
    """Records of a JSON-lines file, of those with one ``id`` the last, in the place of the first.

    A last line that was cut short is dropped with a warning; another one that is no JSON object is a ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no records at {path}; give the file that a run or the demo wrote")
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    records: dict[str | int, Record] = {}
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records[record.get("id", number)] = record
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a JSON object; remove the line or make the records again")
        elif line:
            warnings.warn(f"{path}: the last line was cut short and is left out", stacklevel=2)
    return list(records.values())


def _line(record: Mapping[str, object]) -> bytes:
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # of a file name that is no UTF-8, as JSON escapes it


def _parse(line: bytes) -> Record | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError:  # includes UnicodeDecodeError
        return None
    return value if isinstance(value, dict) else None


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
