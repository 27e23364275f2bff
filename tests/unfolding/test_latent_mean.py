"""Predicted latent means: where they lie in the latent, what a prox does with them, and what does not fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_prox
from torch import Tensor, nn

from flowprox.flows import Conv1x1, Flow, Glow, RealNVP, Sequential, Squeeze, Unsqueeze
from flowprox.operators import VariedProblem, make_physics
from flowprox.prox import FlowProx, ResNetProx, SoftThreshold, UNetProx
from flowprox.unfolding import LatentMeanNet, UnfoldedPGD

SHAPE = (3, 16, 16)


def mean_net(**options) -> LatentMeanNet:
    arguments = {"n_inputs": 4, "n_channels": 3, "n_folds": 1, "hidden_channels": [4, 8]}
    return LatentMeanNet(**{**arguments, **options})


def glow_prox(**options) -> FlowProx:
    return FlowProx(Glow(image_shape=SHAPE, n_levels=2, n_steps=1, hidden_channels=4), **options)


def with_means(net: LatentMeanNet | None) -> LatentMeanNet:
    """The net with means that are not 0."""
    assert net is not None
    for convolution in net.means:
        nn.init.normal_(convolution.weight, std=0.1)  # type: ignore[arg-type]
    return net


def seen_inputs(model: UnfoldedPGD) -> list[Tensor]:
    """What the model will have given its net."""
    seen: list[Tensor] = []
    assert model.latent_mean is not None
    model.latent_mean.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("flow", [Glow, RealNVP])
@pytest.mark.parametrize("n_levels", [1, 2, 3])
def test_a_level_of_the_net_is_a_level_of_the_flows_latent(flow: type, n_levels: int) -> None:
    latent_groups = flow((3, 16, 16), n_levels=n_levels).latent_groups()
    net = mean_net(hidden_channels=[4] * n_levels)
    seen: list[int] = []
    for convolution in net.means:
        for other in net.means:
            nn.init.zeros_(other.bias)  # type: ignore[arg-type]
        nn.init.ones_(convolution.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            marked = net(torch.rand(1, 4, 16, 16))[0][0] == 1
        groups = latent_groups[marked].unique()
        assert len(groups) == convolution.out_channels
        assert torch.equal(marked, torch.isin(latent_groups, groups))  # whole channels of one level, and nothing else
        assert len({int((latent_groups == group).sum()) for group in groups}) == 1
        seen += groups.tolist()
    assert sorted(seen) == latent_groups.unique().tolist()


@pytest.mark.parametrize("base", ["gaussian", "laplace"])
@pytest.mark.parametrize("step", [0.0, 0.1, 2.0])
def test_the_prox_minimizes_the_functional_around_the_mean(base: str, step: float) -> None:
    rotation = Flow(Sequential([Squeeze(), Conv1x1(12), Unsqueeze()]), (3, 4, 4), n_levels=1, offset=0.0).double()
    prox = FlowProx(rotation, base=base)
    mean = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def functional(x: Tensor) -> Tensor:
        z = rotation.encode_image(x) - mean[: len(x)]
        values = 0.5 * z.square() if base == "gaussian" else z.abs()
        return values.flatten(1).sum(1)

    with torch.no_grad():
        v = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        assert_prox(lambda v, s: prox(v, s, mean=mean[: len(v)]), functional, v, step)


def test_step_zero_is_the_identity_and_a_large_one_gives_the_mean() -> None:
    prox, v, mean = glow_prox().double(), torch.rand(2, *SHAPE).double(), torch.randn(2, *SHAPE).double()
    with torch.no_grad():
        torch.testing.assert_close(prox(v, 0.0, mean=mean), v)
        torch.testing.assert_close(prox(v, 1e12, mean=mean), prox.flow.decode_image(mean))
        assert torch.equal(prox(v, 0.5), prox(v, 0.5, mean=torch.zeros_like(v)))


def test_a_fresh_network_is_the_one_without_a_mean() -> None:
    physics, proxes = make_physics("inpainting", SHAPE, mask_size=5), [glow_prox(), glow_prox()]
    y = physics(torch.rand(2, *SHAPE))
    with_mean = UnfoldedPGD(proxes, latent_mean=mean_net(n_folds=2)).eval()
    torch.testing.assert_close(with_mean(y, physics), UnfoldedPGD(proxes).eval()(y, physics))


@pytest.mark.parametrize("problem", ["denoising", "inpainting", "deblurring"])
def test_the_mean_depends_on_the_measurement_alone_image_by_image(problem: str) -> None:
    parameters: dict[str, Any] = {"mask_size": 5} if problem == "inpainting" else {}
    physics = make_physics(problem, SHAPE, **parameters)
    model = UnfoldedPGD([glow_prox()], latent_mean=mean_net(), start="adjoint").eval()
    y = physics(torch.rand(3, *SHAPE))
    without = model(y, physics)  # a fresh net predicts 0
    with_means(model.latent_mean)
    both, single = model(y, physics), model(y[1:2], physics)
    torch.testing.assert_close(both[1:2], single, rtol=1e-4, atol=1e-5)
    assert bool(((both - without).abs().amax(dim=(1, 2, 3)) > 1e-4).all())
    changed = y.clone()
    changed[0] += 0.1
    torch.testing.assert_close(model(changed, physics)[1:], both[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every_fold", [False, True])
def test_every_fold_shrinks_towards_its_own_mean(every_fold: bool) -> None:
    physics = make_physics("denoising", SHAPE)
    proxes = [glow_prox(), glow_prox()]
    net = with_means(mean_net(n_folds=2, every_fold=every_fold))
    model = UnfoldedPGD(proxes, latent_mean=net, start="adjoint", shrinkage=0.5).eval()
    y = physics(torch.rand(2, *SHAPE))
    first, second = net.of_measurement(y, physics, None)  # v of the first fold is y
    x = proxes[0](y, model.shrinkages[0], mean=first)
    v = model.data_step(x, y, physics, model.step_sizes[1])
    if every_fold:
        _, second = net.of_measurement(v, physics, None)
    x = proxes[1](v, model.shrinkages[1], mean=second)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(model(y, physics), x, rtol=1e-4, atol=1e-5)


def test_a_mask_per_image_reaches_the_net() -> None:
    problem = VariedProblem("inpainting", SHAPE, ranges={"mask_size": [4, 8]})
    physics = problem.draw(3, torch.Generator().manual_seed(0))
    model = UnfoldedPGD([glow_prox()], latent_mean=mean_net())
    seen = seen_inputs(model)
    model(physics(torch.rand(3, *SHAPE)), physics)
    torch.testing.assert_close(seen[0][:, 3], physics.mask[:, 0])  # type: ignore[index]


def test_gray_images_in_double_precision_with_tied_proxes() -> None:
    shape = (1, 16, 16)
    prox = FlowProx(Glow(image_shape=shape, n_levels=2, n_steps=1, hidden_channels=4))
    net = with_means(mean_net(n_inputs=2, n_channels=1, n_folds=3))
    model = UnfoldedPGD([prox] * 3, latent_mean=net, final_data_step=True).double().eval()
    physics = make_physics("inpainting", shape, mask_size=5, sigma=0.0)
    x = torch.rand(2, *shape, dtype=torch.float64)
    assert model(physics.A(x), physics).dtype == torch.float64


def test_the_net_is_told_what_was_measured_and_the_level() -> None:
    levels = [0.05, 0.2]
    prox = glow_prox(channelwise=True, levels=levels)
    model = UnfoldedPGD([prox], levels=levels, start="adjoint", latent_mean=mean_net(n_inputs=5))
    seen = seen_inputs(model)
    physics = make_physics("inpainting", SHAPE, mask_size=5, sigma=0.1)
    model(physics(torch.rand(2, *SHAPE)), physics)
    ones = torch.ones(1, *SHAPE)
    torch.testing.assert_close(seen[0][:1, 3], physics.A_adjoint(physics.A(ones))[:, 0])
    assert bool((seen[0][:, 4] == 0.1).all())
    louder = make_physics("denoising", SHAPE, sigma=1.0)
    model(louder(torch.rand(2, *SHAPE)), louder)
    assert bool((seen[1][:, 4] == 0.2).all())  # a level beyond the last was never seen


def test_takes_other_sizes_and_names_those_it_cannot() -> None:
    assert mean_net()(torch.rand(1, 4, 12, 20))[0].shape == (1, 3, 12, 20)
    with pytest.raises(ValueError, match="divisible by 4"):
        mean_net()(torch.rand(1, 4, 12, 18))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_channels": []}, "hidden_channels must be whole numbers"),
        ({"hidden_channels": 8}, "hidden_channels must be whole numbers"),
        ({"hidden_channels": [4, 0]}, "hidden_channels must be whole numbers"),
        ({"hidden_channels": [4.5, 8]}, "hidden_channels must be whole numbers"),
        ({"n_blocks": [1]}, "one per entry of hidden_channels, 2"),
        ({"n_blocks": 1.5}, "n_blocks must be whole numbers"),
        ({"n_folds": 0}, "must be whole numbers, at least 1"),
    ],
)
def test_impossible_nets_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_net(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_inputs": 5}, "n_inputs 5 and the proxes need 4"),
        ({"n_folds": 2}, "n_folds 2 and the proxes need 1"),
        ({"n_channels": 1}, "n_channels 1 and the proxes need 3"),
        ({"hidden_channels": [4]}, "n_levels 1 and the proxes need 2, one entry of hidden_channels for each"),
    ],
)
def test_a_net_for_other_proxes_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnfoldedPGD([glow_prox()], latent_mean=mean_net(**options))


@pytest.mark.parametrize("prox", [ResNetProx(hidden_channels=4), UNetProx(hidden_channels=4, n_scales=2)])
def test_a_prox_without_a_latent_has_no_mean(prox: nn.Module) -> None:
    with pytest.raises(ValueError, match="needs a FlowProx in every fold"):
        UnfoldedPGD([glow_prox(), prox], latent_mean=mean_net(n_folds=2))
    with pytest.raises(ValueError, match="no latent"):
        prox(torch.rand(1, *SHAPE), 0.1, mean=torch.rand(1, *SHAPE))


def test_an_exact_prox_shrinks_towards_a_mean_too() -> None:
    v, mean = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    torch.testing.assert_close(SoftThreshold()(v, 0.3, mean=mean), mean + SoftThreshold()(v - mean, 0.3))


def test_a_mean_that_nothing_would_train_is_refused() -> None:
    with pytest.raises(ValueError, match="shrink_last=False"):
        UnfoldedPGD([glow_prox()], latent_mean=mean_net(), shrink_last=False)


def test_frozen_proxes_have_frozen_means() -> None:
    model = UnfoldedPGD([glow_prox()], latent_mean=mean_net())
    model.freeze_proxes()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"log_data_weight", "log_shrinkage"}
