"""One call restores a picture of any kind and size, and gives back the kind that it was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import flowprox
from flowprox.restoration import restore
from flowprox.samples import sample_images

SHAPE = (3, 10, 13)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A network of random weights: what it returns does not matter here."""
    with torch.random.fork_rng():
        flow = flowprox.Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4)
        flow.initialize(torch.rand(8, 3, 8, 8))
        return flowprox.UnfoldedPGD([flowprox.FlowProx(flow)]).eval()


def _pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SHAPE[1:], 3), dtype=np.uint8)


def test_a_large_picture_is_restored_in_tiles_of_a_size_that_can_be_set(network: nn.Module) -> None:
    calls: list[tuple[int, ...]] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape[-2:])))
    y = torch.rand(3, 150, 400)
    try:
        restore(y, model=network, sigma=0.1, tile=200)
        restore(y, model=network, sigma=0.1)
    finally:
        hook.remove()
    assert len(calls) == 4 and all(width <= 200 for _, width in calls[:3]) and calls[3][1] == 400


KINDS: dict[str, Callable[[], Any]] = {
    "array (H, W, 3) of bytes": _pixels,
    "array (H, W) of bytes": lambda: _pixels()[..., 0],
    "array (H, W, 1) of bytes": lambda: _pixels()[..., :1],
    "array of 16 bits": lambda: _pixels().astype(np.uint16) * 257,
    "array of doubles, other way round": lambda: (_pixels() / 255)[::-1],
    "array of big-endian floats": lambda: (_pixels() / 255).astype(">f4"),
    "tensor (C, H, W)": lambda: torch.rand(SHAPE),
    "tensor (1, C, H, W) of doubles": lambda: torch.rand(1, *SHAPE, dtype=torch.float64),
    "tensor (H, W) of bytes": lambda: torch.from_numpy(_pixels()[..., 0].copy()),
    "color picture": lambda: Image.fromarray(_pixels()),
    "gray picture": lambda: Image.fromarray(_pixels()[..., 0]),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_same_kind_comes_out(name: str, network: nn.Module) -> None:
    image = KINDS[name]()
    restored = restore(image, model=network, sigma=0.1)
    assert type(restored.image) is type(image)
    for key in ("dtype", "shape", "size", "mode"):
        if not callable(getattr(image, key, None)):
            assert getattr(restored.image, key, None) == getattr(image, key, None), key
    assert restored.psnr is None and restored.problem == "denoising-sigma0.1"
    assert restored._repr_png_().startswith(b"\x89PNG")


def test_a_path_gives_a_picture(network: nn.Module, tmp_path: Path) -> None:
    Image.fromarray(_pixels()).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert restore(path, model=network, sigma=0.1).image.size == SHAPE[:0:-1]


def test_what_a_mask_keeps_stays_without_noise(network: nn.Module) -> None:
    x, mask = torch.rand(SHAPE), np.ones(SHAPE[1:], dtype=np.uint8) * 255
    mask[3:6, 4:9] = 0
    restored = restore(x, model=network, mask=mask, truth=x)
    kept = torch.from_numpy(mask) > 0
    assert torch.equal(restored.x_hat[:, kept], x[:, kept]) and not torch.equal(restored.x_hat, x)
    assert restored.psnr is not None and restored.problem == "inpainting-mask-given"
    assert restored.compare().size == (3 * SHAPE[2] + 8, SHAPE[1])


def test_a_picture_is_a_kernel(network: nn.Module, tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 3), 80, dtype=np.uint8)).save(tmp_path / "kernel.png")
    x = torch.rand(SHAPE)
    Image.fromarray(np.full((3, 3), 20000, dtype=np.uint16)).save(tmp_path / "deep.png")
    one = restore(x, model=network, kernel=tmp_path / "kernel.png").x_hat
    torch.testing.assert_close(one, restore(x, model=network, kernel=tmp_path / "deep.png").x_hat)
    assert torch.equal(one, restore(x, model=network, kernel=Image.open(tmp_path / "kernel.png")).x_hat)
    other = restore(x, model=network, kernel=torch.ones(3, 3) / 9).x_hat
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bytes", "whole numbers", "bits", "picture", "file"])
def test_a_mask_is_what_is_bright(network: nn.Module, tmp_path: Path, kind: str) -> None:
    x, seen = torch.rand(SHAPE), np.ones(SHAPE[1:], dtype=np.uint8)
    seen[3:6, 4:9] = 0
    np.save(tmp_path / "mask.npy", seen)
    masks = {"whole numbers": seen.astype(int), "bits": seen > 0, "picture": Image.fromarray(255 * seen)}
    mask = {**masks, "bytes": seen, "file": tmp_path / "mask.npy"}[kind]
    expected = restore(x, model=network, mask=torch.from_numpy(seen).float())
    assert torch.equal(restore(x, model=network, mask=mask).x_hat, expected.x_hat)


