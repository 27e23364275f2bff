"""Results as JSON lines that survive an interruption: one record per line, flushed as it comes, final when complete.

While records are written they stand in ``<name>.partial``; a clean end renames that to ``<name>``. A run that was
killed leaves the partial file, whose last line may be cut short: ``read_records`` drops that line, and
``RecordWriter`` with ``resume=True`` goes on behind the last whole one.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from flowprox.files import atomic_write

__all__ = ["RecordWriter", "read_records"]


class RecordWriter:
    """Appends records to a JSON-lines file; a context manager.

    Non-finite numbers (the PSNR of a perfect estimate) become null, for JSON knows no infinity.

    Arguments:
        path: the final file; its folder is created.
        resume: keep the records an earlier run left in the file or its partial, in ``records``; otherwise begin anew,
            and an old final file stays until the new one is complete.
        keep: with ``resume``, which of the earlier records to keep; None keeps all.

    Raises:
        OSError: the folder cannot be written.
        ValueError: with ``resume``, an earlier file that is damaged before its last line.
        TypeError: on ``write``, a value JSON does not know.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> with RecordWriter(path) as writer:
        ...     writer.write({"method": "bm3d", "psnr": 25.5})
        >>> read_records(path)
        [{'method': 'bm3d', 'psnr': 25.5}]
    """

    def __init__(
        self, path: str | Path, resume: bool = False, keep: Callable[[dict[str, Any]], bool] | None = None
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        if resume and (self.path.exists() or _partial(self.path).exists()):
            earlier = read_records(_partial(self.path) if _partial(self.path).exists() else self.path)
            self.records = [record for record in earlier if keep is None or keep(record)]
        with atomic_write(_partial(self.path), "w") as file:  # whole before the old partial goes
            file.writelines(_line(record) for record in self.records)
        self._file: IO[str] = open(_partial(self.path), "a", encoding="utf-8", newline="\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is handed to the operating system before this returns."""
        # one call per line, so that an interruption cuts at most the last one
        self._file.write(_line(record))
        self._file.flush()
        self.records.append(dict(record))

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(_partial(self.path), self.path)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, or of its partial where a run that has not finished has more.

    A last line that was cut short is dropped with a warning.

    Raises:
        FileNotFoundError: neither the file nor its partial exists.
        ValueError: another line is not a JSON object; the message gives file and line.
    """
    path = Path(path)
    source = path
    if _partial(path).is_file() and not (path.is_file() and _n_lines(path) >= _n_lines(_partial(path))):
        source = _partial(path)
    if not source.is_file():
        raise FileNotFoundError(f"no records at {path}; give the file that a run or the demo wrote")
    lines = source.read_bytes().split(b"\n")
    complete, rest = lines[:-1], lines[-1]
    records = []
    for number, line in enumerate(complete, start=1):
        record = _parse(line)
        if record is None and number == len(complete) and not rest:
            rest = line  # a crash of the machine may leave the line end but not the line
        elif record is None:
            raise ValueError(f"{source}, line {number}: not a JSON object; remove the line or make the records again")
        else:
            records.append(record)
    last = _parse(rest)
    if last is not None:
        records.append(last)
    elif rest.strip():
        warnings.warn(f"{source}: the last line was cut short and is left out", stacklevel=2)
    return records


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _partial(path: Path) -> Path:
    return path if path.name.endswith(".partial") else path.with_name(path.name + ".partial")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError:  # includes UnicodeDecodeError
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
