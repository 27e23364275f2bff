r"""
How sure is it?
===============

Two answers. Calibrated intervals come with a network: ``x_hat -+ c s`` holds nine pixels of ten of such images. A
flow can be asked for more: it has a density, so that the posterior can be sampled.

.. code-block:: none

    p(z | y)  proportional to  N(z; 0, I) p_noise(y - A g(z)),   x = g(z)
"""

import matplotlib.pyplot as plt
import torch

import flowprox
from flowprox.samples import sample_images
from flowprox.solvers import PosteriorSampling

x = dict(sample_images())["grace-hopper"][None]  # US Navy, public domain
physics = flowprox.make_physics("denoising", (3, 64, 64), sigma=0.2)
y = physics(x, seed=0)

model = flowprox.load_model("unfolded-denoising-faces64")
intervals = flowprox.load_model("unfolded-denoising-faces64-intervals")
with torch.no_grad():
    x_hat = model(y, physics)
    half_width = intervals(x_hat, y, physics)  # (1, 3, 64, 64)
print(f"held: {((x - x_hat).abs() <= half_width).float().mean():.0%} of the pixels")

# %%
# The chains of the posterior move in the latent space of a flow. R-hat near 1 says that they have forgotten where
# they began; so few draws are not enough, and what is printed says so. ``n_warmup`` and ``n_samples`` in the
# thousands take minutes.

flow = flowprox.load_model("glow-faces64")
posterior = PosteriorSampling(flow, sampler="pcnl", n_warmup=80, n_samples=80, n_chains=2).solve(y, physics)
print(f"largest R-hat {posterior.r_hat.max():.2f}; chains have mixed below 1.05")

# %%

_, axes = plt.subplots(1, 5, figsize=(12, 3), layout="constrained")
pictures = {"measured": y, "network": x_hat, "half-width": half_width, "posterior mean": posterior.estimate}
pictures["deviation"] = posterior.std
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    if title in ("half-width", "deviation"):
        axis.imshow(picture[0].mean(0), cmap="magma")
    else:
        axis.imshow(picture[0].clamp(0, 1).permute(1, 2, 0))
    axis.set_title(title)
    axis.axis("off")
