"""Training of flows, unfolded networks, denoisers and GANs: one function per kind of model.

The command line is made from these functions, so nothing heavy is imported before one is called.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypedDict

from typing_extensions import Unpack

from flowprox.options import (
    DataOptions,
    DenoiserOptions,
    GANOptions,
    LikelihoodOptions,
    NoiseOptions,
    Parameters,
    ProblemOptions,
    TrainingOptions,
    TrainingResult,
    UnfoldedOptions,
)
from flowprox.training.callbacks import Callback

__all__ = ["Callback", "RunOptions", "TrainingResult", "train_denoiser", "train_flow", "train_gan", "train_unfolded"]

_LIKELIHOOD = LikelihoodOptions()
_NO_DATA, _NO_NOISE = DataOptions(train=""), NoiseOptions(name="")


class RunOptions(TypedDict, total=False):
    """Whether a run is a new one, and what it is called.

    Arguments:
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card, by default its kind.
    """

    resume: bool
    name: str


def train_flow(
    flow: str | Parameters,
    training: TrainingOptions,
    data: DataOptions = _NO_DATA,
    noise: NoiseOptions = _NO_NOISE,
    likelihood: LikelihoodOptions = _LIKELIHOOD,
    out: str = "runs/flow",
    *,
    callbacks: Sequence[Callback] = (),
    **run: Unpack[RunOptions],
) -> TrainingResult:
    """Train a normalizing flow on clean images, or on noise, by maximum likelihood.

    Arguments:
        flow: "compact", "paper", a specification {kind: Glow, arguments: {...}}, or a pretrained flow (name, hf:ORG/NAME
            or folder) to train on.
        training: limits, optimizer and devices.
        data: the images.
        noise: what to learn in place of images, as the density of a measurement's noise; the model is then a
            ``FlowNoise``.
        likelihood: bit depth and added noise of images.
        out: folder of the run; the model is written to OUT/model.
        callbacks: told how the run goes; it stays the same to the bit.
        run: see ``RunOptions``.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``flowprox.training.loop.fit``; and ValueError for a flow that
            cannot be built.
    """
    from flowprox.training.tasks import likelihood_task, noise_task

    for key, options, nothing, main in (("data", data, _NO_DATA, "train"), ("noise", noise, _NO_NOISE, "name")):
        if options != nothing and not getattr(options, main):
            raise ValueError(f"{key}.{main} is missing; see --help of the command")
    if bool(data.train) == bool(noise.name):
        raise ValueError("give data, the images that the flow is to learn, or noise, and not both")
    if not noise.name:
        task = functools.partial(likelihood_task, flow, data, likelihood)
        return _fit(task, data, training, {"flow": flow, "likelihood": likelihood}, out, callbacks, run, "flow")
    if likelihood != _LIKELIHOOD:
        raise ValueError("likelihood tells how images become continuous; noise needs none: leave it out")
    task = functools.partial(noise_task, flow, noise)
    return _fit(task, noise, training, {"flow": flow}, out, callbacks, run, "flow")


def train_unfolded(
    model: UnfoldedOptions,
    problem: ProblemOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/unfolded",
    *,
    callbacks: Sequence[Callback] = (),
    **run: Unpack[RunOptions],
) -> TrainingResult:
    """Train an unfolded network, end to end, for one measurement problem.

    Arguments:
        model: the network: its prox, the number of folds, where it starts.
        problem: the operator and its noise.
        data: the clean images.
        training: limits, optimizer and devices.
        out: folder of the run; the model is written to OUT/model.
        callbacks: told how the run goes; it stays the same to the bit.
        run: see ``RunOptions``.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``flowprox.training.loop.fit``; ValueError also for what cannot
            be built.
    """
    from flowprox.training.tasks import reconstruction_task

    task = functools.partial(reconstruction_task, model, problem, data)
    return _fit(task, data, training, {"model": model, "problem": problem}, out, callbacks, run, "unfolded")


def train_denoiser(
    denoiser: DenoiserOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/denoiser",
    *,
    callbacks: Sequence[Callback] = (),
    **run: Unpack[RunOptions],
) -> TrainingResult:
    """Pre-train a ResNet or U-Net to remove Gaussian noise; an unfolded network may start from it.

    Arguments:
        denoiser: the network and the noise it learns to remove.
        data: the clean images.
        training: limits, optimizer and devices.
        out: folder of the run; the network is written to OUT/model.
        callbacks: told how the run goes; it stays the same to the bit.
        run: see ``RunOptions``.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``flowprox.training.loop.fit``.
    """
    from flowprox.training.tasks import denoising_task

    task = functools.partial(denoising_task, denoiser, data)
    return _fit(task, data, training, {"denoiser": denoiser}, out, callbacks, run, "denoiser")


def train_gan(
    gan: GANOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/gan",
    *,
    callbacks: Sequence[Callback] = (),
    **run: Unpack[RunOptions],
) -> TrainingResult:
    """Train a DCGAN; its generator is the GAN prior that flow priors are compared with.

    Arguments:
        gan: the two networks.
        data: the images.
        training: limits, optimizer and devices.
        out: folder of the run; the generator is written to OUT/model.
        callbacks: told how the run goes; it stays the same to the bit.
        run: see ``RunOptions``.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``flowprox.training.loop.fit``.
    """
    from flowprox.training.gan import gan_task

    task = functools.partial(gan_task, gan, data)
    return _fit(task, data, training, {"gan": gan}, out, callbacks, run, "gan")


def _fit(
    make_task: functools.partial,
    data: DataOptions | NoiseOptions,
    training: TrainingOptions,
    recipe: Parameters,
    out: str,
    callbacks: Sequence[Callback],
    run: RunOptions,
    kind: str,
) -> TrainingResult:
    from flowprox.training.loop import fit

    options: RunOptions = {"name": kind, **run}
    return fit(make_task, data, training, out, recipe, callbacks=callbacks, **options)
