"""
A first picture
===============

A noisy picture in, a clean one out: one call.
"""

import matplotlib.pyplot as plt
import torch

import flowprox
from flowprox.samples import sample_images

x = dict(sample_images())["chelsea"]  # (3, 96, 128), values in [0, 1]
y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
restored = flowprox.restore(y, sigma=0.1, truth=x)

# %%
# ``compare`` sets side by side what was given, what came out and the truth; a notebook shows it by itself.

plt.figure(figsize=(9, 2.4))
plt.imshow(restored.compare())
plt.axis("off")
plt.tight_layout()

# %%
# PSNR is in decibels; the noisy picture has 20.

print(f"{restored.psnr:.2f} dB")
