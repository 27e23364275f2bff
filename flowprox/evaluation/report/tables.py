"""Tables once, written four ways: for the page, as Markdown, as CSV with every digit, as LaTeX (booktabs)."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Cell", "Table", "number", "significant", "to_csv", "to_latex", "to_markdown"]

MINUS, NOTHING = "−", "–"


class Cell(NamedTuple):
    """What is read, what it is sorted by and written to CSV (None: the text), whether it is the best of its column."""

    text: str
    value: float | None = None
    best: bool = False


class Table(NamedTuple):
    """Rows of cells under a head; the first column names the row.

    ``slug`` is the name of its files, ``caption`` one sentence.
    """

    slug: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, not numbers."""
        cells = [row[column] for row in self.rows]
        return any(cell.text not in ("", NOTHING) and cell.value is None for cell in cells)

    def without_empty_columns(self) -> Table:
        """The same table, less the columns that have nothing in them."""
        kept = [
            i for i in range(len(self.head)) if i == 0 or any(row[i].text not in ("", NOTHING) for row in self.rows)
        ]
        return self._replace(head=[self.head[i] for i in kept], rows=[[row[i] for i in kept] for row in self.rows])


def significant(value: float | None) -> Cell:
    """A cell with a number to three significant digits, for what spans orders of magnitude.

    Example:
        >>> significant(0.0000123456).text, significant(5.0494).text, significant(1234.5).text
        ('0.0000123', '5.05', '1230')
    """
    if value is None:
        return Cell(NOTHING)
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return Cell(f"{rounded:.{max(digits, 0)}f}".replace("-", MINUS), value)


def number(value: float | None, digits: int, *, sign: bool = False, best: bool = False) -> Cell:
    """A cell with a number; a dash where it is unknown.

    Example:
        >>> number(-1.234, 2, sign=True).text, number(None, 2).text
        ('−1.23', '–')
    """
    if value is None:
        return Cell(NOTHING)
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return Cell(text.replace("-", MINUS), value, best)


def to_markdown(table: Table) -> str:
    """The table in Markdown, best figures bold.

    Example:
        >>> print(to_markdown(Table("t", "A table.", ["method", "PSNR"], [[Cell("tv"), number(1.0, 2, best=True)]])), end="")
        | method | PSNR |
        |---|--:|
        | tv | **1.00** |
    """

    def escaped(cell: Cell) -> str:
        text = " ".join(re.sub(r"([\\`*_|<>\[\]])", r"\\\1", cell.text).split())
        return f"**{text}**" if cell.best and text else text

    rule = ["---", *["--:"] * (len(table.head) - 1)]
    lines = [[escaped(Cell(name)) for name in table.head], *[[escaped(cell) for cell in row] for row in table.rows]]
    written = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([written[0], f"|{'|'.join(rule)}|", *written[1:]]) + "\n"


def to_csv(table: Table) -> str:
    """The table as comma-separated values, numbers with every digit, unknown ones empty.

    Example:
        >>> print(to_csv(Table("t", "A table.", ["method", "PSNR"], [[Cell("a, b"), number(1.25, 1)]])), end="")
        method,PSNR
        "a, b",1.25
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.head)
    for row in table.rows:
        writer.writerow([("" if c.text == NOTHING else c.text) if c.value is None else repr(c.value) for c in row])
    return text.getvalue()


def to_latex(table: Table) -> str:
    """The table as a LaTeX ``tabular`` with the rules of the package booktabs, best figures bold.

    Example:
        >>> print(to_latex(Table("t", "A table.", ["method", "PSNR"], [[Cell("a_b"), number(-1.0, 1, best=True)]])), end="")
        % A table.
        \\begin{tabular}{lr}
        \\toprule
        method & PSNR \\\\
        \\midrule
        a\\_b & \\textbf{$-$1.0} \\\\
        \\bottomrule
        \\end{tabular}
    """

    def line(cells: Sequence[Cell]) -> str:
        return " & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.best else _tex(c.text) for c in cells) + r" \\"

    columns = "l" + "r" * (len(table.head) - 1)
    return "\n".join(
        [
            "% " + " ".join(table.caption.split()),
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line([Cell(name) for name in table.head]),
            r"\midrule",
            *map(line, table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    MINUS: "$-$",
    NOTHING: "--",
    "×": r"$\times$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))
