"""The models that options describe: a flow, a prox, an unfolded network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowprox.checkpoints import load_model
from flowprox.flows import Flow, Glow
from flowprox.naming import Values, build
from flowprox.noise import FlowNoise
from flowprox.operators import LearnedBlur
from flowprox.options import DataOptions, NoiseOptions, ProblemOptions, UnfoldedOptions
from flowprox.prox import FlowProx, ResNetProx, UNetProx, at_level
from flowprox.unfolding import Unfolded, UnfoldedHQS, UnfoldedPGD

_FIRST = "latent_mean.first.weight"
_NETS = {"resnet": ResNetProx, "unet": UNetProx}


def image_shape(data: DataOptions | NoiseOptions) -> tuple[int, int, int]:
    """(C, H, W) of the images that are trained on."""
    return data.channels, data.image_size, data.image_size


def make_flow(flow: str | Values, data: DataOptions | NoiseOptions) -> Flow:
    """A flow for the images or noise of ``data``: a preset, a specification or a pretrained one (see ``train_flow``);
    ValueError where it cannot be built or found, is no flow, or does not take images of that size."""
    shape = image_shape(data)
    if flow == "compact":
        made: Any = Glow.compact(shape)
    elif flow == "paper":
        made = Glow.paper(shape)
    elif isinstance(flow, str):
        made = load_model(flow)
        made = made.flow if isinstance(made, FlowNoise) else made
    else:
        arguments = {"image_shape": list(shape), **flow.get("arguments", {})}
        made = build({**flow, "arguments": arguments})
    if not isinstance(made, Flow):
        raise ValueError(f"flow must be a flow; {flow!r} is a {type(made).__name__}")
    if made.n_channels != data.channels or data.image_size % made.divisor:
        raise ValueError(
            f"the flow takes images of {made.n_channels} channels whose sides are divisible by {made.divisor}; "
            f"data has {data.channels} channels and image_size {data.image_size}"
        )
    return made


def make_net_prox(kind: str, arguments: Values, data: DataOptions) -> nn.Module:
    """A ResNet or U-Net prox, untrained, for images of ``data``; ``kind`` is "resnet" or "unet"."""
    return build({"kind": _NETS[kind].__name__, "arguments": {"n_channels": data.channels, **arguments}})


def _make_prox(options: UnfoldedOptions, data: DataOptions) -> nn.Module:
    if options.prox in ("flow", "plug-and-play"):
        assert options.flow is not None
        flow, levels = make_flow(options.flow, data), options.levels if options.channelwise else None
        return FlowProx(flow, options.base, options.channelwise, levels, options.log_determinant)
    if options.pretrained is None:
        return make_net_prox(options.prox, options.prox_arguments, data)
    if not isinstance(prox := load_model(options.pretrained), _NETS[options.prox]):
        raise ValueError(f"pretrained {options.pretrained!r} is a {type(prox).__name__}, not a {options.prox} prox")
    return prox


def make_unfolded(options: UnfoldedOptions, problem: ProblemOptions, data: DataOptions) -> Unfolded:
    """The unfolded network that the options describe, untrained except for what is pretrained; ValueError where the parts do
    not fit each other or something pretrained is not found."""
    first = _make_prox(options, data)
    shared = options.tied or options.prox == "plug-and-play"
    proxes = [first if shared or k == 0 else copy.deepcopy(first) for k in range(options.n_folds)]
    alike = ("shrinkage", "shrink_last", "final_data_step", "levels", "adaptation_rank")
    arguments: Values = {name: getattr(options, name) for name in alike}
    default = "flow" if isinstance(first, FlowProx) else "adjoint"
    arguments |= {"start": options.start or default, "latent_mean": None}
    if options.learn_operator:
        arguments["operator"] = _learned_blur(problem)
    if options.latent_mean is not None:
        n_inputs = data.channels + 1 + int(options.levels is not None)
        sizes = {"n_inputs": n_inputs, "n_channels": data.channels, "n_folds": options.n_folds}
        arguments["latent_mean"] = build({"kind": "LatentMeanNet", "arguments": {**sizes, **options.latent_mean}})
    is_hqs = options.iteration == "hqs"
    weight = options.penalty if is_hqs else options.step_size
    model: Unfolded = (UnfoldedHQS if is_hqs else UnfoldedPGD)(proxes, weight, **arguments)
    if options.prox == "plug-and-play":
        model.freeze_proxes()
    if isinstance(first, FlowProx) and options.pretrained is not None:
        _start_from(model, options.pretrained)
    return model


def load_unfolded(option: str, name: str) -> Unfolded:
    """The trained network that an option names; ValueError where it is none."""
    if not isinstance(trained := load_model(name), Unfolded):
        raise ValueError(f"{option} {name!r} is a {type(trained).__name__}, not an unfolded network")
    return trained


def _start_from(model: Unfolded, name: str) -> None:
    """Copy the weights of a trained network.

    Its scalars stand for every level, shrinkages with their growth, or are interpolated between its levels. An input that it
    did not have, a level or a predicted mean, has no effect at the start. Data steps of another kind or number keep their own
    weights, so that a denoiser can start what deblurs; a start image stays, too.
    """
    trained = load_unfolded("pretrained", name)
    own, loaded = model.state_dict(), _at_levels(trained, model.levels)
    weights = "log_data_weight"
    if type(trained.data_step) is not type(model.data_step) or len(own[weights]) != len(loaded[weights]):
        loaded[weights] = own[weights]
    missing = {key for key in own.keys() - loaded.keys() if not key.startswith(("latent_mean.", "start_image"))}
    unlike = sorted(missing | (loaded.keys() - own.keys()))
    for key in own.keys() & loaded.keys():
        mine, theirs = own[key].shape, loaded[key].shape
        grows = key == _FIRST and mine[0] == theirs[0] and mine[1] == theirs[1] + 4  # by an input, of 2x2 pixels
        is_scalar = key != _FIRST and len(theirs) == 1 and len(mine) == 2 and theirs[0] in mine
        unlike += [] if mine == theirs or grows or is_scalar else [key]
    if unlike:
        differing = ", ".join(unlike[:3])
        raise ValueError(f"pretrained {name!r} is another network: {differing} differ; use its own model options")
    for key, value in loaded.items():
        if own[key].shape == value.shape:
            own[key].copy_(value)
        elif key == _FIRST:  # the level is the last input, which pixels of 2x2 blocks come from
            own[key].zero_()[:, : value.shape[1]].copy_(value)
        elif key.endswith("log_weight"):  # (J, n_groups)
            own[key].copy_(value.expand_as(own[key]))
        else:  # (n, J), which already grows with the level
            own[key].add_((value - own[key][:, -1])[:, None])


def _at_levels(trained: Unfolded, levels: Sequence[float] | None) -> dict[str, Tensor]:
    """Its state, with the scalars of other levels than its own interpolated; beyond its last level they stay."""
    state = trained.state_dict()
    if trained.levels is None or levels is None or tuple(trained.levels) == tuple(levels):
        return state
    sigma = torch.tensor(levels)
    for key, value in state.items():
        if key.endswith("log_weight"):  # (J, n_groups)
            state[key] = at_level(value, trained.levels, sigma)
        elif key in ("log_data_weight", "log_shrinkage"):  # (n, J)
            state[key] = at_level(value.T, trained.levels, sigma).T
    return state


def _learned_blur(problem: ProblemOptions) -> LearnedBlur:
    if problem.name != "deblurring":
        raise ValueError(f'learn_operator learns a blur kernel: it needs problem "deblurring", not "{problem.name}"')
    fixed = [key for key in ("kernel", "boundary") if problem.parameters.get(key) not in (None, "circular")]
    if fixed:
        raise ValueError(f"learn_operator learns a circular Gaussian-like kernel; leave out {', '.join(fixed)}")
    known = {key: problem.parameters[key] for key in ("kernel_size", "sigma_blur") if key in problem.parameters}
    return LearnedBlur(**known)
