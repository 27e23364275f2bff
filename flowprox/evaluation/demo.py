"""The package in one call: three problems, the bundled pictures, a classical method beside the unfolded network.

    y = A x + noise  ->  x_hat by each method  ->  PSNR, SSIM, seconds  ->  records, figures, report

Nothing but the pictures and models inside the package is needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from flowprox import __version__
from flowprox.baselines import BM3D, Biharmonic, TotalVariation
from flowprox.checkpoints import load_model
from flowprox.data import save_image
from flowprox.evaluation.report import MEASUREMENT, ReportOptions, picture_path, truth_path, write_figures, write_report
from flowprox.evaluation.summary import summary_rows
from flowprox.metrics import psnr, ssim
from flowprox.operators import Problem, make_physics, measure_each
from flowprox.records import RecordWriter
from flowprox.samples import PORTRAITS, sample_images

__all__ = ["DEMO_PROBLEMS", "demo_model_name", "load_demo_models", "run_demo"]

DEMO_PROBLEMS = ("denoising", "inpainting", "deblurring")
"""Problems of the demo, each with its default parameters."""

_OWN_FILES = {"records.jsonl", "report.html", "images", "figures"}


class _Method(NamedTuple):
    name: str
    reconstruct: Reconstructor


class _Degraded(Reconstructor):
    """The measurement itself."""

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        return y


def demo_model_name(problem: str) -> str:
    """Name of the shipped model for a problem.

    Example:
        >>> demo_model_name("denoising")
        'unfolded-denoising-faces64'
    """
    return f"unfolded-{problem}-faces64"


def load_demo_models(device: str | torch.device = "cpu") -> dict[str, Reconstructor]:
    """The shipped model of each demo problem, by problem.

    Raises:
        FileNotFoundError, ValueError: as ``flowprox.load_model``.
    """
    return {problem: load_model(demo_model_name(problem), device=device) for problem in DEMO_PROBLEMS}


def classical_method(problem: str) -> tuple[str, Reconstructor]:
    """The classical method that is best on validation faces (``benchmarks/classical_baselines.py``), tuned there.

    BM3D is an extra, for its license; without it total variation denoises.
    """
    if problem == "denoising":
        if importlib.util.find_spec("bm3d") is None:
            return "tv", TotalVariation(regularization=0.24, dual_step=0.05)
        return "bm3d", BM3D()
    if problem == "inpainting":
        return "biharmonic", Biharmonic()
    return "tv", TotalVariation()


def run_demo(
    out: str | Path,
    models: Mapping[str, Reconstructor] | None = None,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Reconstruct the bundled pictures and write records, pictures, figures and ``report.html``.

    Everything is made in a hidden folder beside ``out`` and renamed to ``out`` when complete; an interrupted run leaves
    nothing behind. About half a minute on two processor cores.

    Arguments:
        out: folder to write; its parent must be writable.
        models: a reconstructor per problem, keys from ``DEMO_PROBLEMS``; a problem without one is shown with the
            classical method only. None loads the shipped models.
        device: where the models run; the classical methods are the same everywhere.
        seed: of the noise: picture i has seed + i, the same for every method.
        overwrite: replace ``out`` if an earlier demo is in it.
        console: where progress and table go; standard error and output by default.

    Returns:
        path of the report.

    Raises:
        FileExistsError: ``out`` is not empty and ``overwrite`` is off, or it holds files no demo wrote.
        NotADirectoryError, PermissionError: ``out`` cannot be made.
        FileNotFoundError: a shipped model is missing.
        ValueError: an unknown problem among ``models``.
    """
    out = Path(out).absolute()
    _check_models(models)
    with _new_folder(out, overwrite) as folder:  # before anything is computed: it must be possible to write there
        models = load_demo_models(device) if models is None else models
        for model in models.values():
            model.to(device).eval()
        records = _reconstruct_all(folder, models, device, seed, console or Console(stderr=True))
        write_report(folder, ReportOptions(title="flowprox demo"))
        write_figures(folder)
    (console or Console()).print(_table(records))
    if any(record["problem"] == "denoising" and record["method"] == "tv" for record in records):
        (console or Console()).print(
            "bm3d is not installed: denoising is compared with total variation, which is weaker (pip install bm3d; its "
            "license is non-commercial)"
        )
    return out / "report.html"


