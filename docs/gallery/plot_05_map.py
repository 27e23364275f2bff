r"""
MAP with a flow
===============

A flow that was trained on clean faces, and 2,500 random projections of a portrait of 12,288 numbers. No training
for the operator: the latent that explains them is searched for (Asim et al. 2020, Eq. 2),

.. code-block:: none

    x_hat = g(z_hat),   z_hat = argmin_z ||y - A g(z)||^2 + gamma ||z||
"""

import matplotlib.pyplot as plt

import flowprox
from flowprox.metrics import psnr
from flowprox.samples import sample_images
from flowprox.solvers import LBFGS, LatentMAP

x = dict(sample_images())["grace-hopper"][None]  # (1, 3, 64, 64); US Navy, public domain
flow = flowprox.load_model("glow-faces64")
physics = flowprox.make_physics("compressed-sensing", (3, 64, 64), m=2500, noise_norm=0.1)
y = physics(x)  # (1, 2500)

solution = LatentMAP(flow, gamma=0.1, optimizer=LBFGS(n_iterations=80)).solve(y, physics)
print(solution.reasons, f"{psnr(solution.estimate, x).item():.2f} dB")

# %%
# The solution holds the estimate, the loss after each iteration and why the solver stopped. 200 iterations are
# usual; more measurements than unknowns would need no prior at all, here there is one for five.

_, axes = plt.subplots(1, 3, figsize=(10, 3.2), width_ratios=[1.4, 1, 1], layout="constrained")
axes[0].semilogy(solution.losses[:, 0])
axes[0].set(xlabel="iteration", ylabel="squared misfit")
for axis, title, picture in zip(axes[1:], ["estimate", "truth"], [solution.estimate, x], strict=True):
    axis.imshow(picture[0].clamp(0, 1).permute(1, 2, 0))
    axis.set_title(title)
    axis.axis("off")
