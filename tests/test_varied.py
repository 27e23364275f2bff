"""Operators drawn anew for every batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowprox.operators import VariedProblem, measure

SHAPE = (3, 24, 16)


def drawn(n: int = 400, seed: int = 0, name: str = "inpainting", **ranges: Any):
    return VariedProblem(name, SHAPE, ranges).draw(n, torch.Generator().manual_seed(seed))


def test_noise_has_the_level_of_its_image() -> None:
    physics = drawn(200, name="denoising", sigma=(0.05, 0.3))
    sigma = physics.noise_model.sigma
    assert 0.05 <= sigma.min() < 0.07 and 0.28 < sigma.max() <= 0.3
    y = measure(torch.zeros(200, *SHAPE), physics, torch.Generator().manual_seed(1))
    torch.testing.assert_close(y.flatten(1).std(1), sigma, rtol=0.15, atol=0)


def test_rectangles_have_sides_in_the_range_and_stand_anywhere() -> None:
    hidden = drawn(mask_size=(3, 7)).mask[:, 0] == 0
    for axis in (1, 2):
        side = hidden.any(3 - axis).sum(1)
        assert set(side.tolist()) == {3, 4, 5, 6, 7}
    assert torch.equal(hidden.sum((1, 2)), hidden.any(2).sum(1) * hidden.any(1).sum(1))  # whole rectangles
    assert hidden.any(0).all()
    assert hidden.float().mean(0).flatten().max() < 0.3


def test_pixels_are_kept_at_the_fraction_drawn() -> None:
    kept = drawn(keep=(0.2, 0.6)).mask[:, 0].flatten(1).mean(1)
    assert 0.1 < kept.min() < 0.3 and 0.5 < kept.max() < 0.7


def test_both_kinds_of_mask_occur() -> None:
    hidden = drawn(mask_size=(4, 4), keep=(0.9, 0.9)).mask[:, 0] == 0
    whole = (hidden.any(2).sum(1) * hidden.any(1).sum(1)) == hidden.sum((1, 2))
    assert 0.4 < whole.float().mean() < 0.6


def test_all_channels_share_the_mask_and_the_seed_decides() -> None:
    first, again, other = drawn(mask_size=(3, 7)), drawn(mask_size=(3, 7)), drawn(mask_size=(3, 7), seed=1)
    assert torch.equal(first.mask, first.mask[:, :1].expand_as(first.mask))
    assert torch.equal(first.mask, again.mask) and not torch.equal(first.mask, other.mask)


def test_noise_of_the_parameters_stays_where_only_the_mask_varies() -> None:
    problem = VariedProblem("inpainting", SHAPE, {"keep": (0.5, 0.9)}, sigma=0.1)
    assert float(problem.draw(2, torch.Generator().manual_seed(0)).noise_model.sigma) == pytest.approx(0.1)


BAD = {
    "unknown problem": (("denoise", {"sigma": (0, 1)}, {}), "denois"),
    "what cannot vary": (("deblurring", {"sigma_blur": (1, 2)}, {}), "sigma_blur cannot vary in deblurring"),
    "given twice": (("denoising", {"sigma": (0, 1)}, {"sigma": 0.1}), "in parameters and in ranges"),
    "a mask besides": (("inpainting", {"keep": (0.1, 0.5)}, {"mask": "a.npy"}), "leave the mask out"),
    "ends the wrong way": (("denoising", {"sigma": (1, 0)}, {}), "low <= high"),
    "one number": (("denoising", {"sigma": 0.1}, {}), "two numbers"),
    "a hole larger than the image": (("inpainting", {"mask_size": (4, 16)}, {}), "mask_size must lie between"),
    "no pixel": (("random-inpainting", {"keep": (0.0, 0.5)}, {}), r"keep must lie in \(0, 1\]"),
    "colored noise": (("denoising", {"sigma": (0, 1)}, {"noise": "radial"}), "white noise"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ranges_are_named(case: str) -> None:
    (name, ranges, parameters), message = BAD[case]
    with pytest.raises(ValueError, match=message):
        VariedProblem(name, SHAPE, ranges, **parameters)
