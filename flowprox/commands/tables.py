"""Tables on the terminal, and KEY=VALUE words from it."""

from __future__ import annotations

import json
from typing import Any, Literal

__all__ = ["digits", "key_values", "mean", "print_table"]


def mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if key in record]
    return sum(values) / len(values) if values else None


def digits(value: float | None, n: int) -> str:
    return "–" if value is None else f"{value:.{n}f}"


def print_table(head: list[str], rows: list[list[str]], justify: Literal["left", "right"] = "right") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for i, name in enumerate(head):
        drawn.add_column(name, justify=justify if i else "left", overflow="fold", no_wrap=i == 0)  # names stay whole
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def key_values(words: list[str], option: str) -> dict[str, Any]:
    """KEY=VALUE words; a value is a number, true, false, null, a list in brackets, or text."""
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"{option}: {word!r} is not KEY=VALUE; put the inputs before --{option}")
        given[key] = _value(value)
    return given


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    in_full = isinstance(value, float) and value.is_integer() and "." not in text
    return int(value) if in_full else value  # 2e3 is a count as well