def _check_models(models: Mapping[str, Reconstructor] | None) -> None:
    unknown = sorted(set(models or {}) - set(DEMO_PROBLEMS))
    if unknown:
        raise ValueError(f"models has no use for {', '.join(unknown)}; its keys are {', '.join(DEMO_PROBLEMS)}")


def _reconstruct_all(
    folder: Path, models: Mapping[str, Reconstructor], device: str | torch.device, seed: int, console: Console
) -> list[dict[str, Any]]:
    pictures = sample_images()
    (folder / "images").mkdir()
    for name, x in pictures:
        save_image(x, truth_path(folder, name))
    methods = {problem: _methods(problem, models) for problem in DEMO_PROBLEMS}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        Progress(*columns, console=console, transient=True) as progress,
        RecordWriter(folder / "records.jsonl") as writer,
    ):
        task = progress.add_task("", total=len(pictures) * sum(len(members) for members in methods.values()))
        for name in DEMO_PROBLEMS:
            for i, (picture, x) in enumerate(pictures):
                physics = make_physics(name, (x.shape[0], x.shape[1], x.shape[2]), device=str(device))
                y = measure_each(x[None].to(device), physics, [seed + i])
                for method in methods[name]:
                    progress.update(task, description=f"{name}: {picture}, {method.name}")
                    x_hat, seconds = _timed(method.reconstruct, y, physics, warm_up=i == 0)
                    x_hat = x_hat.cpu()
                    save_image(x_hat[0].clamp(0, 1), picture_path(folder, name, picture, method.name))
                    writer.write(
                        {
                            "problem": name,
                            "parameters": Problem(name).parameters,
                            "method": method.name,
                            "image": picture,
                            "group": "portraits" if picture in PORTRAITS else "other pictures",
                            "psnr": float(psnr(x_hat, x[None])),
                            "ssim": float(ssim(x_hat, x[None])),
                            "seconds": seconds,
                            "seed": seed + i,
                            "version": __version__,
                        }
                    )
                    progress.advance(task)
    return writer.records


def _methods(problem: str, models: Mapping[str, Reconstructor]) -> list[_Method]:
    methods = [_Method(MEASUREMENT, _Degraded()), _Method(*classical_method(problem))]
    if problem in models:
        methods.append(_Method(demo_model_name(problem), models[problem]))
    return methods


@torch.no_grad()
def _timed(method: Reconstructor, y: Tensor, physics: Physics, warm_up: bool) -> tuple[Tensor, float]:
    if warm_up and any(True for _ in method.parameters()):
        method(y, physics)  # the first call of a network also pays for its set-up
    _wait(y)
    start = time.perf_counter()
    x_hat = method(y, physics)
    _wait(y)
    return x_hat, time.perf_counter() - start


def _wait(y: Tensor) -> None:
    if y.is_cuda:
        torch.cuda.synchronize(y.device)


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table(title="Means over the bundled pictures")
    table.add_column("method", no_wrap=True)
    for name in ("PSNR (dB)", "portraits", "SSIM", "s / image"):
        table.add_column(name, justify="right")
    before = None
    for row in summary_rows(records):
        if row.problem != before:
            table.add_section()
            table.add_row(f"[bold]{row.problem}[/bold]")
        numbers = [row.psnr, row.psnr_of_group.get("portraits"), row.ssim, row.seconds]
        texts = ["–" if n is None else f"{n:.{digits}f}" for n, digits in zip(numbers, (2, 2, 3, 3), strict=True)]
        table.add_row(f"  {row.method}", *texts)
        before = row.problem
    return table


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes otherwise."""
    _check_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise type(error)(
            error.errno, f"out cannot be written ({error.strerror}); choose another folder", str(out)
        ) from (error)
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _check_free(out, overwrite)
        if out.exists():
            old = folder.with_name(folder.name + ".old")
            os.replace(out, old)
            os.replace(folder, out)
            shutil.rmtree(old)
        else:
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise NotADirectoryError(f"out is a file: {out}; choose a folder")
    names = {path.name for path in out.iterdir()}
    if names and not overwrite:
        raise FileExistsError(f"out is not empty: {out}; choose another folder or set overwrite")
    if names - _OWN_FILES:
        foreign = ", ".join(sorted(names - _OWN_FILES)[:3])
        raise FileExistsError(f"out holds files that no demo wrote ({foreign}): {out}; choose another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
