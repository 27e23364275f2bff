"""Plain networks: the ResNet and U-Net used as baseline proxes, and DCGAN's two.

None of them knows about flows, operators or training. Shapes: x (B, C, H, W), any H and W unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from flowprox.naming import Specified, require_count


class ResNet(nn.Module):
    """Residual network of Mardani et al. 2018 as Wei et al. 2022, Sec. V-C, describe it.

    Residual blocks of two 3x3 convolutions with batch normalization and ReLU, then three 1x1 convolutions; the output is
    added to the input, a skip that the papers do not mention. Width 64 gives the 0.16 M parameters that the paper counts.

    References:
        Mardani et al. 2018, Neural proximal gradient descent for compressive imaging, https://arxiv.org/abs/1806.03963

    Arguments:
        n_channels: image channels.
        hidden_channels: width of the blocks.
        n_blocks: number of residual blocks.
    """

    is_region = True  # of ``flowprox.graphs.compile_regions``

    def __init__(self, n_channels: int = 3, hidden_channels: int = 128, n_blocks: int = 2) -> None:
        super().__init__()
        width = hidden_channels
        self.first = nn.Conv2d(n_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_convolutions(width, width, width) for _ in range(n_blocks))
        inner = [nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU()]
        self.last = nn.Sequential(*inner, nn.Conv2d(width, n_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return x + self.last(h)


def _convolutions(*widths: int) -> nn.Sequential:
    """3x3 convolutions from width to width, each with batch normalization and ReLU."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """The standard U-Net of Ronneberger et al. 2015 with batch normalization; widths 64 to 1024 give 31.04 M parameters.

    References:
        Ronneberger et al. 2015, U-Net: convolutional networks for biomedical image segmentation,
        https://arxiv.org/abs/1505.04597

    Arguments:
        n_channels: image channels.
        hidden_channels: width at the finest scale; it doubles at each of the four coarser ones.
        n_scales: number of resolutions, 5 in the original.
        residual: add the output to the input; the original has no such skip.
    """

    is_region = True  # of ``flowprox.graphs.compile_regions``

    def __init__(
        self, n_channels: int = 3, hidden_channels: int = 64, n_scales: int = 5, residual: bool = True
    ) -> None:
        super().__init__()
        widths = [hidden_channels * 2**i for i in range(n_scales)]
        self.residual = residual
        self.contract = nn.ModuleList(_convolutions(a, b, b) for a, b in pairwise([n_channels, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.expand = nn.ModuleList(_convolutions(2 * a, a, a) for a in widths[:-1])
        self.last = nn.Conv2d(widths[0], n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, skips = x, []
        for i, block in enumerate(self.contract):
            if i > 0:
                h = F.max_pool2d(h, 2, ceil_mode=True)
            h = block(h)
            skips.append(h)
        for i in reversed(range(len(self.up))):
            up = self.up[i](h)[..., : skips[i].shape[-2], : skips[i].shape[-1]]
            h = self.expand[i](torch.cat([skips[i], up], dim=1))
        out = self.last(h)
        return x + out if self.residual else out


class DCGANGenerator(Specified, nn.Module):
    """Generator of Radford et al.: a latent becomes a small map of many channels, then each scale doubles it.

        z (B, latent_size)  ->  x (B, C, H, W) in [0, 1]

    Transposed 4x4 convolutions with batch normalization and ReLU; a sigmoid at the end, which is the paper's tanh moved.

    References:
        Radford, Metz, Chintala 2015, Unsupervised representation learning with DCGANs, https://arxiv.org/abs/1511.06434, Sec. 3

    Arguments:
        image_shape: (C, H, W); H and W divisible by 2 ** n_scales.
        latent_size: length of z, drawn from N(0, I).
        hidden_channels: width at half the image's resolution; it doubles at each coarser scale.
        n_scales: number of doublings.

    Raises:
        ValueError: sides that are not divisible, or a size below 1.

    Example:
        >>> generator = DCGANGenerator((3, 16, 16), latent_size=8, hidden_channels=4, n_scales=2).eval()
        >>> generator(torch.randn(5, 8)).shape
        torch.Size([5, 3, 16, 16])
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 64, 64),
        latent_size: int = 100,
        hidden_channels: int = 64,
        n_scales: int = 4,
    ) -> None:
        super().__init__()
        start = _coarsest(image_shape, hidden_channels, n_scales)
        require_count("latent_size", latent_size)
        self.image_shape = (int(image_shape[0]), int(image_shape[1]), int(image_shape[2]))
        self.latent_size = latent_size
        widths = [hidden_channels * 2**i for i in reversed(range(n_scales))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_size, widths[0], start, bias=False)]
        for a, b in pairwise(widths):
            layers += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.ConvTranspose2d(widths[-1], self.image_shape[0], 4, 2, 1)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(z[:, :, None, None]))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images (n, C, H, W) of latents from N(0, I); ``generator`` must live on the weights' device."""
        weight = next(self.parameters())
        z = torch.randn(n, self.latent_size, generator=generator, device=weight.device, dtype=weight.dtype)
        return self(z)


class DCGANDiscriminator(nn.Module):
    """Discriminator of Radford et al. with spectral normalization in the place of batch normalization.

    It maps x (B, C, H, W) in [0, 1] to one logit per image (B,), above zero for "real". No layer mixes images.

    References:
        Miyato et al. 2018, Spectral normalization for generative adversarial networks, https://arxiv.org/abs/1802.05957, Sec. 2

    Arguments:
        image_shape: (C, H, W); H and W divisible by 2 ** n_scales.
        hidden_channels: width at half the image's resolution; it doubles at each coarser scale.
        n_scales: number of halvings.
    """

    def __init__(self, image_shape: Sequence[int] = (3, 64, 64), hidden_channels: int = 64, n_scales: int = 4) -> None:
        super().__init__()
        last = _coarsest(image_shape, hidden_channels, n_scales)
        widths = [int(image_shape[0]), *(hidden_channels * 2**i for i in range(n_scales))]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, last)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(2 * x - 1).flatten()


def _coarsest(image_shape: Sequence[int], hidden_channels: int, n_scales: int) -> tuple[int, int]:
    """Height and width after n_scales halvings."""
    if n_scales < 1 or hidden_channels < 1:
        raise ValueError(f"n_scales and hidden_channels must be at least 1, got {n_scales} and {hidden_channels}")
    _, height, width = image_shape
    factor = 2**n_scales
    if height < factor or width < factor or height % factor or width % factor:
        sides = f"divisible by {factor} (n_scales {n_scales})"
        raise ValueError(f"the sides of image_shape must be {sides}, got {image_shape}")
    return height // factor, width // factor
