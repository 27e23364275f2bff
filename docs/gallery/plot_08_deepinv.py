"""
Plug-and-play in deepinv
========================

Operators here are deepinv's, and flows and networks go into deepinv's algorithms: as a denoiser or as a prior.
"""

import deepinv
import torch
from deepinv.optim import ADMM, L2, PGD, PnP
from deepinv.physics.functional import gaussian_blur
from skimage.data import coffee

from flowprox import FlowPrior, ReconstructorDenoiser, load_model
from flowprox.metrics import psnr
from flowprox.samples import sample_images

# %%
# A trained network that is told the noise level is a ``deepinv.models.Denoiser``, here in deepinv's own proximal
# gradient descent.

photo = coffee()[100:228, 300:428]  # CC0, Rachel Michetti
x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255  # (1, 3, 128, 128)
noise = deepinv.physics.GaussianNoise(0.01, rng=torch.Generator().manual_seed(0))
physics = deepinv.physics.BlurFFT((3, 128, 128), filter=gaussian_blur(sigma=(2, 2)), noise_model=noise)
y = physics(x)

denoiser = ReconstructorDenoiser(load_model("unfolded-denoising-natural"))
model = PGD(prior=PnP(denoiser), data_fidelity=L2(), stepsize=1.0, g_param=0.02, max_iter=30)
with torch.no_grad():
    x_hat = model(y, physics)
titles = [f"measured, {psnr(y, x).item():.1f} dB", f"PGD, {psnr(x_hat, x).item():.1f} dB", "truth"]
deepinv.utils.plot([y, x_hat, x], titles=titles, rescale_mode="clip", figsize=(9, 3.3), fontsize=12)

# %%
# A flow is a ``deepinv.optim.Prior``: its value is -log p(x), and ``n_prox_steps`` gives the prox of its latent norm.

x = dict(sample_images())["astronaut"][None]  # NASA, public domain
noise = deepinv.physics.GaussianNoise(0.03, rng=torch.Generator().manual_seed(0))
physics = deepinv.physics.BlurFFT((3, 64, 64), filter=gaussian_blur(sigma=(1, 1)), noise_model=noise)
y = physics(x)

prior = FlowPrior(load_model("glow-faces64"), n_prox_steps=15)
model = ADMM(prior=prior, data_fidelity=L2(sigma=0.03), stepsize=0.0036, lambda_reg=1.0, max_iter=6)
x_hat = model(y, physics)
titles = [f"measured, {psnr(y, x).item():.1f} dB", f"ADMM, {psnr(x_hat, x).item():.1f} dB", "truth"]
deepinv.utils.plot([y, x_hat, x], titles=titles, rescale_mode="clip", figsize=(9, 3.3), fontsize=12)
