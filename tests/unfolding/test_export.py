"""An exported network computes what the module computes, read back from a file and for other batch sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowprox.baselines import TotalVariation
from flowprox.flows import Glow, RealNVP
from flowprox.operators import make_physics
from flowprox.prox import FlowProx, ResNetProx
from flowprox.unfolding import LatentMeanNet, Unfolded, UnfoldedHQS, UnfoldedPGD, export_program

SHAPE = (3, 16, 16)
GLOW = {"image_shape": SHAPE, "n_levels": 2, "n_steps": 1, "hidden_channels": 8}
LEVELS = [0.1, 0.3]
MODELS = {
    "adapted folds, told the level": (
        "denoising",
        lambda: UnfoldedPGD(
            [FlowProx(Glow(**GLOW), channelwise=True, levels=LEVELS) for _ in range(2)],
            levels=LEVELS,
            adaptation_rank=2,
        ),
    ),
    "final data step, fast flow, predicted mean": (
        "inpainting",
        lambda: UnfoldedPGD(
            [FlowProx(Glow(**GLOW, backward="fast-nothing"), "laplace")],
            final_data_step=True,
            latent_mean=LatentMeanNet(4, 3, 1, [8, 8]),
        ),
    ),
    "exact data steps": ("deblurring", lambda: UnfoldedHQS([FlowProx(Glow(**GLOW, shift_bound=4.0, squeeze="haar"))])),
    "RealNVP and ResNet": (
        "denoising",
        lambda: UnfoldedPGD([FlowProx(RealNVP(SHAPE, 1, 2, 8, 1)), ResNetProx(3, 8, 1)], start="adjoint"),
    ),
}
PROBLEMS = {"denoising": {"sigma": 0.2}, "inpainting": {"mask_size": 5}, "deblurring": {}}


def trained(name: str) -> Unfolded:
    model = MODELS[name][1]()
    for flow in model.flows():
        flow.initialize(torch.rand(4, *SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings(
    "ignore:No complete tensor found in the group"
)  # constants are channels-last; see the docstring
@pytest.mark.parametrize("name", MODELS)
def test_exported_program_is_the_model(name: str, tmp_path: Path) -> None:
    problem = MODELS[name][0]
    model, physics = trained(name), make_physics(problem, SHAPE, **PROBLEMS[problem])
    y = physics(torch.rand(5, *SHAPE))
    modules = dict(model.named_modules())
    torch.export.save(export_program(model, physics, y[:2]), tmp_path / "model.pt2")
    assert (
        dict(model.named_modules()) == modules and model.training and all(p.requires_grad for p in model.parameters())
    )
    program = torch.export.load(tmp_path / "model.pt2").module()
    model.eval()
    with torch.no_grad():
        for batch in (y, y[:1]):
            torch.testing.assert_close(program(batch), model(batch, physics), rtol=1e-5, atol=1e-5)


def test_the_level_may_stay_an_input() -> None:
    model, physics, other = (
        trained("adapted folds, told the level"),
        *(make_physics("denoising", SHAPE, sigma=s) for s in (0.2, 0.1)),
    )
    y = other(torch.rand(3, *SHAPE))
    program = export_program(model, physics, y[:2], inputs=["sigma"]).module()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(program(y, torch.tensor(0.1)), model(y, other), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no tensor 'kernel'"):
        export_program(model, physics, y[:2], inputs=["kernel"])


def test_single_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two measurements"):
        export_program(trained("exact data steps"), make_physics("denoising", SHAPE), torch.rand(1, *SHAPE))


def test_a_solver_is_refused() -> None:
    physics = make_physics("denoising", (3, 8, 8))
    with pytest.raises(ValueError, match="only unfolded networks"):
        export_program(TotalVariation(), physics, torch.rand(2, 3, 8, 8))


def test_exact_data_steps_without_a_closed_form_are_refused() -> None:
    physics = make_physics("deblurring", SHAPE, kernel_size=3, boundary="replicate")
    with pytest.raises(ValueError, match="boundary 'replicate' cannot be exported"):
        export_program(trained("exact data steps"), physics, torch.rand(2, *SHAPE))
