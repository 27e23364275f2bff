"""The commands: typed functions whose docstrings are the help and whose arguments become options.

They print results as tables and return the exit status. Nothing heavy is imported before a command runs, so that help is
immediate. (jsonargparse also executes what stands under ``TYPE_CHECKING``.)
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from flowprox.evaluation_options import EvaluatedMethod, EvaluatedProblem, EvaluationOptions, ImageOptions, ScaleOptions
from flowprox.options import (
    DataOptions,
    DenoiserOptions,
    GANOptions,
    LikelihoodOptions,
    NoiseOptions,
    ProblemOptions,
    TrainingOptions,
    UnfoldedOptions,
)

__all__ = ["COMMANDS", "Command"]

_LIKELIHOOD = LikelihoodOptions()
_NO_DATA, _NO_NOISE = DataOptions(train=""), NoiseOptions(name="")
_Table = tuple[list[str], list[list[str]]]  # head and rows


def demo(out: str = "flowprox-demo", device: str = "cpu", seed: int = 0, overwrite: bool = False) -> None:
    """Reconstruct the bundled pictures for three problems and write a report. Needs no download.

    Arguments:
        out: folder to write; report.html in it shows the result.
        device: cpu, cuda or mps.
        seed: of the noise.
        overwrite: replace the folder if an earlier demo is in it.
    """
    from flowprox.evaluation.demo import run_demo

    print(f"report: {run_demo(out, device=device, seed=seed, overwrite=overwrite)}")


def train_flow(
    flow: str | dict[str, Any],
    training: TrainingOptions,
    data: DataOptions = _NO_DATA,
    noise: NoiseOptions = _NO_NOISE,
    likelihood: LikelihoodOptions = _LIKELIHOOD,
    out: str = "runs/flow",
    resume: bool = False,
    name: str = "flow",
) -> int:
    """Train a normalizing flow on clean images, or on noise, by maximum likelihood.

    Arguments:
        flow: "compact", "paper", a specification {kind: Glow, arguments: {...}}, or a pretrained flow (name, hub id or
            folder) to train on.
        training: limits, optimiser and devices.
        data: the images.
        noise: what to learn in place of images, as the density of a measurement's noise.
        likelihood: bit depth and added noise of images.
        out: folder of the run; the model is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    _prepare(training)
    from flowprox.training import train_flow

    for key, given, nothing, main in (("data", data, _NO_DATA, "train"), ("noise", noise, _NO_NOISE, "name")):
        if given != nothing and not getattr(given, main):
            raise ValueError(f"{key}.{main} is missing; see --help of the command")
    images, drawn = (data if data.train else None), (noise if noise.name else None)
    return _ended(train_flow(flow, images, training, likelihood, out, resume, name, drawn))


def train_unfolded(
    model: UnfoldedOptions,
    problem: ProblemOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/unfolded",
    resume: bool = False,
    name: str = "unfolded",
) -> int:
    """Train an unfolded network, end to end, for one measurement problem.

    Arguments:
        model: the network: its prox, the number of folds, where it starts.
        problem: the operator and its noise.
        data: the clean images.
        training: limits, optimiser and devices.
        out: folder of the run; the model is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    _prepare(training)
    from flowprox.training import train_unfolded

    return _ended(train_unfolded(model, problem, data, training, out, resume, name))


def train_denoiser(
    denoiser: DenoiserOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/denoiser",
    resume: bool = False,
    name: str = "denoiser",
) -> int:
    """Pre-train a ResNet or U-Net to remove Gaussian noise; an unfolded network may start from it.

    Arguments:
        denoiser: the network and the noise it learns to remove.
        data: the clean images.
        training: limits, optimiser and devices.
        out: folder of the run; the network is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    _prepare(training)
    from flowprox.training import train_denoiser

    return _ended(train_denoiser(denoiser, data, training, out, resume, name))


