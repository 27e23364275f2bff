"""
Your photo
==========

A path, a PIL image, an array or a tensor, of any size: what comes back is of the kind that went in.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage.data import coffee

import flowprox

# %%
# The photograph is scikit-image's cup of coffee (CC0, Rachel Michetti), saved with noise as a camera in the dark
# would.

folder = Path(tempfile.mkdtemp())
clean = coffee()[100:356, 180:436]  # (256, 256, 3), uint8
noise = np.random.default_rng(0).normal(scale=25, size=clean.shape)
Image.fromarray((clean + noise).clip(0, 255).astype(np.uint8)).save(folder / "photo.png")

# %%
# The level is the noise's standard deviation where pixels lie in [0, 1], 25 of 255 here. Try another if you do not
# know it: too small a level leaves grain, too large a level takes texture away.

levels = [0.05, 25 / 255, 0.2]
results = [flowprox.restore(folder / "photo.png", sigma=sigma, truth=clean) for sigma in levels]
results[1].image.save(folder / "clean.png")

_, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
shown = [("given", Image.open(folder / "photo.png"))]
shown += [
    (f"sigma {sigma:.2f}: {result.psnr:.1f} dB", result.image) for sigma, result in zip(levels, results, strict=True)
]
for axis, (title, picture) in zip(axes, shown, strict=True):
    axis.imshow(picture)
    axis.set_title(title)
    axis.axis("off")

# %%
# The same on the command line:
#
# .. code-block:: bash
#
#    flowprox reconstruct --model unfolded-denoising-natural --measured --parameters sigma=0.098 --out clean -- photo.png
