"""Regularized inversion: the Wiener filter in closed form, total variation by iteration.

    Wiener:           x_hat = argmin  1/2 ||h * x - y||^2 + regularization/2 ||D x||^2
    total variation:  x_hat = argmin  1/2 ||A x - y||^2 + regularization ||grad x||_{2,1}   over x in [0, 1]

Symbols: x image (B, C, H, W) in [0, 1], y measurement, A linear operator, h circular blur kernel, D identity,
gradient or Laplacian (circular), ||.||_{2,1} the sum over pixels of Euclidean lengths.
"""

from __future__ import annotations

from typing import Literal

import torch
from deepinv.optim import TVPrior
from deepinv.physics import LinearPhysics
from torch import Tensor

from flowprox.baselines.shared import Baseline, squared_norm
from flowprox.naming import require_choice, require_count, require_positive


def transfer_function(physics: LinearPhysics, y: Tensor) -> Tensor:
    """Fourier transform of a circular blur's kernel for images like y, complex (C, H, W // 2 + 1), found by blurring one pixel;
    ValueError for an operator that is no circular convolution, by a random image."""
    shape = y.shape[1:]
    pixel = torch.zeros(1, *shape, device=y.device, dtype=y.dtype)
    pixel[..., 0, 0] = 1
    # made on the CPU so that every device checks the same image
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype).to(y.device)
    with torch.no_grad():
        response, blurred = physics.A(pixel), physics.A(image)
    advice = "this method needs a circular blur: choose boundary='circular', or TotalVariation for other operators"
    if response.shape != pixel.shape:
        raise ValueError(f"the operator maps {tuple(pixel.shape)} to {tuple(response.shape)}; {advice}")
    transfer = torch.fft.rfft2(response[0])
    predicted = torch.fft.irfft2(transfer * torch.fft.rfft2(image[0]), s=shape[-2:])
    if not torch.allclose(predicted, blurred[0], atol=1e-3):
        raise ValueError(f"the operator is no circular convolution; {advice}")
    return transfer


class Wiener(Baseline):
    """Regularized inverse filter for a circular blur, in closed form.

        x_hat = F^-1 [ conj(h) y / (|h|^2 + regularization |d|^2) ]

    |d|^2 = 1 for ``penalty`` "identity", |2 sin(w_1/2)|^2 + |2 sin(w_2/2)|^2 for "gradient", its square for "laplacian".

    References:
        Gonzalez, Woods, Digital Image Processing (4th ed., 2018), Sec. 5.8 and 5.9.

    Arguments:
        regularization: weight of the penalty, >= 0; the default is the best on validation faces for the default deblurring
            problem (``recipes/evaluate/classical.yaml``).
        penalty: which D.

    Raises:
        ValueError: a negative regularization, an unknown penalty; on call: an operator that is no circular convolution.

    Example:
        >>> from deepinv.physics import BlurFFT
        >>> physics = BlurFFT((3, 16, 16), filter=torch.tensor([[[[0.2, 0.6, 0.2]]]]))
        >>> x = torch.rand(1, 3, 16, 16)
        >>> bool(torch.allclose(Wiener(1e-7)(physics(x), physics), x, atol=1e-3))
        True
    """

    def __init__(
        self, regularization: float = 3e-3, penalty: Literal["identity", "gradient", "laplacian"] = "gradient"
    ) -> None:
        super().__init__()
        require_positive("regularization", regularization, or_zero=True)
        require_choice("penalty", penalty, ("identity", "gradient", "laplacian"))
        self.regularization, self.penalty = regularization, penalty

    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        transfer = transfer_function(physics, y)
        height, width = y.shape[-2:]
        rows = torch.fft.fftfreq(height, device=y.device, dtype=y.dtype)[:, None]
        columns = torch.fft.rfftfreq(width, device=y.device, dtype=y.dtype)[None, :]
        laplacian = 4 * torch.sin(torch.pi * rows) ** 2 + 4 * torch.sin(torch.pi * columns) ** 2
        exponent = {"identity": 0, "gradient": 1, "laplacian": 2}[self.penalty]
        power = transfer.abs().square() + self.regularization * laplacian**exponent
        # frequencies that the blur erased and the penalty leaves free stay zero instead of 0 / 0
        gain = torch.where(power > 0, transfer.conj() / power.clamp_min(torch.finfo(power.dtype).tiny), 0.0)
        return torch.fft.irfft2(gain * torch.fft.rfft2(y), s=y.shape[-2:])