def train_gan(
    gan: GANOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/gan",
    resume: bool = False,
    name: str = "gan",
) -> int:
    """Train a DCGAN; its generator is the GAN prior that flow priors are compared with.

    Arguments:
        gan: the two networks.
        data: the images.
        training: limits, optimiser and devices.
        out: folder of the run; the generator is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    _prepare(training)
    from flowprox.gan_training import train_gan

    return _ended(train_gan(gan, data, training, out, resume, name))


def reconstruct(
    inputs: list[str],
    out: str,
    model: str | None = None,
    method: str | None = None,
    flow: str | None = None,
    noise: list[str] | None = None,
    options: list[str] | None = None,
    problem: str | None = None,
    parameters: list[str] | None = None,
    size: list[int] | None = None,
    measured: bool = False,
    seed: int = 0,
    operator_seed: int | None = None,
    pad: bool = True,
    device: str = "cpu",
) -> None:
    """Reconstruct images or measurements with a trained network, a flow as it is, or a classical method.

    Clean images are measured first, and compared with what is reconstructed from that.

    Arguments:
        inputs: image files, measured arrays (.npy), folders of either; before an option of several words, or after "--".
        out: folder to make: images, measurements, records.jsonl with the figures, and from posterior the deviations.
        model: the trained network: a shipped model (see "flowprox models"), a folder, or a hub id. Alone it means method
            unfolded.
        method: adjoint, unfolded, latent-map, noise-map, posterior, bm3d, lasso-dct, lasso-wavelet, tv, wavelet, gan,
            plug-and-play, biharmonic or wiener.
        flow: the prior of latent-map, noise-map, posterior and plug-and-play: a shipped model, a folder, or a hub id;
            by default glow-faces64.
        noise: density of the noise, for noise-map and posterior: a flow trained on noise (a shipped model such as
            noise-mnist64, a folder or hub id), or a name with KEY=VALUE ... (gaussian, sinusoidal, radial); by default
            the noise of the problem.
        options: KEY=VALUE ... of the method.
        problem: denoising, inpainting, random-inpainting, deblurring, super-resolution, compressed-sensing, one-bit, mri
            or ct; by default the one in the model's card.
        parameters: KEY=VALUE ... of the problem.
        size: height and width, or channels, height and width, of the image behind measurements that do not show it
            (compressed sensing, MRI, CT); by default those of the flow.
        measured: image files are measurements, not clean images; arrays always are.
        seed: of the noise; each image's own follows from it and the file's name.
        operator_seed: of what is drawn with the operator, such as a mask or matrix; by default the one in the model's
            card.
        pad: extend images whose sides the model cannot take, and crop back; --no-pad refuses them.
        device: cpu, cuda or mps.
    """
    given = _key_values(parameters or [], "parameters")
    chosen = _key_values(options or [], "options")
    density = (
        {"name": noise[0], **_key_values(noise[1:], "noise")} if noise and len(noise) > 1 else (noise or [None])[0]
    )
    from flowprox.reconstruction import ReconstructionJob, reconstruct_files

    job = ReconstructionJob(
        model, problem, given, measured, seed, operator_seed, pad, device, method, flow, density, chosen, size
    )
    records = reconstruct_files(job, inputs, out)
    _print_table(_results(records))
    print(f"written to {out}")


def evaluate(
    images: ImageOptions,
    problems: list[EvaluatedProblem],
    methods: list[EvaluatedMethod],
    tune_images: ImageOptions | None = None,
    scales: dict[str, ScaleOptions] | None = None,
    out: str = "runs/evaluation",
    scale: str = "small",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    n_pictures: int = 4,
    name: str = "evaluation",
) -> int:
    """Compare methods on problems and images; an interrupted run continues where it was.

    Arguments:
        images: the test images.
        problems: list of measurement problems.
        methods: list of reconstruction methods.
        tune_images: the images that options are tuned on.
        scales: name of a scale and what it replaces in the recipe.
        out: folder of the results; the same command continues an earlier run in it.
        scale: "smoke" (seconds, on the pictures that ship), "small" (the recipe as written) or one of the recipe's own.
        limit: use only the first so many images.
        seed: of the noise, which is the same for every method.
        device: cpu, cuda or mps.
        n_pictures: write the pictures of so many images.
        name: of the recipe, for the records.
    """
    recipe = EvaluationOptions(images, problems, methods, tune_images, scales or {}, name)
    from flowprox.checkpoints import atomic_write
    from flowprox.evaluation.benchmark import RunOptions, evaluate
    from flowprox.evaluation.plan import published_figures
    from flowprox.evaluation.summary import summary_markdown, summary_rows

    records = evaluate(recipe, out, RunOptions(scale, limit, seed, device, n_pictures))
    rows = summary_rows(records, {} if scale == "smoke" else published_figures(recipe, scale))
    with atomic_write(os.path.join(out, "summary.md"), "w") as file:
        file.write(summary_markdown(rows))
    _print_evaluated(rows)
    print(f"records: {os.path.join(out, 'records.jsonl')}")
    return _report_failures(records)


def sample(
    model: str,
    out: str = "samples.png",
    n: int = 16,
    temperature: float = 0.7,
    seed: int = 0,
    size: int | None = None,
    device: str = "cpu",
) -> None:
    """Draw images or noise from a trained flow, as one picture.

    Noise is stretched so that its lowest value is black and its highest white.

    Arguments:
        model: a shipped model (see "flowprox models"), a folder, or a hub id.
        out: PNG file to write.
        n: how many images.
        temperature: standard deviation of the latent; below 1 images are smoother.
        seed: the same seed draws the same images.
        size: height and width in pixels; by default those the flow was made for.
        device: cpu, cuda or mps.
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    if not out.lower().endswith(".png"):
        raise ValueError(f"out must end in .png, got {out!r}")
    import torch
    from torchvision.utils import make_grid

    from flowprox.checkpoints import load_model
    from flowprox.data import save_image
    from flowprox.flows import Flow
    from flowprox.noise import FlowNoise

    loaded = load_model(model, device=device)
    flow = loaded.flow if isinstance(loaded, FlowNoise) else loaded
    if not isinstance(flow, Flow):
        raise ValueError(f"model {model!r} is a {type(flow).__name__}, not a flow; see flowprox models")
    generator = torch.Generator(device).manual_seed(seed)
    x = flow.sample(n, temperature, None if size is None else (size, size), generator)
    if isinstance(loaded, FlowNoise):
        x = (x - x.amin()) / (x.amax() - x.amin())
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    save_image(make_grid(x.clamp(0, 1).cpu(), nrow=math.ceil(math.sqrt(n)), padding=2, pad_value=1.0), out)
    print(f"written to {out}")


