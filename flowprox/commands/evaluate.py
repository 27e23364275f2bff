"""The commands that compare methods and that show what came of it."""

from __future__ import annotations

import os
import sys
import webbrowser
from dataclasses import dataclass

from flowprox.commands.terminal import check_device, check_inputs
from flowprox.evaluation import ReportOptions
from flowprox.naming import printable
from flowprox.options import EvaluationOptions

_N_NAMED = 5


def evaluate(options: EvaluationOptions) -> int:
    """Compare methods on problems and images; an interrupted run continues where it was."""
    check_device(options.device)
    from rich.console import Console

    from flowprox.evaluation.plan import published_figures
    from flowprox.evaluation.run import evaluate
    from flowprox.files import atomic_write
    from flowprox.records import NOT_RUN
    from flowprox.summary import summary_markdown, summary_rows, terminal_table

    records = evaluate(options)
    rows = summary_rows(records, {} if options.scale == "smoke" else published_figures(options, options.scale))
    with atomic_write(os.path.join(options.out, "summary.md"), "w") as file:
        file.write(summary_markdown(rows))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(terminal_table(rows))
    print(f"records: {os.path.join(options.out, 'records.jsonl')}")
    failures = [record for record in records if not str(record.get("failed", NOT_RUN)).startswith(NOT_RUN)]
    for record in failures[:_N_NAMED]:
        place = f"{record['problem']}, {record['method']}, {record['image']}"
        print(printable(f"flowprox: failed: {place}: {record['failed']}"), file=sys.stderr)
    if len(failures) > _N_NAMED:
        print(f"flowprox: failed: {len(failures) - _N_NAMED} more, see the records", file=sys.stderr)
    return 1 if failures else 0


@dataclass(kw_only=True)
class ShowOptions(ReportOptions):
    """What to show of finished evaluations.

    Arguments:
        folders: results folders of evaluate, the demo or the gallery, or files of records; those of one recipe are a chapter.
        out: folder to write report.html and tables/ to; by default the results folder, if it is one.
        open: show the page in the browser.
    """

    folders: list[str]
    out: str | None = None
    open: bool = False


def report(options: ShowOptions) -> None:
    """Show finished evaluations as one HTML page and as tables; reads records only and runs no model."""
    check_inputs(options.folders)
    from flowprox.evaluation.report import read_results, write_page, write_tables

    results = read_results(options.folders, options.out, options)
    for note in results.notes:
        print(f"flowprox: note: {printable(note)}", file=sys.stderr)
    tables = write_tables(results)
    page = write_page(results, options)
    if tables:
        print(f"tables: {os.path.join(results.out, 'tables')} ({len(tables)} files)")
    print(f"report: {page}")
    if options.open and not webbrowser.open(page.resolve().as_uri()):
        print("flowprox: no browser could be started; open the file by hand", file=sys.stderr)
