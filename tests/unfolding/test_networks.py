"""Unfolded networks: they converge where the algorithm does, overfit one image, and follow their options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flow_cases import NoHostReads
from scipy.stats import kurtosis
from torch import Tensor, nn

from flowprox.checkpoints import Card, load_model, save_model
from flowprox.commands.catalog import sample
from flowprox.data import load_image
from flowprox.flows import Conv1x1, Flow, Glow, Sequential, Squeeze, Unsqueeze, frozen
from flowprox.naming import build
from flowprox.operators import LearnedBlur, Problem, fit_to_divisor, make_physics
from flowprox.prox import FlowProx, ResNetProx, SoftThreshold
from flowprox.unfolding import LatentMeanNet, UnfoldedHQS, UnfoldedPGD

SHAPE = (3, 8, 8)


def glow_prox(**options) -> FlowProx:
    return FlowProx(Glow(image_shape=SHAPE, n_levels=1, n_steps=2, hidden_channels=8), **options)


def rotation_prox() -> FlowProx:
    return FlowProx(Flow(Sequential([Squeeze(), Conv1x1(12), Unsqueeze()]), SHAPE, n_levels=1, offset=0.0))


LEVELS = [0.05, 0.2]


def told_the_level(network: type, start: str = "flow"):
    return network(
        [glow_prox(channelwise=True, levels=LEVELS) for _ in range(2)], start=start, shrinkage=0.5, levels=LEVELS
    )


NETWORKS = {
    "pgd": lambda: UnfoldedPGD([glow_prox() for _ in range(3)]),
    "pgd, tied": lambda: UnfoldedPGD([glow_prox()] * 3),
    "pgd, Laplace base": lambda: UnfoldedPGD([glow_prox(base="laplace") for _ in range(2)], shrinkage=0.01),
    "pgd, no shrinkage in the last fold": lambda: UnfoldedPGD([glow_prox() for _ in range(2)], shrink_last=False),
    "pgd, ResNet": lambda: UnfoldedPGD([ResNetProx(hidden_channels=8) for _ in range(2)], start="adjoint"),
    "pgd, final data step": lambda: UnfoldedPGD([glow_prox() for _ in range(2)], final_data_step=True),
    "hqs": lambda: UnfoldedHQS([glow_prox(channelwise=True) for _ in range(2)]),
    "pgd, told the level": lambda: told_the_level(UnfoldedPGD),
    "hqs, told the level": lambda: told_the_level(UnfoldedHQS),
    "pgd, latent mean": lambda: UnfoldedPGD([glow_prox(), glow_prox()], latent_mean=LatentMeanNet(4, 3, 2, [8])),
    "hqs, latent mean, told the level": lambda: UnfoldedHQS(
        [glow_prox(channelwise=True, levels=LEVELS)], levels=LEVELS, latent_mean=LatentMeanNet(5, 3, 1, [8], n_blocks=2)
    ),
}
PROBLEMS = {
    "denoising": lambda shape=SHAPE: make_physics("denoising", shape, sigma=0.1),
    "inpainting": lambda shape=SHAPE: make_physics("inpainting", shape, mask_size=3),
    "deblurring": lambda shape=SHAPE: make_physics("deblurring", shape, sigma_blur=1.0, kernel_size=5),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter(name: str, problem: str) -> None:
    model, physics = NETWORKS[name](), PROBLEMS[problem]()
    x = torch.rand(2, *SHAPE)
    for module in model.modules():
        if hasattr(module, "last") and isinstance(module.last, nn.Conv2d):
            nn.init.normal_(module.last.weight, std=0.1)
        if isinstance(module, LatentMeanNet):
            for convolution in module.means:
                nn.init.normal_(convolution.weight, std=0.1)  # type: ignore[arg-type]
    x_hat = model(physics(x), physics)
    assert x_hat.shape == x.shape
    (x_hat - x).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_is_rebuilt_from_its_spec(name: str) -> None:
    model, physics = NETWORKS[name]().eval(), PROBLEMS["denoising"]()
    copy = build(model.spec())
    copy.load_state_dict(model.state_dict())
    y = physics(torch.rand(2, *SHAPE))
    assert torch.equal(copy.eval()(y, physics), model(y, physics))
    assert sum(p.numel() for p in copy.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("network", [UnfoldedPGD, UnfoldedHQS])
def test_overfits_one_image(network: type) -> None:
    physics = make_physics("denoising", SHAPE, sigma=0.1)
    x = torch.rand(1, *SHAPE)
    y = physics(x)
    model = network([FlowProx(Glow(image_shape=SHAPE, n_levels=1, n_steps=1, hidden_channels=8)) for _ in range(2)])
    optimizer = torch.optim.Adam(model.parameter_groups(1e-2, 2e-2))
    losses = []
    for _ in range(100):
        loss = (model(y, physics) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_many_tied_folds_reach_the_closed_form_of_a_gaussian_prior() -> None:
    """argmin 1/2 ||y - x||^2 + lambda/(2 mu) ||x||^2 = y / (1 + lambda / mu) for a flow that is a rotation."""
    step_size, shrinkage = 0.4, 0.1
    model = UnfoldedPGD([rotation_prox()] * 60, step_size, shrinkage).double()
    physics = make_physics("denoising", SHAPE, sigma=0.1)
    y = torch.rand(2, *SHAPE, dtype=torch.float64)
    # v = x + mu (y - x), x = v / (1 + lambda): fixed point x = mu y / (mu + lambda)
    torch.testing.assert_close(model(y, physics), y * step_size / (step_size + shrinkage), rtol=0, atol=1e-5)


def test_hqs_with_a_small_penalty_is_the_inverse_of_the_operator() -> None:
    physics = make_physics("deblurring", SHAPE, sigma_blur=0.7, kernel_size=3, sigma=0.0)
    x = torch.rand(2, *SHAPE, dtype=torch.float64)
    model = UnfoldedHQS([rotation_prox()], penalty=1e-10, shrinkage=1e-12).double()
    torch.testing.assert_close(model(physics.A(x), physics), x, rtol=0, atol=1e-4)


def test_an_operator_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="operator must be a linear physics or None, got int"):
        UnfoldedPGD([ResNetProx(hidden_channels=4)], start="adjoint", operator=3)  # type: ignore[arg-type]


def test_starts_at_filtered_backprojection_where_there_is_one() -> None:
    physics = make_physics("ct", (1, 8, 8), n_angles=6)
    y = physics(torch.rand(2, 1, 8, 8))
    model = UnfoldedPGD([ResNetProx(n_channels=1, hidden_channels=4)], start="fbp").eval()
    torch.testing.assert_close(model.iterates(y, physics)[0], physics.fbp(y))
    with pytest.raises(ValueError, match="needs a tomography"):
        model(torch.rand(1, 1, 8, 8), make_physics("denoising", (1, 8, 8)))


def test_starts_at_the_most_likely_image_or_at_the_adjoint() -> None:
    physics = make_physics("inpainting", SHAPE, mask_size=3)
    prox = glow_prox()
    y = physics(torch.rand(2, *SHAPE))
    mode = prox.flow.decode(torch.zeros(1, 192))
    torch.testing.assert_close(UnfoldedPGD([prox]).iterates(y, physics)[0], mode.expand(2, -1, -1, -1))
    torch.testing.assert_close(UnfoldedPGD([prox], start="adjoint").iterates(y, physics)[0], physics.A_adjoint(y))


@pytest.mark.parametrize("name", NETWORKS)
def test_an_empty_batch_gives_one(name: str) -> None:
    model, physics = NETWORKS[name](), PROBLEMS["denoising"]()
    images = model.iterates(torch.zeros(0, *SHAPE), physics)
    assert [image.shape for image in images] == (len(model.proxes) + 1) * [(0, *SHAPE)]


@pytest.mark.parametrize("size", [(12, 20), (9, 8), (7, 13)])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_takes_any_size(problem: str, size: tuple[int, int]) -> None:
    """What its divisor does not divide is extended and cropped, by the same rule as elsewhere."""
    model, shape = UnfoldedHQS([glow_prox() for _ in range(2)], shrinkage=0.5), (3, *size)
    physics = PROBLEMS[problem](shape)
    y = physics(torch.rand(2, *shape))
    fitted = fit_to_divisor(y, physics, 2)
    expected = model(fitted.y, fitted.physics)[..., fitted.rows, fitted.columns]
    assert [image.shape for image in model.iterates(y, physics)] == 3 * [y.shape]
    torch.testing.assert_close(model(y, physics), expected)


def test_a_measurement_that_cannot_be_extended_names_the_remedy() -> None:
    physics = make_physics("mri", (1, 9, 8))
    prox = FlowProx(Glow(image_shape=(1, 8, 8), n_levels=1, n_steps=1, hidden_channels=4))
    with pytest.raises(ValueError, match="use sizes divisible by 2"):
        UnfoldedPGD([prox], start="adjoint")(physics.A(torch.rand(1, 1, 9, 8)), physics)
    masks = [make_physics("inpainting", (3, 9, 8), mask_size=n) for n in (2, 4)]
    with pytest.raises(ValueError, match="divisible by 2: pad or crop"):
        UnfoldedPGD([glow_prox()] * 2)(torch.rand(1, 3, 9, 8), masks)


def test_every_data_step_may_have_an_operator_of_its_own() -> None:
    """Wei et al. 2022, Table III: A changed in the last fold, here in the final data step alone."""
    trained, changed = (make_physics("inpainting", SHAPE, mask_size=n, sigma=0.0) for n in (2, 4))
    model = UnfoldedPGD([glow_prox() for _ in range(2)], step_size=1.0, shrinkage=0.5, final_data_step=True)
    y = changed.A(torch.rand(2, *SHAPE))
    assert torch.equal(model(y, [changed] * 3), model(y, changed))
    images = model.iterates(y, [trained, trained, changed])
    torch.testing.assert_close(images[:2], model.iterates(y, trained)[:2])
    seen = (changed.A(torch.ones_like(y)) == 1).expand_as(y)
    torch.testing.assert_close(images[2][seen], y[seen])
    assert not torch.allclose(model(y, changed), images[2])
    with pytest.raises(ValueError, match="2 operators for 3 data steps"):
        model(y, [trained, changed])


def test_folds_are_drawn_from_and_their_latents_looked_at() -> None:
    model, physics = UnfoldedPGD([glow_prox(), glow_prox(base="laplace")]), PROBLEMS["denoising"]()
    y = physics(torch.rand(2, *SHAPE))
    images, latents = model.iterates(y, physics), model.latents(y, physics)
    v = [model.data_step(x, y, physics, weight) for x, weight in zip(images[:2], model.step_sizes, strict=True)]
    for z, point, prox in zip(latents, v, model.proxes, strict=True):
        torch.testing.assert_close(z, prox.flow.encode_image(point), rtol=0, atol=1e-4)
    samples = model.sample(400, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (800, *SHAPE)
    drawn = [prox.flow.encode_image(x) for prox, x in zip(model.proxes, samples.chunk(2), strict=True)]
    gaussian, laplace = ((z.mean().item(), z.std().item(), kurtosis(z.detach().flatten())) for z in drawn)
    assert gaussian == pytest.approx((0, 1, 0), abs=0.05)
    assert laplace == pytest.approx((0, 2**0.5, 3), abs=0.3)
    told_the_level(UnfoldedPGD).sample(1)
    with pytest.raises(ValueError, match="depend on a measurement"):
        NETWORKS["pgd, latent mean"]().sample(1)


def test_the_command_draws_a_row_for_every_fold(tmp_path: Path) -> None:
    save_model(UnfoldedPGD([glow_prox() for _ in range(3)]), tmp_path / "model")
    sample(str(tmp_path / "model"), str(tmp_path / "samples.png"), n=4)
    assert load_image(tmp_path / "samples.png").shape == (3, 3 * 10 + 2, 4 * 10 + 2)


def test_a_loaded_model_is_shown_by_its_card() -> None:
    model = load_model("unfolded-denoising-natural")
    assert repr(model) == (
        "UnfoldedPGD: unfolded-denoising-natural; denoising, sigma 0 to 0.22; channels 3; divisor 8; parameters 2,668,802; "
        "psnr 32.53"
    )
    assert "<th>license</th>" in str(model._repr_html_())
    assert "FlowProx" in repr(UnfoldedPGD([glow_prox()]))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_fold_reads_a_value_on_the_host(name: str, problem: str) -> None:
    model, physics = NETWORKS[name](), PROBLEMS[problem]()
    x = torch.rand(2, *SHAPE)
    y = physics(x)
    for flow in model.flows():
        flow.initialize(x)
    with NoHostReads():
        (model(y, physics) - x).square().mean().backward()
    with torch.no_grad(), frozen(model.eval()):
        model(y, physics)
        with NoHostReads():
            model(y, physics)


def carded(**problem) -> UnfoldedPGD:
    model = UnfoldedPGD([glow_prox()])
    model.card = Card("net", problem={"name": "inpainting", "parameters": {}, "ranges": {}, **problem})
    return model


RANGES = {"sigma": [0.0, 0.1], "mask_size": [8, 24], "keep": [0.1, 0.9]}
USES: dict[str, tuple[dict, str, dict, str | None]] = {
    "as trained": ({}, "inpainting", {}, None),
    "less noise": ({"parameters": {"sigma": 0.1}}, "inpainting", {"sigma": 0.05}, None),
    "more noise": (
        {"parameters": {"sigma": 0.1}},
        "inpainting",
        {"sigma": 0.2},
        "sigma 0.0 to 0.1 and is used with 0.2",
    ),
    "another mask": (
        {"parameters": {"mask_size": 8}},
        "inpainting",
        {"mask_size": 12},
        "mask_size 8 and is used with 12",
    ),
    "within the range": ({"ranges": RANGES}, "inpainting", {"mask_size": (8, 12)}, None),
    "a mask drawn by hand": ({"ranges": RANGES}, "inpainting", {"mask": torch.ones(8, 8)}, None),
    "beyond the range": ({"ranges": RANGES}, "inpainting", {"mask_size": (8, 40)}, "mask_size 8 to 24"),
    "random masks": ({"ranges": RANGES}, "random-inpainting", {"keep": 0.5}, None),
    "too few pixels": ({"ranges": RANGES}, "random-inpainting", {"keep": 0.05}, "keep 0.1 to 0.9"),
    "another problem": ({}, "denoising", {}, "net was trained for inpainting and is used for denoising"),
    "a kernel": (
        {"name": "deblurring"},
        "deblurring",
        {"kernel": torch.ones(3, 3)},
        "not trained with this kernel",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_a_use_it_was_not_trained_for_is_noticed(name: str) -> None:
    trained, problem, parameters, message = USES[name]
    remarks = carded(**trained).check(Problem(problem, parameters))
    assert len(remarks) == (message is not None) and (message or "") in "".join(remarks)
    assert UnfoldedPGD([glow_prox()]).check(Problem(problem, parameters)) == []  # without a card nothing is known


def test_without_the_last_shrinkage_the_last_flow_does_nothing() -> None:
    model = UnfoldedPGD([glow_prox() for _ in range(2)], shrink_last=False).double()
    physics = make_physics("denoising", SHAPE)
    y = torch.rand(1, *SHAPE, dtype=torch.float64)
    images = model.iterates(y, physics)
    v = model.data_step(images[1], y, physics, model.step_sizes[1])
    torch.testing.assert_close(images[2], v, rtol=0, atol=1e-9)


def test_a_final_data_step_returns_the_measured_pixels() -> None:
    physics = make_physics("inpainting", SHAPE, mask_size=3)
    x = torch.rand(2, *SHAPE)
    model = UnfoldedPGD([glow_prox()], step_size=1.0, shrinkage=0.5, final_data_step=True)
    y = physics(x)
    known = physics.A(torch.ones_like(x)) == 1
    torch.testing.assert_close(model(y, physics)[known], x[known], rtol=0, atol=1e-6)
    assert model.step_sizes.shape == (2,)


def test_tied_folds_share_weights_but_not_scalars() -> None:
    tied, untied = UnfoldedPGD([glow_prox()] * 3), UnfoldedPGD([glow_prox() for _ in range(3)])
    count = sum(p.numel() for p in tied.proxes.parameters())
    assert sum(p.numel() for p in untied.proxes.parameters()) == 3 * count
    assert tied.step_sizes.shape == tied.shrinkages.shape == (3,)
    assert len(tied.flows()) == 1 and len(untied.flows()) == 3


def test_parameter_groups_cover_everything_once_with_two_rates() -> None:
    model = UnfoldedPGD([glow_prox(channelwise=True) for _ in range(2)])
    networks, start, scalars = model.parameter_groups(1e-5, 1e-2)
    assert (networks["lr"], start["lr"], scalars["lr"]) == (1e-5, 1e-5, 1e-2)
    assert start["params"] == [model.start_image]
    ids = [id(p) for group in (networks, start, scalars) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert {id(model.log_data_weight), id(model.log_shrinkage)} <= {id(p) for p in scalars["params"]}


def test_plug_and_play_trains_the_scalars_only() -> None:
    model = UnfoldedPGD([glow_prox()] * 3)
    model.freeze_proxes()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["log_data_weight", "log_shrinkage"]


def test_a_learned_operator_is_trained_along_and_found() -> None:
    """With nothing else to learn, the kernel of the network's own blur moves towards the true one."""
    truth = make_physics("deblurring", SHAPE, sigma_blur=0.8, kernel_size=5, sigma=0.0)
    operator = LearnedBlur(kernel_size=5, sigma_blur=2.0)
    model = UnfoldedHQS([rotation_prox()], penalty=0.01, shrinkage=1e-4, operator=operator)
    true_kernel = make_kernel(truth)

    def distance() -> float:
        return (operator.kernel().flatten() - true_kernel).norm().item()

    before = distance()
    optimizer = torch.optim.Adam(operator.parameters(), 0.05)
    for _ in range(100):
        x = torch.rand(8, *SHAPE)
        loss = (model(truth.A(x), truth) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < 0.3 * before


def test_each_image_is_reconstructed_at_its_own_level() -> None:
    model = told_the_level(UnfoldedPGD, start="adjoint").eval()
    for prox in model.proxes:
        nn.init.normal_(prox.log_weight)
    x = torch.rand(1, *SHAPE).expand(3, *SHAPE)
    physics = make_physics("denoising", SHAPE)
    alone = []
    for sigma in (0.03, 0.1, 0.3):
        physics.noise_model.update_parameters(sigma=torch.tensor(sigma))
        alone.append(model(x[:1], physics))
    physics.noise_model.update_parameters(sigma=torch.tensor([0.03, 0.1, 0.3]))
    torch.testing.assert_close(model(x, physics), torch.cat(alone))
    distances = [(x_hat - x[:1]).norm() for x_hat in alone]
    assert distances[0] < distances[1] < distances[2]  # the more noise, the more is shrunk


def test_noise_without_a_level_cannot_be_told() -> None:
    physics = make_physics("denoising", SHAPE, noise="radial", sigma=None)
    with pytest.raises(ValueError, match="HeteroscedasticNoise, has no level"):
        told_the_level(UnfoldedPGD)(torch.rand(1, *SHAPE), physics)


def make_kernel(physics) -> Tensor:
    """The 5x5 impulse response of a blur."""
    impulse = torch.zeros(1, *SHAPE)
    impulse[..., 4, 4] = 1
    return physics.A(impulse)[0, 0, 2:7, 2:7].flip(0, 1).flatten()


BAD = {
    "no proxes": (lambda: UnfoldedPGD([]), "proxes is empty"),
    "negative step": (lambda: UnfoldedPGD([glow_prox()], step_size=-1.0), "step_size must be positive"),
    "zero shrinkage": (lambda: UnfoldedPGD([glow_prox()], shrinkage=0.0), "shrinkage must be positive"),
    "too few steps": (lambda: UnfoldedPGD([glow_prox()] * 2, step_size=[0.5]), "one per fold"),
    "unknown start": (lambda: UnfoldedPGD([glow_prox()], start="zero"), "start must be"),
    "levels that fall": (lambda: UnfoldedPGD([glow_prox()], levels=[0.2, 0.1]), "levels must be"),
    "weights by level for all channels alike": (lambda: glow_prox(levels=LEVELS), "set channelwise"),
    "no flow to start from": (lambda: UnfoldedPGD([SoftThreshold()]), "start='adjoint'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


BAD_MEASUREMENTS = {
    "no batch": (lambda: torch.rand(SHAPE), "takes batches"),
    "gray": (lambda: torch.rand(1, 1, 8, 8), "takes batches"),
    "integers": (lambda: torch.zeros(1, *SHAPE, dtype=torch.uint8), "float32 like the model"),
    "double": (lambda: torch.rand(1, *SHAPE, dtype=torch.float64), "float32 like the model"),
    "half": (lambda: torch.rand(1, *SHAPE).half(), "float32 like the model"),
    "an array": (lambda: torch.rand(1, *SHAPE).numpy(), "got ndarray"),
}


@pytest.mark.parametrize("name", BAD_MEASUREMENTS)
def test_a_measurement_that_does_not_fit_is_named(name: str) -> None:
    make, message = BAD_MEASUREMENTS[name]
    with pytest.raises(ValueError, match=message):
        UnfoldedPGD([glow_prox()], start="adjoint")(make(), make_physics("denoising", SHAPE))


def test_a_network_in_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model.float\(\)"):
        UnfoldedPGD([glow_prox()]).half()(torch.rand(1, *SHAPE).half(), make_physics("denoising", SHAPE))
