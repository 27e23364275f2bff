import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from flowprox.metrics import psnr, ssim


def images(n=2, size=(24, 20), channels=3):
    x = torch.rand(n, channels, *size, dtype=torch.float64)
    return (x + 0.2 * torch.randn_like(x)), x


def test_psnr_agrees_with_scikit_image():
    x_hat, x = images()
    expected = [
        peak_signal_noise_ratio(b.numpy(), a.clamp(0, 1).numpy(), data_range=1) for a, b in zip(x_hat, x, strict=True)
    ]
    np.testing.assert_allclose(psnr(x_hat, x).numpy(), expected, rtol=1e-10)


def test_psnr_clips_only_when_asked():
    x = torch.ones(1, 1, 12, 12)
    assert torch.isinf(psnr(x + 0.5, x)).all()
    assert psnr(x + 0.1, x, clip=False).item() == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_ssim_agrees_with_scikit_image(channels, noise):
    _, x = images(3, channels=channels)
    x_hat = (x + noise * torch.randn_like(x)).clamp(0, 1)
    expected = [
        structural_similarity(
            b.numpy(),
            a.numpy(),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(x_hat, x, strict=True)
    ]
    np.testing.assert_allclose(ssim(x_hat, x).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_an_image_is_measured_alone(metric):
    x_hat, x = images(3)
    alone = torch.cat([metric(x_hat[i : i + 1], x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(metric(x_hat, x), alone)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_shapes_that_differ_raise(metric):
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        metric(torch.rand(1, 3, 16, 16), torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        metric(torch.rand(3, 16, 16), torch.rand(3, 16, 16))


def test_ssim_of_a_small_image_raises():
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(torch.rand(1, 3, 8, 16), torch.rand(1, 3, 8, 16))


def test_ssim_in_strips_is_that_of_the_whole(monkeypatch):
    x_hat, x = images(2, size=(40, 20))
    whole = ssim(x_hat, x)
    monkeypatch.setattr("flowprox.metrics._STRIP", 20 * 7)  # 7 rows of windows at a time, and fewer in the end
    torch.testing.assert_close(ssim(x_hat, x), whole, rtol=0, atol=1e-12)
