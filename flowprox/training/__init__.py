"""Training of flows, unfolded networks, denoisers and GANs: one function per kind of model.

The command line is made from these functions, so nothing heavy is imported before one is called.
"""

from __future__ import annotations

import functools

from flowprox.naming import Values
from flowprox.options import (
    DataOptions,
    DenoiserOptions,
    GANOptions,
    LikelihoodOptions,
    NoiseOptions,
    ProblemOptions,
    TrainingOptions,
    TrainingResult,
    UnfoldedOptions,
)
from flowprox.training.callbacks import Callback, reporting_to

__all__ = ["Callback", "TrainingResult", "reporting_to", "train_denoiser", "train_flow", "train_gan", "train_unfolded"]

_LIKELIHOOD = LikelihoodOptions()
_NO_DATA, _NO_NOISE = DataOptions(train=""), NoiseOptions(name="")


def train_flow(
    flow: str | Values,
    training: TrainingOptions,
    data: DataOptions = _NO_DATA,
    noise: NoiseOptions = _NO_NOISE,
    likelihood: LikelihoodOptions = _LIKELIHOOD,
    out: str = "runs/flow",
    resume: bool = False,
    name: str = "flow",
) -> TrainingResult:
    """Train a normalizing flow on clean images, or on noise, by maximum likelihood.

    Arguments:
        flow: "compact", "paper", a specification {kind: Glow, arguments: {...}}, or a pretrained flow (name, hf:ORG/NAME
            or folder) to train on.
        training: limits, optimizer and devices.
        data: the images.
        noise: what to learn in place of images, as the density of a measurement's noise; the model is then a ``FlowNoise``.
        likelihood: bit depth and added noise of images.
        out: folder of the run; the model is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.

    Errors, of all four functions: see ``flowprox.training.loop.fit``; and ValueError for what cannot be built.
    """
    from flowprox.training.loop import fit
    from flowprox.training.tasks import likelihood_task, noise_task

    for key, options, nothing, main in (("data", data, _NO_DATA, "train"), ("noise", noise, _NO_NOISE, "name")):
        if options != nothing and not getattr(options, main):
            raise ValueError(f"{key}.{main} is missing; see --help of the command")
    if bool(data.train) == bool(noise.name):
        raise ValueError("give data, the images that the flow is to learn, or noise, and not both")
    if not noise.name:
        task = functools.partial(likelihood_task, flow, data, likelihood)
        return fit(task, data, training, out, {"flow": flow, "likelihood": likelihood}, resume, name)
    if likelihood != _LIKELIHOOD:
        raise ValueError("likelihood tells how images become continuous; noise needs none: leave it out")
    task = functools.partial(noise_task, flow, noise)
    return fit(task, noise, training, out, {"flow": flow}, resume, name)


def train_unfolded(
    model: UnfoldedOptions,
    problem: ProblemOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/unfolded",
    resume: bool = False,
    name: str = "unfolded",
) -> TrainingResult:
    """Train an unfolded network, end to end, for one measurement problem.

    Arguments:
        model: the network: its prox, the number of folds, where it starts.
        problem: the operator and its noise.
        data: the clean images.
        training: limits, optimizer and devices.
        out: folder of the run; the model is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    from flowprox.training.loop import fit
    from flowprox.training.tasks import reconstruction_task

    task = functools.partial(reconstruction_task, model, problem, data)
    return fit(task, data, training, out, {"model": model, "problem": problem}, resume, name)


def train_denoiser(
    denoiser: DenoiserOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/denoiser",
    resume: bool = False,
    name: str = "denoiser",
) -> TrainingResult:
    """Pre-train a ResNet or U-Net to remove Gaussian noise; an unfolded network may start from it.

    Arguments:
        denoiser: the network and the noise it learns to remove.
        data: the clean images.
        training: limits, optimizer and devices.
        out: folder of the run; the network is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``flowprox.training.loop.fit``.
    """
    from flowprox.training.loop import fit
    from flowprox.training.tasks import denoising_task

    task = functools.partial(denoising_task, denoiser, data)
    return fit(task, data, training, out, {"denoiser": denoiser}, resume, name)


def train_gan(
    gan: GANOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/gan",
    resume: bool = False,
    name: str = "gan",
) -> TrainingResult:
    """Train a DCGAN; its generator is the GAN prior that flow priors are compared with.

    Arguments:
        gan: the two networks.
        data: the images.
        training: limits, optimizer and devices.
        out: folder of the run; the generator is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``flowprox.training.loop.fit``.
    """
    from flowprox.training.loop import fit
    from flowprox.training.tasks import gan_task

    task = functools.partial(gan_task, gan, data)
    return fit(task, data, training, out, {"gan": gan}, resume, name)