def models(name: str | None = None) -> None:
    """List the shipped models, or print the card of one.

    Arguments:
        name: a shipped model, a folder, or a hub id whose card to print.
    """
    from flowprox.checkpoints import list_models, load_card

    if name is not None:
        print(load_card(name).to_json(), end="")
        return
    cards = [load_card(name) for name in list_models()]
    if not cards:
        print("no models are shipped with this installation")
        return
    rows = [[card.name, card.model["kind"], _problem(card.problem), _trained(card)] for card in cards]
    _print_table((["model", "kind", "problem", "parameters, file, figures"], rows), justify="left")


def _problem(problem: Mapping[str, Any] | None) -> str:
    if not problem:
        return "–"
    given = ", ".join(f"{key} {value}" for key, value in problem.get("parameters", {}).items() if value is not None)
    return f"{problem.get('name')}" + (f" ({given})" if given else "")


def _trained(card: Any) -> str:
    """The size and the figures on a ``Card``."""
    figures = [f"{key} {value:.4g}" for key, value in card.metrics.items() if isinstance(value, float)]
    return ", ".join([f"{card.n_parameters:,}", f"{card.n_bytes / 1e6:.1f} MB", *figures])


def _results(records: list[dict[str, Any]], n_shown: int = 40) -> _Table:
    known = [record for record in records if "psnr" in record]
    head = ["image", "height x width", *(["PSNR (dB)", "SSIM"] if known else []), "seconds"]
    rows = [_result(record, bool(known)) for record in records[:n_shown]]
    if len(records) > n_shown:
        rows.append([f"... {len(records) - n_shown} more", *[""] * (len(head) - 1)])
    means = {key: _mean(records, key) for key in ("psnr", "ssim", "seconds")}
    return head, [*rows, _result({"image": f"mean of {len(records)}", **means}, bool(known))]


def _result(record: Mapping[str, Any], with_figures: bool) -> list[str]:
    size = f"{record['height']}x{record['width']}" if "height" in record else ""
    figures = [_digits(record.get("psnr"), 2), _digits(record.get("ssim"), 3)] if with_figures else []
    return [record["image"], size, *figures, _digits(record["seconds"], 3)]


