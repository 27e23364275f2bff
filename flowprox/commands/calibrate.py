"""The command that makes calibrated intervals for a trained network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowprox.commands.terminal import check_device, check_models, key_values, print_table
from flowprox.naming import Values, digits, require_count

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics
    from torch import Tensor

    from flowprox.checkpoints import Card
    from flowprox.uncertainty import Intervals
    from flowprox.unfolding import Unfolded

_FEWEST = 20  # test images from which figures are worth writing down
_FEWEST_FOR_ALARM = 198  # half of them are the reference, of which one in a hundred would raise the alarm
_APART = 10**6  # from the seeds of other noise


@dataclass
class CalibrateOptions:
    """Which network, which images, how sure.

    Arguments:
        model: the trained network: a shipped model (see "flowprox models"), a folder, or hf:ORG/NAME.
        data: clean images that it was not trained on: a folder, an .npz shard or a glob. They are shuffled; the first
            calibrate, the next train the half-widths (unless training is given), others measure.
        out: folder to write the intervals to.
        alpha: largest expected part of pixels outside their interval, in (0, 1).
        training: other images to train the half-widths on; those of the network's own training will do.
        test: other images to measure the intervals on.
        split: "val" or "test" takes that part of data only, which a network trained on the same folder has not seen.
        problem: what is measured; by default the problem in the model's card.
        parameters: KEY=VALUE ... of the problem, where they differ from the model's card.
        intervals: earlier intervals of the network for the problem: they stay as they are and get an alarm, or with samples a
            density, which needs training.
        prior: a flow of clean images (name or folder) through which the alarm looks at the estimates, beside the network's own.
        samples: also train the density that flowprox reconstruct --samples draws from.
        n_training: how many images train the half-widths.
        n_calibration: how many calibrate; alpha needs at least 1 / alpha - 1.
        n_test: at most how many measure.
        n_alarm: at most how many images, those that calibrate and then those left of data, tell which results are not to be
            trusted; an alarm needs 198, and sees more with more. 0 makes none.
        n_steps: of training the half-widths.
        image_size: height and width in pixels; by default those the network was made for.
        seed: of the shuffling, the noise and the first weights.
        device: cpu, cuda or mps.
    """

    model: str
    data: str
    out: str
    alpha: float = 0.1
    training: str | None = None
    test: str | None = None
    split: str = "all"
    problem: str | None = None
    parameters: list[str] | None = None
    intervals: str | None = None
    prior: str | None = None
    samples: bool = False
    n_training: int = 1000
    n_calibration: int = 150
    n_test: int = 300
    n_alarm: int = 800
    n_steps: int = 600
    image_size: int | None = None
    seed: int = 0
    device: str = "cpu"


def calibrate(options: CalibrateOptions) -> None:
    """Make error bars for a trained network that hold a stated part of the pixels; flowprox reconstruct --intervals uses them.

    The promise is about the average over images like those that calibrate, not about single pixels or images.
    """
    parameters = key_values(options.parameters, "parameters")
    for name in ("n_training", "n_calibration", "n_steps", "n_test", "n_alarm"):
        require_count(name, getattr(options, name), 0 if name in ("n_test", "n_alarm") else 1)
    check_device(options.device)
    check_models(options.model, options.prior)
    import torch
    from deepinv.physics import LinearPhysics
    from rich.console import Console

    from flowprox.checkpoints import load_model, save_model
    from flowprox.data import ImageDataset
    from flowprox.estimates import channels_of, problem_of
    from flowprox.evaluation.run import progress_bar
    from flowprox.methods import make_method
    from flowprox.operators import make_physics
    from flowprox.uncertainty import fit_intervals, measured_intervals
    from flowprox.uncertainty.checks import required

    required(options.n_calibration, options.alpha)
    network = load_model(options.model, device=options.device)
    card: Card = network.card
    trained = card.problem or {}
    problem = problem_of(trained, options.problem, parameters, card.name)
    problem.to_json()  # what the card cannot hold is refused before anything is done
    method = make_method("unfolded", problem, model=network, device=options.device)
    trained_on = card.training.get("recipe", {}).get("data", {}).get("image_size") or 64
    size = options.image_size or (card.preprocessing.get("image_shape") or [0, trained_on])[1]
    channels = channels_of(network) or 3
    generator = torch.Generator().manual_seed(options.seed)

    def read(source: str, split: str = "all") -> torch.Tensor:
        images = ImageDataset(source, size, split, channels=channels).images
        return images[torch.randperm(len(images), generator=generator)]

    pool = read(options.data, options.split)
    seed = int(trained.get("seed", 0))
    physics = make_physics(problem, (channels, size, size), seed=seed, device=options.device)
    assert isinstance(physics, LinearPhysics)  # method unfolded is for no other
    if options.intervals is not None:
        earlier = load_model(options.intervals, device=options.device)
        earlier.check(card.sha256, problem, seed)
        complete, facts = earlier, dict(earlier.card.training)
        if options.n_alarm:
            complete, alarm_facts = _with_alarm(earlier, network, physics, pool, options)
            facts |= alarm_facts
        if options.samples:
            if options.training is None:
                raise ValueError("samples need images that train their density: give some with --training")
            training = read(options.training)[: options.n_training]
            complete = _with_density(complete, network, physics, training, options)
            facts |= {
                "density_training": options.training,
                "n_density": len(training),
                "density_steps": options.n_steps,
            }
        save_model(complete, options.out, replace(earlier.card, name=Path(options.out).absolute().name, training=facts))
        print(f"written to {options.out}")
        return
    n_own = 0 if options.training else options.n_training
    if len(pool) < options.n_calibration + n_own:
        remedy = "" if options.training else "; or give other images for the half-widths with --training"
        raise ValueError(
            f"{options.data} holds {len(pool)} images, but {options.n_calibration} to calibrate and {n_own} for the "
            f"half-widths are {options.n_calibration + n_own}: give more images, or lower n_calibration or n_training{remedy}"
        )
    calibration, own, rest = pool.tensor_split([options.n_calibration, options.n_calibration + n_own])
    training = read(options.training)[: options.n_training] if options.training else own
    if len(training) < options.n_training:
        raise ValueError(
            f"{options.training} holds {len(training)} images, not {options.n_training}: give more, or lower n_training"
        )
    test = (read(options.test) if options.test else rest)[: options.n_test]

    def floats(images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255).to(options.device)

    print(f"intervals of {card.name} for {problem.label}: at most {options.alpha:.0%} of the pixels outside on average")
    with progress_bar(Console(stderr=True)) as shown:
        bars: Values = {}

        def show(what: str, n: int, n_at_most: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=n_at_most)
            shown.update(bars[what], completed=n)

        intervals = fit_intervals(
            method, physics, floats(training), floats(calibration), options.alpha, options.n_steps, options.seed, show
        )
    watched = torch.cat([calibration, rest if options.test else rest[len(test) :]])
    intervals, alarm_facts = _with_alarm(intervals, network, physics, watched, options)
    if options.samples:
        intervals = _with_density(intervals, network, physics, training, options)
    metrics: dict[str, float] = {}
    if len(test) >= _FEWEST:
        first = options.seed + options.n_training + options.n_calibration
        metrics = measured_intervals(intervals, method, physics, floats(test), first)
    facts = {
        "data": options.data,
        "terms": card.training.get("terms"),
        "model": card.name,
        "model_sha256": card.sha256,
        "calibration_sha256": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
        "alpha": options.alpha,
        "n_training": len(training),
        "n_calibration": len(calibration),
        **alarm_facts,
        "n_test": len(test) if metrics else 0,
        "training": options.training or options.data,
        "test": options.test or options.data,
        "steps": options.n_steps,
        "seed": options.seed,
    }
    known = {**json.loads(problem.to_json()), "seed": seed}
    save_model(intervals, options.out, {"problem": known, "training": facts, "metrics": metrics})
    if metrics:
        print_table([f"on {len(test)} test images", ""], [[key, digits(value, 4)] for key, value in metrics.items()])
    else:
        print(f"not measured: {len(test)} images are left, and {_FEWEST} are needed; give more, or others with --test")
    print(f"written to {options.out}; use them with flowprox reconstruct --intervals")


def _with_alarm(
    intervals: Intervals, network: Unfolded, physics: LinearPhysics, images: Tensor, options: CalibrateOptions
) -> tuple[Intervals, Values]:
    """The intervals with an alarm, and of what it is: images (B, C, H, W), of 8 bits. Too few make none."""
    from flowprox.checkpoints import load_model
    from flowprox.uncertainty import Intervals, fit_alarm, measured_estimates

    images, flows = images[: options.n_alarm], network.flows()[-1:]
    if len(images) < _FEWEST_FOR_ALARM or not flows:
        if options.n_alarm:
            print(
                f"no alarm: it needs {_FEWEST_FOR_ALARM} images that are left, not {len(images)}, and a network with flows"
            )
        return intervals, {"n_alarm": 0}
    facts: Values = {"n_alarm": len(images), "alarm_data": options.data}
    if options.prior is not None:
        flows.append(load_model(options.prior, device=options.device))
        facts["prior_sha256"] = flows[-1].card.sha256
    seeds = range(options.seed + _APART, options.seed + _APART + len(images))
    x = (images.float() / 255).to(options.device)
    estimates = [(x_hat, y) for _, y, x_hat in measured_estimates(network, x, physics, seeds)]
    alarm = fit_alarm(estimates, physics, *flows, prior=options.prior)
    return Intervals(intervals.scale, intervals.alpha, intervals.factor, alarm, intervals.density), facts


def _with_density(
    intervals: Intervals, network: Unfolded, physics: LinearPhysics, images: Tensor, options: CalibrateOptions
) -> Intervals:
    """The intervals with a density to draw samples from, trained on images (B, C, H, W) of 8 bits."""
    import torch

    from flowprox.uncertainty import Intervals, measured_estimates
    from flowprox.unfolding import fit_density

    x = (images.float() / 255).to(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    digits = (torch.rand(x.shape, generator=generator) - 0.5).to(x) / 255  # 8 bits have a density only if spread
    estimates = [
        (one + digits[32 * i : 32 * i + len(one)], y, x_hat)
        for i, (one, y, x_hat) in enumerate(
            measured_estimates(network, x, physics, range(options.seed, options.seed + len(x)))
        )
    ]
    print(f"a density of {len(x)} images, {options.n_steps} steps")
    density = fit_density(estimates, physics, n_steps=options.n_steps, seed=options.seed)
    return Intervals(intervals.scale, intervals.alpha, intervals.factor, intervals.alarm, density)
