"""Image reconstruction from noisy or incomplete measurements with normalizing-flow priors.

The names below are imported on first use, so that ``import flowprox`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowprox.baselines import PlugAndPlay
    from flowprox.checkpoints import list_models, load_model, save_model
    from flowprox.flows import Glow, RealNVP
    from flowprox.operators import make_physics
    from flowprox.priors import FlowDenoiser, FlowPrior, NoiseFidelity, ReconstructorDenoiser
    from flowprox.prox import FlowProx, ResNetProx, SoftThreshold, UNetProx
    from flowprox.restoration import restore
    from flowprox.unfolding import LatentMeanNet, UnfoldedHQS, UnfoldedPGD

__all__ = [
    "FlowDenoiser", "FlowPrior", "FlowProx", "Glow", "LatentMeanNet", "NoiseFidelity", "PlugAndPlay", "RealNVP",
    "ReconstructorDenoiser", "ResNetProx", "SoftThreshold", "UNetProx", "UnfoldedHQS", "UnfoldedPGD", "__version__",
    "list_models", "load_model", "make_physics", "restore", "save_model",
]  # fmt: skip

__version__ = "0.2.0"

_HOMES = {
    "flowprox.baselines": ("PlugAndPlay",),
    "flowprox.checkpoints": ("list_models", "load_model", "save_model"),
    "flowprox.flows": ("Glow", "RealNVP"),
    "flowprox.operators": ("make_physics",),
    "flowprox.priors": ("FlowDenoiser", "FlowPrior", "NoiseFidelity", "ReconstructorDenoiser"),
    "flowprox.restoration": ("restore",),
    "flowprox.prox": ("FlowProx", "ResNetProx", "SoftThreshold", "UNetProx"),
    "flowprox.unfolding": ("LatentMeanNet", "UnfoldedHQS", "UnfoldedPGD"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


MODEL_MODULES = tuple(
    f"flowprox.{name}" for name in "networks flows noise prox operators unfolding baselines uncertainty".split()
)
"""Modules whose import registers every kind that a model's card may name, lowest first: a flow is loaded without deepinv."""


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'flowprox' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