def _print_evaluated(rows: Sequence[Any]) -> None:
    """Table of ``evaluation.summary.Row``, a section per problem; a column appears where a row has something in it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head = ["method", "PSNR (dB)", "published", "SSIM", "s / image", "images", "failed", "tuned"]
    lines = [_evaluated(row) for row in rows]
    shown = [i for i in range(len(head)) if any(line[i] for line in lines)]
    table = Table(caption="PSNR clipped to [0, 1], mean over images ± 95 % confidence", caption_justify="left")
    for i in shown:
        table.add_column(head[i], justify="right" if i else "left", overflow="fold")
    before = None
    for row, line in zip(rows, lines, strict=True):
        if row.problem != before:
            table.add_section()
            table.add_row(Text(row.problem, style="bold"))
        table.add_row(*(Text(("" if i else "  ") + line[i]) for i in shown))
        before = row.problem
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def _evaluated(row: Any) -> list[str]:
    return [
        row.method,
        _digits(row.psnr, 2) + ("" if row.psnr_interval is None else f" ± {row.psnr_interval:.2f}"),
        "" if row.published is None else f"{row.published:.2f}",
        _digits(row.ssim, 3),
        _digits(row.seconds, 3),
        str(row.n_images),
        str(row.n_failed or ""),
        ", ".join(f"{key} {value}" for key, value in row.tuned.items()),
    ]


def _report_failures(records: Sequence[Mapping[str, Any]], n_shown: int = 5) -> int:
    """One line per failure, on standard error; the exit status."""
    failures = [record for record in records if "failed" in record]
    for record in failures[:n_shown]:
        place = f"{record['problem']}, {record['method']}, {record['image']}"
        print(f"flowprox: failed: {place}: {record['failed']}", file=sys.stderr)
    if len(failures) > n_shown:
        print(f"flowprox: failed: {len(failures) - n_shown} more, see the records", file=sys.stderr)
    return 1 if failures else 0


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if key in record]
    return sum(values) / len(values) if values else None


def _digits(value: float | None, n: int) -> str:
    return "–" if value is None else f"{value:.{n}f}"


def _print_table(table: _Table, justify: Literal["left", "right"] = "right") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for i, name in enumerate(table[0]):
        drawn.add_column(name, justify=justify if i else "left", overflow="fold")
    for row in table[1]:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def _key_values(words: list[str], option: str) -> dict[str, Any]:
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
        return json.loads(text)
    except ValueError:
        return text


def _prepare(training: TrainingOptions) -> None:
    """Share the cores among the processes, before torch is imported, and refuse an accelerator that is not there."""
    if training.devices > 1 and training.num_threads is None:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // training.devices)))
    import torch

    available = {
        "cuda": torch.cuda.is_available,
        "gpu": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if training.accelerator in available and not available[training.accelerator]():
        raise ValueError(f"training.accelerator {training.accelerator!r} is not available here; use 'cpu' or 'auto'")


def _ended(result: Any) -> int:
    """Say what a ``TrainingResult`` came to; the exit status."""
    if result.reason == "signal":
        print(f"stopped after {result.steps} steps; --resume continues the run in {result.folder}", file=sys.stderr)
        return 130
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (result.best or result.metrics).items())
    print(f"{result.steps} steps in {result.elapsed:.0f} s ({result.reason}), {result.skipped} skipped")
    print(f"model: {os.path.join(result.folder, 'model')}" + (f" ({figures})" if figures else ""))
    return 0


class Command(NamedTuple):
    """One subcommand: what runs, whether it reads a recipe, and its positional arguments."""

    run: Callable[..., int | None]
    has_recipe: bool = False
    positional: str = ""
    n_positional: str = "?"
    several: Mapping[str, str] = MappingProxyType({})  # options of several words, and what a word is called


COMMANDS: dict[str, Command] = {
    "demo": Command(demo),
    "train-flow": Command(train_flow, has_recipe=True),
    "train-unfolded": Command(train_unfolded, has_recipe=True),
    "train-denoiser": Command(train_denoiser, has_recipe=True),
    "train-gan": Command(train_gan, has_recipe=True),
    "reconstruct": Command(
        reconstruct,
        positional="inputs",
        n_positional="+",
        several={"options": "KEY=VALUE", "parameters": "KEY=VALUE", "noise": "NAME", "size": "N"},
    ),
    "evaluate": Command(evaluate, has_recipe=True),
    "sample": Command(sample),
    "models": Command(models, positional="name"),
}
