"""An exported network computes what the module computes, read back from a file and for other batch sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowprox.baselines import TotalVariation
from flowprox.flows import Glow, RealNVP
from flowprox.operators import make_physics
from flowprox.prox import FlowProx, ResNetProx
from flowprox.unfolding import LatentMeanNet, Unfolded, UnfoldedHQS, UnfoldedPGD
from flowprox.unfolding.export import export_program

SHAPE = (3, 16, 16)
GLOW = {"image_shape": SHAPE, "n_levels": 2, "n_steps": 2, "hidden_channels": 8}
MODELS = {
    "plain flows": lambda: UnfoldedPGD([FlowProx(Glow(**GLOW), channelwise=True) for _ in range(2)]),
    "fast flows": lambda: UnfoldedPGD(
        [FlowProx(Glow(**GLOW, backward="fast-nothing")) for _ in range(2)], final_data_step=True
    ),
    "exact data steps": lambda: UnfoldedHQS([FlowProx(Glow(**GLOW, shift_bound=4.0, squeeze="haar"))]),
    "realnvp": lambda: UnfoldedPGD([FlowProx(RealNVP(SHAPE, 2, 2, 8, 1))]),
    "resnet": lambda: UnfoldedPGD([ResNetProx(3, 8, 1)], start="adjoint"),
    "predicted mean": lambda: UnfoldedPGD([FlowProx(Glow(**GLOW))], latent_mean=LatentMeanNet(4, 3, 1, [8, 8])),
    "predicted mean, told the level": lambda: UnfoldedPGD(
        [FlowProx(Glow(**GLOW), channelwise=True, levels=[0.1, 0.3])],
        levels=[0.1, 0.3],
        latent_mean=LatentMeanNet(5, 3, 1, [8, 8]),
    ),
    "adapted folds": lambda: UnfoldedPGD([FlowProx(Glow(**GLOW)) for _ in range(2)], adaptation_rank=2),
}
PROBLEMS = {"denoising": {"sigma": 0.2}, "inpainting": {"mask_size": 5}, "deblurring": {}}


def trained(name: str) -> Unfolded:
    model = MODELS[name]()
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
    problem = dict(zip(MODELS, 3 * list(PROBLEMS), strict=False))[name]
    model, physics = trained(name), make_physics(problem, SHAPE, **PROBLEMS[problem])
    y = physics(torch.rand(5, *SHAPE))
    torch.export.save(export_program(model, physics, y[:2]), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    model.eval()
    with torch.no_grad():
        for batch in (y, y[:1]):
            torch.testing.assert_close(program(batch), model(batch, physics), rtol=1e-5, atol=1e-5)


def test_model_is_as_it_was() -> None:
    model, physics = trained("plain flows"), make_physics("denoising", SHAPE)
    before = dict(model.named_modules())
    export_program(model, physics, torch.rand(2, *SHAPE))
    assert model.training and all(p.requires_grad for p in model.proxes.parameters())
    assert dict(model.named_modules()) == before


def test_single_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two measurements"):
        export_program(trained("plain flows"), make_physics("denoising", SHAPE), torch.rand(1, *SHAPE))


def test_a_solver_is_refused() -> None:
    physics = make_physics("denoising", (3, 8, 8))
    with pytest.raises(ValueError, match="only unfolded networks"):
        export_program(TotalVariation(), physics, torch.rand(2, 3, 8, 8))
