"""Methods x problems x images in one loop, recorded as it goes.

    y_i = A x_i + noise_i  ->  x_hat_i = method(y_i)  ->  PSNR, SSIM, residual, seconds, peak memory

The noise of image i depends on the run's seed and the image's name alone: every method, problem, batch and run sees the
same. Results stand in a folder:

    recipe.yaml     what was run, with the published figures
    records.jsonl   one line per problem, method and image; while the run goes on, records.jsonl.partial
    tuning.jsonl    one line per problem, method and combination of the options that are tuned
    images/         pictures of the first images, for the report

A run that was interrupted is continued by the same command. What is already recorded is recognized by ``id``, a hash of
everything it depends on, so images, problems and methods may also be added later. Failures are tried again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowprox.checkpoints import require_device
from flowprox.evaluation.comparison import Evaluation, EvaluationInterrupted, RunOptions
from flowprox.evaluation.devices import absorb_shares, run_on_devices
from flowprox.evaluation.plan import at_scale, planned
from flowprox.evaluation_options import SAMPLES, EvaluationOptions
from flowprox.files import sole_writer

__all__ = ["EvaluationInterrupted", "RunOptions", "evaluate"]


def evaluate(recipe: EvaluationOptions, out: str | Path, run: RunOptions | None = None) -> list[dict[str, Any]]:
    """Run an evaluation, or what is left of it.

    Arguments:
        recipe: images, problems, methods.
        out: folder of the results; one that holds an earlier run of the same recipe is continued.
        run: scale, seed, devices.

    Returns:
        the records of this recipe, in its order, those of earlier runs included. A method that failed on an image has
        one with the key failed in the place of the figures.

    Raises:
        ValueError, OSError: before anything runs: something in the recipe does not fit, images cannot be read, or another
            process is writing to ``out``.
        EvaluationInterrupted: on Ctrl-C; the message says how far it came.
    """
    run = run or RunOptions()
    scaled = at_scale(recipe, run.scale)
    _check_apart(scaled, Path(out))
    require_device(run.device)
    evaluation = Evaluation(scaled, planned(scaled), Path(out), run, as_written=recipe)
    with sole_writer(evaluation.out):
        absorb_shares(evaluation.out)
        return run_on_devices(evaluation) if run.devices > 1 else evaluation.run()


def _check_apart(recipe: EvaluationOptions, out: Path) -> None:
    """Refuse to write pictures where a later run would read them as test images."""
    for images in (recipe.images, recipe.tune_images):
        sources = [] if images is None or images.source == SAMPLES else images.source
        for source in [sources] if isinstance(sources, str) else sources:
            folder = Path(source).resolve()
            if folder.is_dir() and (folder == out.resolve() or folder in out.resolve().parents):
                raise ValueError(
                    f"out {str(out)!r} lies in the images' own folder {source!r}; choose one outside of it"
                )
