"""
Your kernel
===========

A photograph that was shaken, and the path of the shake as the blur's kernel. The prior is the denoiser of
photographs again. What lies beyond the border of a photograph was blurred into it and is not known.
"""

import matplotlib.pyplot as plt
import torch
from skimage.data import astronaut

import flowprox

photo = astronaut()[16:184, 136:304]  # NASA, public domain
scene = torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255  # (3, 168, 168)

# %%
# The kernel has odd sides and sum 1: an array, an .npy file, or a picture.

kernel = torch.zeros(9, 9)
for i in range(9):
    kernel[min(8, 2 + i // 2), i] = 1 / 9

physics = flowprox.make_physics("deblurring", scene.shape, kernel=kernel, boundary="valid", sigma=0.01)
y = physics(scene[None], seed=0)[0]  # (3, 160, 160)
clean = scene[:, 4:-4, 4:-4]
restored = flowprox.restore(y, kernel=kernel, sigma=0.01, truth=clean)

# %%

_, axes = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
pictures = {"shaken": y, "kernel": kernel[None], f"restored, {restored.psnr:.1f} dB": restored.x_hat, "truth": clean}
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    axis.imshow((picture / picture.max() if title == "kernel" else picture.clamp(0, 1)).permute(1, 2, 0), cmap="gray")
    axis.set_title(title)
    axis.axis("off")
