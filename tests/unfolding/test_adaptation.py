"""Folds that share coupling nets but for a low-rank correction: what is shared, what is not, what comes back from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowprox.checkpoints import load_model, save_model
from flowprox.flows import Flow, Glow, frozen
from flowprox.operators import make_physics
from flowprox.prox import FlowProx, ResNetProx
from flowprox.unfolding import UnfoldedPGD
from flowprox.unfolding.conditioning import adapt

SHAPE = (3, 8, 8)


def flows(n: int = 3, **options) -> list[Flow]:
    arguments = {"n_levels": 2, "n_steps": 2, "hidden_channels": 8, "coupling": "conv-actnorm"}
    return [Glow(SHAPE, **{**arguments, **options}) for _ in range(n)]


def moved(flow: Flow) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


def n_parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for p in {p: None for module in modules for p in module.parameters()})


def low_rank(weights: list[Tensor]) -> list[int]:
    return [int(torch.linalg.matrix_rank((w - weights[0]).flatten(1))) for w in weights[1:]]


@pytest.mark.parametrize("coupling", ["conv", "conv-actnorm", "residual", "attention", "unet"])
def test_folds_differ_by_corrections_of_the_rank(coupling: str) -> None:
    width = [[8, 8]] * 2 if coupling == "unet" else 8
    adapted = flows(coupling=coupling, hidden_channels=width)
    adapt(adapted, rank=2)
    names = [name for name, _ in adapted[0].named_parameters() if name.endswith("weight.original")]
    assert names and all(f.get_parameter(n) is adapted[0].get_parameter(n) for f in adapted for n in names)
    for flow in adapted:
        moved(flow)
    for name in names:
        owner = name.removesuffix(".parametrizations.weight.original")
        weights = [flow.get_submodule(owner).weight for flow in adapted]
        assert all(0 < rank <= 4 for rank in low_rank(weights))  # two corrections of rank 2 apart


def test_adapted_flows_are_invertible_on_the_plain_and_the_fast_path() -> None:
    for backward in ("plain", "fast-inputs"):
        adapted = flows(backward=backward)
        adapt(adapted, rank=2)
        x = torch.rand(2, *SHAPE, dtype=torch.float64)
        for flow in adapted:
            flow.double().initialize(x)
            moved(flow).eval()
            z = flow.encode(x)
            torch.testing.assert_close(flow.decode(z), x)
            with frozen(flow):
                torch.testing.assert_close(flow.encode(x), z)


@pytest.mark.parametrize("backward", ["fast-nothing", "fast-early", "fast-inputs", "fast-invert"])
def test_gradients_reach_what_is_shared_and_what_is_not(backward: str) -> None:
    plain, fast = flows(2), flows(2, backward=backward)
    adapt(plain, rank=2)
    adapt(fast, rank=2)
    x = torch.rand(2, *SHAPE, dtype=torch.float64)
    models = [torch.nn.ModuleList(part).double() for part in (plain, fast)]
    for flow in plain:
        flow.initialize(x)
        moved(flow)
    models[1].load_state_dict(models[0].state_dict())
    gradients = []
    for model in models:
        loss = sum(flow.log_prob(x).mean() for flow in model)
        assert isinstance(loss, Tensor)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_an_adapted_network_comes_back_from_its_file(tmp_path: Path) -> None:
    proxes = [FlowProx(flow) for flow in flows()]
    apart = n_parameters(*proxes)
    model = UnfoldedPGD(proxes, adaptation_rank=2)
    for flow in model.flows():
        flow.initialize(torch.rand(4, *SHAPE))
        moved(flow)
    assert n_parameters(model) < 0.75 * apart
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert n_parameters(loaded) == n_parameters(model)
    physics, y = make_physics("denoising", SHAPE, sigma=0.1), torch.rand(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(y, physics), model.eval()(y, physics), rtol=0, atol=0)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_folds_begin_as_the_first_flow() -> None:
    adapted = flows(2)
    first = adapted[0].state_dict()["bijection.layers.1.layers.0.coupling.net.hidden.0.weight"].clone()
    adapt(adapted, rank=1)
    weights = [f.get_submodule("bijection.layers.1.layers.0.coupling.net.hidden.0").weight for f in adapted]
    assert all(torch.equal(w, first) for w in weights)


def twice() -> None:
    adapted = flows(2)
    adapt(adapted, 1)
    adapt(adapted, 1)


REFUSED = {
    "rank": (lambda: adapt(flows(2), 0), "at least 1, got 0"),
    "one flow": (lambda: adapt(flows(1), 2), "two flows or more"),
    "the same flow": (lambda: UnfoldedPGD([FlowProx(flows(1)[0])] * 2, adaptation_rank=2), "two flows or more"),
    "other architectures": (lambda: adapt([*flows(1), *flows(1, hidden_channels=4)], 2), "the same coupling nets"),
    "no flows": (
        lambda: UnfoldedPGD([ResNetProx(3, 4, 1)] * 2, start="adjoint", adaptation_rank=2),
        "two flows or more",
    ),
    "twice": (twice, "already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
