import sys

import pytest
import torch

from flowprox.baselines import BM3D, Biharmonic, TotalVariation, Wiener, transfer_function
from flowprox.evaluation.metrics import psnr
from flowprox.operators import make_physics, measure_each

SHAPE = (3, 16, 16)
# name: (method, problem, parameters of the problem, dB it must gain over the measurement on a smooth image)
CASES = {
    "bm3d": (BM3D, "denoising", {}, 4.0),
    "bm3d-profile-vn": (lambda: BM3D(profile="vn"), "denoising", {}, 4.0),
    "biharmonic": (Biharmonic, "inpainting", {"mask_size": 5}, 15.0),
    "biharmonic-random": (Biharmonic, "random-inpainting", {}, 15.0),
    "wiener-identity": (lambda: Wiener(0.03, "identity"), "deblurring", {"kernel_size": 5}, 1.5),
    "wiener-gradient": (lambda: Wiener(0.01), "deblurring", {"kernel_size": 5}, 1.5),
    "wiener-laplacian": (lambda: Wiener(3e-3, "laplacian"), "deblurring", {"kernel_size": 5}, 1.5),
    "tv-deblurring": (TotalVariation, "deblurring", {"kernel_size": 5}, 2.0),
    "tv-not-circular": (TotalVariation, "deblurring", {"kernel_size": 5, "boundary": "reflect"}, 2.0),
    "tv-denoising": (lambda: TotalVariation(0.2, 200), "denoising", {}, 4.0),
    "tv-inpainting": (lambda: TotalVariation(0.01, 300), "inpainting", {"mask_size": 5}, 4.0),
    "tv-separate-channels": (lambda: TotalVariation(0.1, 200, couple_channels=False), "denoising", {}, 3.0),
}


def smooth_images(n=2):
    """Two half planes with a slope, in different colours."""
    across = torch.linspace(0, 1, SHAPE[2]).expand(SHAPE[1:])
    edge = (torch.arange(SHAPE[1])[:, None] > torch.arange(SHAPE[2])[None, :] + 2).float()
    x = torch.stack([0.2 + 0.3 * across + 0.4 * edge, 0.6 - 0.3 * across, 0.3 + 0.2 * edge])
    return torch.stack([x, x.flip(-1)])[:n].contiguous()


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    """Shape, dtype, better than the measurement, deterministic, and one image's result does not depend on its batch."""
    method, problem, parameters, gain = CASES[name]
    method, physics = method(), make_physics(problem, SHAPE, **parameters)
    x = smooth_images()
    y = measure_each(x, physics, [0, 1])
    before = y.clone()
    x_hat = method(y, physics)
    assert x_hat.shape == x.shape and x_hat.dtype == x.dtype and torch.isfinite(x_hat).all()
    assert torch.equal(y, before)
    assert (psnr(x_hat, x) > psnr(y, x) + gain).all(), (psnr(x_hat, x), psnr(y, x))
    assert torch.equal(method(y, physics), x_hat)
    torch.testing.assert_close(method(y[1:], physics), x_hat[1:], atol=1e-5, rtol=0)


