"""The package in one call: an evaluation of the bundled pictures, a classical method beside the unfolded network.

Nothing but the pictures and models inside the package is needed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from flowprox.evaluation.report import ReportOptions, write_report
from flowprox.evaluation.run import evaluate
from flowprox.files import check_place
from flowprox.options import EvaluatedMethod, EvaluatedProblem, EvaluationOptions, ImageOptions
from flowprox.records import write_records
from flowprox.samples import PORTRAITS, SAMPLES_FOLDER
from flowprox.summary import summary_rows, terminal_table

DEMO_PROBLEMS = ("denoising", "inpainting", "deblurring")
"""Problems of the demo, each with its default parameters."""


def demo_model_name(problem: str) -> str:
    """Name of the shipped model for a problem.

    Example:
        >>> demo_model_name("denoising")
        'unfolded-denoising-faces64'
    """
    return f"unfolded-{problem}-faces64"


def demo_recipe() -> EvaluationOptions:
    """What the demo runs: per problem the measurement, a classical method and the network.

    The classical method is the best on validation faces (``recipes/evaluate/classical.yaml``), tuned there. BM3D is an extra,
    for its license; without it total variation denoises.
    """
    classical = {"denoising": "bm3d" if _has_bm3d() else "tv", "inpainting": "biharmonic", "deblurring": "tv"}
    methods = [EvaluatedMethod("measurement")]
    methods += [EvaluatedMethod(name, problems=[problem]) for problem, name in classical.items()]
    for problem in DEMO_PROBLEMS:
        name = demo_model_name(problem)
        methods.append(EvaluatedMethod("unfolded", name, model=name, problems=[problem]))
    methods = [replace(method, batch_size=1) for method in methods]
    others = sorted(path.stem for path in SAMPLES_FOLDER.glob("*.png") if path.stem not in PORTRAITS)
    images = ImageOptions([str(SAMPLES_FOLDER / f"{name}.png") for name in (*PORTRAITS, *others)], image_size=None)
    return EvaluationOptions(
        images, [EvaluatedProblem(name, label=name) for name in DEMO_PROBLEMS], methods, name="demo"
    )


def _has_bm3d() -> bool:
    return importlib.util.find_spec("bm3d") is not None


def run_demo(
    out: str | Path, device: str = "cpu", *, seed: int = 0, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Reconstruct the bundled pictures and write records, pictures and ``report.html``, whose path is returned.

    An interrupted demo is continued by the same call. About half a minute on two processor cores.

    Arguments:
        out: folder to write; one that an earlier demo wrote is completed.
        device: where the methods run.
        seed: of the noise, which is the same for every method.
        overwrite: begin anew if an earlier demo is in ``out``.
        console: where progress and table go; standard error and output by default.

    Raises:
        FileExistsError: ``out`` holds files no demo wrote.
        NotADirectoryError, PermissionError: ``out`` cannot be made.
        ValueError: ``out`` holds a demo with another seed and ``overwrite`` is off.
    """
    out = Path(out)
    check_place(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"out cannot be written ({error.strerror}); choose another folder"
        raise type(error)(error.errno, reason, str(out)) from error
    if overwrite and out.exists():
        write_records(out / "records.jsonl", [])
    recipe = demo_recipe()
    records = evaluate(replace(recipe, out=str(out), seed=seed, device=device), console)
    write_report(out, ReportOptions(title="flowprox demo"))
    (console or Console()).print(terminal_table(summary_rows(records)))
    if any(method.name == "tv" and method.problems == ["denoising"] for method in recipe.methods):
        (console or Console()).print(
            "bm3d is not installed: denoising is compared with total variation, which is weaker (pip install bm3d; its "
            "license is non-commercial)"
        )
    return out / "report.html"
