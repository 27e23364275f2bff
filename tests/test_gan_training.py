"""The GAN's one backward pass gives both networks their own gradients; a run writes the generator and can be resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from flowprox import load_model
from flowprox.data import save_image
from flowprox.networks import DCGANDiscriminator, DCGANGenerator
from flowprox.options import DataOptions, GANOptions, TrainingOptions
from flowprox.training import train_gan
from flowprox.training.tasks import gan_task

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
SMALL = GANOptions(latent_size=6, hidden_channels=4, discriminator_channels=4, n_scales=2, projection_steps=3)


@pytest.fixture
def data(tmp_path: Path) -> DataOptions:
    generator = torch.Generator().manual_seed(0)
    for folder, n in (("train", 12), ("val", 4)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            save_image(torch.rand(3, 16, 16, generator=generator), tmp_path / folder / f"{i}.png")
    return DataOptions(str(tmp_path / "train" / "*.png"), str(tmp_path / "val" / "*.png"), image_size=16)


def training(steps: int, **options: object) -> TrainingOptions:
    common: dict = {
        "batch_size": 4,
        "accelerator": "cpu",
        "progress": False,
        "ema_decay": 0.9,
        "n_validation_images": 4,
    }
    return TrainingOptions(max_steps=steps, schedule="constant", num_threads=1, **{**common, **options})


def test_each_network_gets_the_gradient_of_its_own_loss() -> None:
    task = gan_task(SMALL, DataOptions("unused", image_size=16)).double().eval()
    generator, discriminator = task.model.generator, task.model.discriminator
    assert isinstance(generator, DCGANGenerator) and isinstance(discriminator, DCGANDiscriminator)
    for parameter in discriminator.parameters():  # logits far from 0, where the two losses' gradients differ most
        parameter.data.mul_(3)
    x, z = torch.rand(5, 3, 16, 16, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    weights = [list(network.parameters()) for network in (generator, discriminator)]
    together = torch.autograd.grad(task(x, z), [*weights[0], *weights[1]])
    generated = generator(z)
    of_generator = torch.autograd.grad(F.softplus(-discriminator(generated)).mean(), weights[0])
    loss = F.softplus(-discriminator(x)).mean() + F.softplus(discriminator(generated.detach())).mean()
    of_discriminator = torch.autograd.grad(loss, weights[1])
    for ours, expected in zip(together, [*of_generator, *of_discriminator], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-6)


def test_no_image_changes_anothers_logit() -> None:
    discriminator = DCGANDiscriminator((3, 16, 16), 4, 2).eval()
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(discriminator(x)[2:], discriminator(x[2:]))
    assert discriminator(x).shape == (4,)


def test_a_run_writes_the_generator(data: DataOptions, tmp_path: Path) -> None:
    result = train_gan(SMALL, data, training(3), str(tmp_path / "run"), name="tiny")
    assert result.steps == 3 and np.isfinite(result.metrics["projection_psnr"])
    generator = load_model(tmp_path / "run")
    assert isinstance(generator, DCGANGenerator) and generator.card.name == "tiny"
    x = generator.sample(2, torch.Generator().manual_seed(0)).detach()
    assert x.shape == (2, 3, 16, 16) and float(x.min()) >= 0 and float(x.max()) <= 1
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["gan"]["latent_size"] == 6
    assert (tmp_path / "run" / "samples.png").is_file()


def test_a_resumed_run_is_the_same_run(data: DataOptions, tmp_path: Path) -> None:
    train_gan(SMALL, data, training(4), str(tmp_path / "whole"))
    train_gan(SMALL, data, training(2), str(tmp_path / "halves"))
    train_gan(SMALL, data, training(4), str(tmp_path / "halves"), resume=True)
    whole, halves = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "halves"))
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_size": 0}, "latent_size must be at least 1"),
        ({"betas": [0.5]}, "betas must be two numbers"),
        ({"betas": [0.5, 1.0]}, "betas must be two numbers"),
        ({"projection_steps": 0}, "projection_steps"),
    ],
)
def test_wrong_options_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GANOptions(**options)


def test_an_image_size_that_cannot_be_halved_raises() -> None:
    with pytest.raises(ValueError, match="divisible by 16"):
        gan_task(GANOptions(), DataOptions("unused", image_size=40))