class TotalVariation(Baseline):
    """Total variation for any linear operator, solved by the primal-dual iteration of Condat and Vu.

        x <- P( x - tau (A^T (A x - y) + grad^T u) )        P: clip to [0, 1], but for complex images (2 channels)
        u <- Q( u + s grad(2 x - x_before) )                Q: shorten each pixel's u to length <= regularization

    with 1/tau = L/2 + 8 s, L = ||A||^2. A fixed number of iterations is run, so that an image's estimate does not depend on the
    others in its batch. The gradient is deepinv's (forward differences, nothing across the border).

    References:
        Rudin, Osher, Fatemi 1992, Nonlinear total variation based noise removal, https://doi.org/10.1016/0167-2789(92)90242-F
        Condat 2013, A primal-dual splitting method, https://doi.org/10.1007/s10957-012-0245-9, Algorithm 3.1
        Blomgren, Chan 1998, Color TV, https://doi.org/10.1109/83.661180 (coupled channels)

    Arguments:
        regularization: weight of the total variation, >= 0; the best on validation faces are the defaults of ``METHODS``.
        n_iterations: of the primal-dual iteration. On 64x64 faces 1,000 are within 0.05 dB of 4,000; holes fill slowly.
        couple_channels: one length per pixel over all channels (edges in the same place in every color), or one per
            channel.
        dual_step: s above; changes the speed only (0.05 is faster for denoising).

    Raises:
        ValueError: a negative regularization, fewer than one iteration, a step that is not positive.

    Example:
        >>> from deepinv.physics import Denoising, GaussianNoise
        >>> physics, x = Denoising(GaussianNoise(0.1)), torch.full((1, 3, 8, 8), 0.5)
        >>> bool(TotalVariation(regularization=1.0)(physics(x), physics).std() < 0.05)  # a heavy weight leaves one color
        True
    """

    def __init__(
        self,
        regularization: float = 6e-4,
        n_iterations: int = 1000,
        couple_channels: bool = True,
        dual_step: float = 0.005,
    ) -> None:
        super().__init__()
        require_positive("regularization", regularization, or_zero=True)
        require_count("n_iterations", n_iterations)
        require_positive("dual_step", dual_step)
        self.regularization, self.n_iterations = regularization, n_iterations
        self.couple_channels, self.dual_step = couple_channels, dual_step
        self._prior = TVPrior()

    def objective(self, x: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
        """Value of the minimized function at x, per image: (B,)."""
        residual, lengths = (physics.A(x) - y).flatten(1), self._length(self._prior.nabla(x)).flatten(1)
        return 0.5 * residual.abs().square().sum(1) + self.regularization * lengths.sum(1)

    @torch.no_grad()
    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        x = self._start(y, physics)
        primal_step = 1 / (squared_norm(physics, x) / 2 + 8 * self.dual_step)
        u = torch.zeros_like(self._prior.nabla(x))
        for _ in range(self.n_iterations):
            descent = physics.A_adjoint(physics.A(x) - y) + self._prior.nabla_adjoint(u)
            x_before, x = x, self._within_range(x - primal_step * descent)
            u = u + self.dual_step * self._prior.nabla(2 * x - x_before)
            u = u * (self.regularization / self._length(u).clamp_min(max(self.regularization, 1e-12)))
        return x

    def _length(self, gradient: Tensor) -> Tensor:
        """Length of the gradient (B, C, H, W, 2) at each pixel: (B, 1, H, W, 1), or per channel (B, C, H, W, 1)."""
        squares = gradient.square().sum(-1, keepdim=True)
        return (squares.sum(1, keepdim=True) if self.couple_channels else squares).sqrt()

    def _start(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        """The constant image that fits y best, plus what A^T sees of the rest: hidden pixels start at the mean."""
        ones = torch.ones_like(physics.A_adjoint(y))
        seen = physics.A(ones).flatten(1)
        fit = (seen.conj() * y.flatten(1)).real.sum(1) / seen.abs().square().sum(1).clamp_min(1e-12)
        x = fit[:, None, None, None] * ones
        return self._within_range(x + physics.A_adjoint(y - physics.A(x)) / squared_norm(physics, x))

    @staticmethod
    def _within_range(x: Tensor) -> Tensor:
        """P; real and imaginary part, two channels, have no range."""
        return x if x.shape[1] == 2 else x.clamp(0, 1)
