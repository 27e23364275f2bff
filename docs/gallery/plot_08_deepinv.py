"""
Plug-and-play in deepinv
========================

Operators here are deepinv's, and flows and networks go into deepinv's algorithms: as a denoiser or as a prior.
"""

import deepinv
import torch
from deepinv.optim import ADMM, L2, PGD, PnP
from skimage.data import coffee

from flowprox import FlowPrior, ReconstructorDenoiser, load_model
from flowprox.metrics import psnr
from flowprox.samples import sample_images

# %%
# A trained network that is told the noise level is a ``deepinv.models.Denoiser``, here in deepinv's own ADMM.

clean = torch.from_numpy(coffee()[120:248, 200:328].copy()).permute(2, 0, 1)[None] / 255  # CC0, Rachel Michetti
mask = (torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)) > 0.5).float()
physics = deepinv.physics.Inpainting((3, 128, 128), mask=mask, noise_model=deepinv.physics.GaussianNoise(0.02))
y = physics(clean)

denoiser = ReconstructorDenoiser(load_model("unfolded-denoising-natural"))
model = ADMM(prior=PnP(denoiser), data_fidelity=L2(), stepsize=1.0, g_param=0.06, max_iter=12)
with torch.no_grad():
    x_hat = model(y, physics)
deepinv.utils.plot(
    [y, x_hat, clean], titles=["measured", f"ADMM, {psnr(x_hat, clean).item():.1f} dB", "truth"], rescale_mode="clip"
)

# %%
# A flow is a ``deepinv.optim.Prior``: its value is -log p(x), its prox shrinks the latent. Any of deepinv's
# algorithms takes it.

x = dict(sample_images())["astronaut"][None]  # NASA, public domain
center = torch.ones(1, 1, 64, 64)
center[..., 28:36, 20:44] = 0
physics = deepinv.physics.Inpainting((3, 64, 64), mask=center)
y = physics(x)
model = PGD(prior=FlowPrior(load_model("glow-faces64")), data_fidelity=L2(), stepsize=0.9, lambda_reg=0.02, max_iter=40)
x_hat = model(y, physics)
deepinv.utils.plot(
    [y, x_hat, x], titles=["measured", f"PGD, {psnr(x_hat, x).item():.1f} dB", "truth"], rescale_mode="clip"
)
