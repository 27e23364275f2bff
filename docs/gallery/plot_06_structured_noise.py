r"""
Structured noise
================

The noise of this picture varies from row to row, as of a sensor with bad lines. A method that takes it for white is
misled; one that knows its density trusts the good rows (Whang et al. 2021, Eq. 3),

.. code-block:: none

    x_hat = g(z_hat),   z_hat = argmin_z -log p_noise(y - A g(z)) - beta log p(g(z))
"""

import matplotlib.pyplot as plt

import flowprox
from flowprox.metrics import psnr
from flowprox.noise import GaussianNoise
from flowprox.samples import sample_images
from flowprox.solvers import LBFGS, NoiseMAP

x = dict(sample_images())["astronaut"][None]  # NASA, public domain
flow = flowprox.load_model("glow-faces64")
physics = flowprox.make_physics("denoising", (3, 64, 64), noise="sinusoidal", noise_parameters={"sigma": 1.0})
y = physics(x)

# %%
# ``NoiseMAP`` reads the noise from ``physics``; any density takes its place, such as white noise of the same power,
# or a trained flow.

known = NoiseMAP(flow, form="latent", optimizer=LBFGS(n_iterations=120))(y, physics)
power = physics.noise_model.scale.square().mean().sqrt().item()
white = NoiseMAP(flow, noise=GaussianNoise(power), form="latent", optimizer=LBFGS(n_iterations=120))(y, physics)

# %%

_, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
pictures = {"measured": y, "taken for white": white, "its density known": known, "truth": x}
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    axis.imshow(picture[0].clamp(0, 1).permute(1, 2, 0))
    axis.set_title(title if title == "truth" else f"{title}\n{psnr(picture, x).item():.1f} dB")
    axis.axis("off")