def test_bm3d_uses_each_images_own_sigma():
    physics = make_physics("denoising", SHAPE)
    y = measure_each(smooth_images(), physics, [0, 1])
    expected = torch.cat([BM3D(sigma)(y[i : i + 1], physics) for i, sigma in enumerate([0.1, 0.3])])
    physics.noise_model.update_parameters(sigma=torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(BM3D()(y, physics), expected, atol=1e-5, rtol=0)


def test_bm3d_grey_and_noise_free():
    physics = make_physics("denoising", (1, 16, 16), sigma=0.1)
    x = smooth_images()[:, :1]
    y = measure_each(x, physics, [0, 1])
    assert (psnr(BM3D()(y, physics), x) > psnr(y, x)).all()
    assert torch.equal(BM3D(sigma=0.0)(y, physics), y)


def test_biharmonic_keeps_known_pixels():
    physics = make_physics("inpainting", SHAPE, mask_size=4)
    y = measure_each(smooth_images(), physics, [0, 1])
    x_hat = Biharmonic()(y, physics)
    known = physics.mask.expand_as(y) > 0
    assert torch.equal(x_hat[known], y[known])


def test_wiener_is_the_minimiser():
    """The closed form solves the normal equations (A^T A + r D^T D) x = A^T y."""
    physics = make_physics("deblurring", SHAPE, kernel_size=5)
    y = torch.rand(1, *SHAPE, dtype=torch.float64)
    x_hat = Wiener(0.01, "gradient")(y, physics)
    laplacian = sum(2 * x_hat - x_hat.roll(1, d) - x_hat.roll(-1, d) for d in (-1, -2))
    left = physics.A_adjoint(physics.A(x_hat)) + 0.01 * laplacian
    torch.testing.assert_close(left, physics.A_adjoint(y), atol=1e-6, rtol=0)


def test_transfer_function_predicts_the_blur():
    physics = make_physics("deblurring", SHAPE, kernel_size=5)
    x = torch.rand(1, *SHAPE)
    predicted = torch.fft.irfft2(transfer_function(physics, x) * torch.fft.rfft2(x), s=SHAPE[1:])
    torch.testing.assert_close(predicted, physics.A(x), atol=1e-5, rtol=0)


def test_tv_reaches_the_minimum_and_starts_near_it():
    """Perturbing the result in any of many directions does not lower the objective; no weight means least squares."""
    physics = make_physics("denoising", SHAPE)
    y = (smooth_images(1) + 0.1 * torch.randn(1, *SHAPE)).clamp(0, 1).double()
    tv = TotalVariation(0.1, 3000)
    x_hat = tv(y, physics)
    lowest = tv.objective(x_hat, y, physics)
    for step in (0.1, 0.01, 0.001):
        others = (x_hat + step * torch.randn(50, *SHAPE, dtype=torch.float64)).clamp(0, 1)
        assert (tv.objective(others, y, physics) > lowest - 1e-5).all()
    torch.testing.assert_close(TotalVariation(0.0, 50)(y, physics), y, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "problem", "message"),
    [
        (BM3D, "deblurring", "only removes noise"),
        (Biharmonic, "denoising", "mask"),
        (Wiener, "inpainting", "circular"),
        (Wiener, "reflect", "circular"),
    ],
)
def test_the_wrong_operator_raises(make, problem, message):
    parameters = {"mask_size": 4} if problem == "inpainting" else {}
    if problem == "reflect":
        problem, parameters = "deblurring", {"boundary": "reflect", "kernel_size": 5}
    physics = make_physics(problem, SHAPE, **parameters)
    with pytest.raises(ValueError, match=message):
        make()(torch.rand(1, *SHAPE), physics)


@pytest.mark.parametrize("make", [BM3D, Biharmonic, Wiener, TotalVariation])
@pytest.mark.parametrize(("value", "message"), [("rank", "B, C, H, W"), ("nan", "NaN"), ("integer", "floating-point")])
def test_a_bad_measurement_raises(make, value, message):
    problem = {BM3D: "denoising", Biharmonic: "inpainting"}.get(make, "deblurring")
    physics = make_physics(problem, (3, 32, 32))
    y = torch.rand(1, 3, 32, 32)
    y = {"rank": y[0], "nan": torch.full_like(y, float("nan")), "integer": y.to(torch.uint8)}[value]
    with pytest.raises(ValueError, match=message):
        make()(y, physics)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BM3D(sigma=-1.0),
        lambda: BM3D(profile="refilter"),
        lambda: Wiener(-1.0),
        lambda: Wiener(float("nan")),
        lambda: Wiener(penalty="cubic"),
        lambda: TotalVariation(-1.0),
        lambda: TotalVariation(n_iterations=0),
        lambda: TotalVariation(dual_step=0.0),
    ],
)
def test_bad_arguments_raise(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    ("make", "module", "package"), [(BM3D, "bm3d", "bm3d"), (Biharmonic, "skimage", "scikit-image")]
)
def test_a_missing_package_is_named(make, module, package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}"):
        make()