def test_a_mask_is_not_made_up(network: nn.Module) -> None:
    for problem in ("inpainting", "random-inpainting"):
        with pytest.raises(ValueError, match=f"{problem} needs mask"):
            restore(torch.rand(SHAPE), problem, model=network)


def test_of_a_gray_picture_a_network_of_color_is_told_more_noise() -> None:
    x = dict(sample_images())["coffee"][:, :33, :47].mean(0, keepdim=True)
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    restored = restore(y, sigma=0.1, truth=x)
    assert restored.psnr is not None and restored.psnr > 26 and restored.x_hat.shape == x.shape


def test_what_a_network_was_not_trained_for_is_said() -> None:
    with pytest.warns(UserWarning, match="was trained with sigma"):
        restore(torch.rand(3, 16, 16), sigma=0.9)


def test_of_a_blurred_picture_nothing_is_known_beyond_its_border(network: nn.Module) -> None:
    x, kernel = torch.rand(3, 16, 16), torch.rand(5, 3)
    kernel = kernel / kernel.sum()
    one = restore(x, model=network, kernel=kernel).x_hat
    assert one.shape == x.shape  # what the blur took in from beyond is cut off
    assert torch.equal(one, restore(x, model=network, kernel=kernel, boundary="valid").x_hat)
    assert not torch.allclose(one, restore(x, model=network, kernel=kernel, boundary="circular").x_hat)


def test_a_flow_is_a_prior(network: Any) -> None:
    flow = network.flows()[0]
    assert restore(torch.rand(3, 8, 8), model=flow, sigma=0.1).image.shape == (3, 8, 8)


def test_the_shipped_denoiser_denoises() -> None:
    from flowprox.samples import sample_images

    x = dict(sample_images())["chelsea"][:, :48, :61]
    y = x + 0.1 * torch.randn(x.shape)
    restored = flowprox.restore(y, sigma=0.1, truth=x)
    assert restored.psnr > 26


IMAGE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no level": ({"image": IMAGE}, "needs sigma"),
    "8-bit floats": ({"image": IMAGE * 255, "sigma": 0.1}, "divide by 255"),
    "channels last": ({"image": IMAGE.permute(1, 2, 0), "sigma": 0.1}, "channels come first"),
    "batch": ({"image": torch.rand(2, *SHAPE), "sigma": 0.1}, "one picture"),
    "NaN": ({"image": IMAGE * torch.nan, "sigma": 0.1}, "NaN"),
    "a number": ({"image": 3, "sigma": 0.1}, "got int"),
    "no pictures": ({"image": IMAGE, "problem": "ct"}, "measures no pictures"),
    "unknown problem": ({"image": IMAGE, "problem": "denoise"}, "did you mean denoising"),
    "mask of another size": ({"image": IMAGE, "mask": torch.ones(4, 4)}, "mask has shape"),
    "mask of no use": ({"image": IMAGE, "problem": "denoising", "mask": torch.ones(10, 13)}, "no use for mask"),
    "truth of another size": ({"image": IMAGE, "sigma": 0.1, "truth": IMAGE[:, :9]}, "truth has shape"),
    "no such device": ({"image": IMAGE, "sigma": 0.1, "device": "abacus"}, "device"),
    "misspelt parameter": ({"image": IMAGE, "sigm": 0.1}, "did you mean sigma"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str, network: nn.Module) -> None:
    words, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        restore(**words, model=network)


def test_a_missing_file_is_named(network: nn.Module) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        restore("no.png", model=network, sigma=0.1)


def test_the_name_is_the_function() -> None:
    assert flowprox.restore is restore
