"""The registry of reconstruction methods: what each needs, is for, and starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flowprox.naming import nearest
from flowprox.operators import PROBLEMS

__all__ = ["METHODS", "MethodKind", "default_options", "method_kind"]

_NO_OPTIONS: Mapping[str, Any] = {}


class MethodKind(NamedTuple):
    """One line of the registry.

    Arguments:
        target: "module:Class", imported when the method is made; "" for a trained network, which is the method itself.
        description: one line.
        needs: what must be given: "flow" (a trained flow), "model" (a trained network or generator), or one of several.
        takes_noise: whether a noise may be given in the place of the physics' own.
        takes_decoder: whether the flow may be a generator without a density.
        problems: names of the problems it applies to; None: all.
        needs_linear: whether it applies to linear operators only.
        defaults: options that differ from those of the class, by problem; those of "" hold for all.
        quick: the options that make it end within seconds, for trying a recipe out.
    """

    target: str
    description: str
    needs: tuple[str, ...] = ()
    takes_noise: bool = False
    takes_decoder: bool = False
    problems: tuple[str, ...] | None = None
    needs_linear: bool = False
    defaults: Mapping[str, Mapping[str, Any]] = _NO_OPTIONS
    quick: Mapping[str, Any] = _NO_OPTIONS

    def missing(self, given: Mapping[str, Any]) -> str | None:
        """What the method needs and is None in ``given``, which has the keys flow and model."""
        ways = [need.split(" or ") for need in self.needs]
        return next((" or ".join(way) for way in ways if all(given.get(key) is None for key in way)), None)

    def applies_to(self, problem: str) -> bool:
        """Whether the method can be used for a problem of this name."""
        fits = not self.needs_linear or (problem in PROBLEMS and PROBLEMS[problem].is_linear)
        return fits and (self.problems is None or problem in self.problems)

    @property
    def applicable(self) -> list[str]:
        """Names of the problems that it can be used for."""
        return [name for name in PROBLEMS if self.applies_to(name)]


# a line search cannot follow the straight-through gradient of a sign
_STRAIGHT_THROUGH = {"optimizer": "adam", "n_iterations": 150, "learning_rate": 0.05, "final_learning_rate": 0.0}

METHODS: dict[str, MethodKind] = {
    "adjoint": MethodKind("flowprox.methods.running:Adjoint", "A^T y: the measurement carried back", needs_linear=True),
    "unfolded": MethodKind("", "a network trained for the operator", needs=("model",), needs_linear=True),
    "self-ensemble": MethodKind(
        "flowprox.methods.running:SelfEnsemble",
        "a network trained to denoise, averaged over the image and its mirror image",
        needs=("model",),
        problems=("denoising",),
    ),
    "latent-map": MethodKind(
        "flowprox.solvers:LatentMAP",
        "MAP in the latent space of a flow (Asim et al. 2020)",
        needs=("flow",),
        # Asim et al. (2020), App. A.1: no prior term where A loses much
        defaults={
            "denoising": {"gamma": "discrepancy"},
            "deblurring": {"gamma": "discrepancy"},
            "one-bit": {"gamma": 1.0, **_STRAIGHT_THROUGH},
        },
        quick={"n_iterations": 2},
    ),
    "noise-map": MethodKind(
        "flowprox.solvers:NoiseMAP",
        "MAP with a flow and a density of the noise (Whang et al. 2021)",
        needs=("flow",),
        takes_noise=True,
        takes_decoder=True,
        defaults={"one-bit": {"form": "latent", **_STRAIGHT_THROUGH}},
        quick={"n_iterations": 2},
    ),
    "posterior": MethodKind(
        "flowprox.solvers:PosteriorSampling",
        "mean of posterior samples drawn in the latent space of a flow",
        needs=("flow",),
        takes_noise=True,
        quick={"n_samples": 4, "n_warmup": 4, "n_chains": 2},
    ),
    "bm3d": MethodKind("flowprox.baselines:BM3D", "block matching and 3D filtering", problems=("denoising",)),
    "lasso-dct": MethodKind(
        "flowprox.baselines:Lasso",
        "sparse in a cosine basis",
        needs_linear=True,
        defaults={"": {"basis": "dct"}},
        quick={"n_iterations": 5},
    ),
    "lasso-wavelet": MethodKind(
        "flowprox.baselines:Lasso",
        "sparse in a wavelet basis",
        needs_linear=True,
        defaults={"": {"basis": "wavelet"}},
        quick={"n_iterations": 5},
    ),
    "tv": MethodKind(
        "flowprox.baselines:TotalVariation",
        "total variation",
        needs_linear=True,
        # tuned on validation faces (benchmarks/classical_baselines.py)
        defaults={
            "denoising": {"regularization": 0.24, "dual_step": 0.05},
            "compressed-sensing": {"regularization": 0.1},
            "inpainting": {"regularization": 6e-3, "n_iterations": 4000},
            "random-inpainting": {"regularization": 6e-3, "n_iterations": 4000},
        },
        quick={"n_iterations": 5},
    ),
    "wavelet": MethodKind(
        "flowprox.baselines:WaveletPrior", "wavelet shrinkage prior", needs_linear=True, quick={"n_iterations": 5}
    ),
    "gan": MethodKind(
        "flowprox.baselines:GANPrior",
        "in the range of a generator (Bora et al. 2017)",
        needs=("model",),
        quick={"n_steps": 2, "n_restarts": 1},
    ),
    "plug-and-play": MethodKind(
        "flowprox.baselines:PlugAndPlay",
        "a flow, or a network trained as a denoiser, in the place of the prox",
        needs=("flow or model",),
        needs_linear=True,
        quick={"n_iterations": 2},
    ),
    "biharmonic": MethodKind(
        "flowprox.baselines:Biharmonic", "the smoothest filling", problems=("inpainting", "random-inpainting")
    ),
    "wiener": MethodKind("flowprox.baselines:Wiener", "regularized inverse filter", problems=("deblurring",)),
}
"""Method name -> how it is made."""


def default_options(name: str, problem: str | None = None) -> dict[str, Any]:
    """The options of a method that differ from the defaults of its class, for a problem.

    Example:
        >>> default_options("lasso-dct")
        {'basis': 'dct'}
    """
    defaults = method_kind(name).defaults
    return {**defaults.get("", {}), **defaults.get(problem or "", {})}


def method_kind(name: str) -> MethodKind:
    """The registry's line; ``ValueError`` with the nearest names if there is none."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, sorted(METHODS))}")
    return METHODS[name]
