"""What the page of ``flowprox app`` asks for, without the page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flowprox.app import PROBLEMS, SIDES, Request, _read
from flowprox.cli import completed, make_parser


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", SIDES)
def test_the_command_line_is_one(problem: str, method: str) -> None:
    words = Request(problem, method=method).command.split()[1:]
    options = vars(make_parser(words[0]).parse_args(completed(words))[words[0]])
    assert options["problem"] == problem and options["inputs"] == ["picture.png"] and options["simulate"]
    assert any(word.startswith("sigma=") for word in options["parameters"])


def test_what_is_painted_over_is_hidden() -> None:
    layer = np.zeros((40, 60, 4), np.uint8)
    layer[10:20, 30:40, 3] = 255
    drawn = {"background": Image.new("RGB", (60, 40), "white"), "layers": [Image.fromarray(layer)]}
    picture, mask = _read(drawn, longest=30)
    assert picture.shape == (3, 20, 30) and float(picture.min()) == 1.0
    assert mask[5:10, 15:20].sum() == 0 and mask.sum() == 20 * 30 - 25


def test_the_objective_is_seen_while_it_falls() -> None:
    losses: list[float] = []
    restored = Request("inpainting", 0.0, method="latent-map", n_steps=3).run(
        torch.rand(3, 16, 16), np.pad(np.zeros((4, 4)), 6, constant_values=1.0), losses
    )
    assert restored.psnr is not None and restored.x_hat.shape == (3, 16, 16) and restored.reason
    assert len(losses) > 3 and min(losses) < losses[0]
    posterior = Request("denoising", method="posterior", n_steps=4).run(torch.rand(3, 16, 16), None, losses)
    assert posterior.deviation is not None and posterior.deviation.shape == (3, 16, 16)
