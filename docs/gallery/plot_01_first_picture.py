"""
A first picture
===============

A noisy picture in, a clean one out.
"""

import matplotlib.pyplot as plt
import torch

import flowprox
from flowprox.samples import sample_images

x = dict(sample_images())["chelsea"]  # (3, 96, 128) in [0, 1]
y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
restored = flowprox.restore(y, sigma=0.1, truth=x)

# %%
# The picture knows how to show itself: what was given, what came out, the truth.

plt.imshow(restored.compare())
plt.axis("off")
print(restored.psnr)
